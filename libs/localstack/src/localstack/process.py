"""Child processes that cannot outlive us: each dies with its parent, leads a session of its own, and is known by pid and start time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from localstack.errors import Missing

MARK = "HEADRACE_STACK_ID"
"""Environment variable that every child carries; its value names the stack, so that stragglers can be found."""

_POLL_S = 0.02
_LOG_LIMIT = 32 * 1024 * 1024

# The kernel sends the parent-death signal when the *thread* that forked ends: all children are forked by this one, which lives on.
_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="localstack-forker")


@dataclass(frozen=True)
class ProcessId:
    """A process by pid and kernel start time (clock ticks since boot): a recycled pid is another process."""

    pid: int
    started: int

    def alive(self) -> bool:
        """True while this very process runs (a zombie does not count)."""
        return _start_time(self.pid) == self.started


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process, or None when it has ended."""
    started = _start_time(pid)
    return None if started is None else ProcessId(pid, started)


def is_zombie(pid: int) -> bool:
    """Whether the process has ended and nobody has taken note of it yet: its id is still in use."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] == "Z"


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    # A killed process whose first thread has ended already still holds its ports until the last one has.
    return None if state in "ZX" and threads <= 1 else started


class Child:
    """A process that we started. Its group (it and what it forked) is stopped together."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], identity: ProcessId, log: Path, log_from: int = 0) -> None:
        """`log_from`: where its output begins in the log."""
        self.name = name
        self.identity = identity
        self.log = log
        self._log_from = log_from
        self._popen = popen

    @property
    def pid(self) -> int:
        return self.identity.pid

    def last_words(self, lines: int = 15) -> str:
        """The last lines that this process wrote to its log."""
        return tail(self.log, lines, self._log_from)

    def exit_code(self) -> int | None:
        """The exit code (negative: the signal) once it has ended, else None. Does not block."""
        return self._popen.poll()

    def alive(self) -> bool:
        return self._popen.poll() is None

    def stop(self, grace_s: float, stop_signal: signal.Signals = signal.SIGTERM) -> None:
        """Asks the process to end, and kills its whole group after `grace_s` seconds. Blocks; may be repeated."""
        if self.alive():
            self._popen.send_signal(stop_signal)
            with suppress(subprocess.TimeoutExpired):  # the group is killed below in either case
                self._popen.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group, and waits for the process itself. May be repeated."""
        kill_group(self.pid)
        self._popen.wait()


def spawn(
    name: str,
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str],
    mark: str,
    cwd: Path | None = None,
    unprivileged: bool = False,
) -> Child:
    """Starts a process whose output goes to `log` (appended), in a session of its own, killed when this process ends.

    `unprivileged`: for servers that refuse to run as root: root gets a user namespace in which it is nobody; others run it as they are.
    Raises Missing when util-linux is not installed. Does not block for the process to do anything.
    """
    # We may have died between the fork and the setting of the signal: then somebody else is the parent by now.
    still_ours = ["sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
    command = [_tool("setpriv"), "--pdeathsig", "KILL", "--", *still_ours, *map(str, argv)]
    if unprivileged and os.geteuid() == 0:
        # setpriv comes after unshare: a change of credentials clears the parent-death signal.
        command = [*nobody(), *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    trim_log(log)

    def fork() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, MARK: mark},
                cwd=cwd,
                start_new_session=True,
                close_fds=True,
            )

    log_from = log.stat().st_size if log.exists() else 0
    popen = _forker.submit(fork).result()
    identity = identify(popen.pid) or ProcessId(popen.pid, -1)
    return Child(name, popen, identity, log, log_from)


def nobody() -> list[str]:
    """The command prefix that runs a program as an ordinary user when we are root."""
    return [_tool("unshare"), "--user", "--map-user=65534", "--map-group=65534", "--"]


def _tool(name: str) -> str:
    path = which(name)
    if path is None:
        raise Missing(f"`{name}` is not on the PATH; it belongs to util-linux: install that package")
    return path


def kill_group(pgid: int) -> None:
    """SIGKILL to a process group; a group that is gone is fine."""
    try:
        os.killpg(pgid, signal.SIGKILL)
    except ProcessLookupError:
        return


def stop_process(identity: ProcessId, grace_s: float) -> None:
    """SIGTERM, then SIGKILL after `grace_s`, to a process that need not be our child. Blocks until it has ended."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + wait_s
        if not _signal(identity, number):
            return
        while time.monotonic() < deadline:
            if not identity.alive():
                return
            time.sleep(_POLL_S)


def _signal(identity: ProcessId, number: signal.Signals) -> bool:
    if not identity.alive():
        return False
    try:
        os.kill(identity.pid, number)
    except ProcessLookupError:
        return False
    return True


def marked(mark: str) -> Iterator[ProcessId]:
    """Every running process whose environment says that it belongs to the stack `mark`, ourselves excepted."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # ended meanwhile, or another user's
        if wanted in environment.split(b"\0"):
            identity = identify(int(entry.name))
            if identity is not None:
                yield identity


def sweep(mark: str, recorded: Iterable[ProcessId] = ()) -> int:
    """Kills whatever still runs of the stack `mark`; returns how many processes that were. Blocks until they are gone.

    `recorded`: processes that are known to belong to it. One that is dying shows no mark any more, but holds its port to the end.
    """
    seen: set[ProcessId] = set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        running = {identity for identity in (*recorded, *seen, *marked(mark)) if identity.alive()}
        if not running:
            break
        for identity in running:
            _signal(identity, signal.SIGKILL)
        seen |= running
        time.sleep(_POLL_S)
    return len(seen)


def trim_log(log: Path) -> None:
    """Keeps a log file bounded: above 32 MiB its older half goes. The writer appends (O_APPEND), so this may happen under it."""
    try:
        size = log.stat().st_size
    except FileNotFoundError:
        return
    if size <= _LOG_LIMIT:
        return
    with log.open("r+b") as file:
        file.seek(size - _LOG_LIMIT // 2)
        tail = file.read()
        file.seek(0)
        file.truncate()
        file.write(tail[tail.find(b"\n") + 1 :])


def tail(log: Path, lines: int = 15, begin: int = 0) -> str:
    """The last lines of a log, for messages; none that stands before the byte `begin`."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, min(begin, file.tell()), file.tell() - 32 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
