"""Runs one command in a sandbox of Linux namespaces: it sees the folders that it is given, read-only but for its own limited space, has a
network with nothing in it but a way to what it may reach, and is killed when it uses more memory, time or processes than it may. Needs
no root, no daemon and no cgroup.

The memory of all its processes is polled, since an ordinary user has no cgroups (memory.py). When this process dies, however it dies,
everything in the sandbox dies with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from servicekit.errors import Invalid

from trainer.runner import memory
from trainer.runner.child import Child
from trainer.runner.egress import PORT, Egress, Proxy
from trainer.runner.egress import environment as egress_environment
from trainer.runner.sandbox_init import HOME, SOURCE, WORK

POLL_S = 0.1
SLOW_S = 5.0
"""Seconds after which a look at the memory is late; twice in a row, and no limit can be held. Many workers that share much data, and a busy
machine, take a second now and then."""

MAX_PROCESSES = 512
MAX_THREADS = 4_000
MAX_FILES = 4_096
"""Open files of one process."""

_GONE_S = 30.0
BASE_PYTHON: str = sys._base_executable  # type: ignore[attr-defined]  # CPython has it
_INIT = Path(__file__).with_name("sandbox_init.py")

SYSTEM = ("/usr", "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/nsswitch.conf", "/etc/localtime")
"""What of the system a command sees, besides the dynamic linker's files; what is not there is left out."""

_LINKER = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
_ROOTS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_GPUS = ("/dev/nvidia", "/dev/dri", "/dev/kfd")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may use: memory of all its processes together, space for files, seconds."""

    memory_bytes: int
    disk_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. It starts in WORK, into which `source` (if any) is copied; `source` itself is seen read-only at SOURCE.

    `visible` are files and folders seen read-only at their own paths or, as (path, place), elsewhere; `writable` ones may be changed.
    The environment is all that it gets, but for HOME and TMPDIR, and the proxy's variables when it has an `egress`. Without one it
    reaches nothing but itself.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    source: Path | None = None
    visible: Sequence[Path | tuple[Path, str]] = ()
    writable: Sequence[Path] = ()
    egress: Egress | None = None


@dataclass(slots=True)
class Ended:
    """How a command ended. `code` is negative for a signal, as subprocess has it. `killed` says why this process killed it, "" if it
    did not; `full` that it had no space for files left; `error` that it could not be started."""

    code: int = -1
    killed: str = ""
    full: bool = False
    error: str = ""
    peak_memory_bytes: int = 0


@dataclass(slots=True)
class _Watch:
    """What is seen of a running sandbox from outside."""

    killed: str = ""
    peak: int = 0
    init: psutil.Process | None = field(default=None)


async def run(command: Command, limits: Limits, folder: Path, output: Callable[[bytes], None]) -> Ended:
    """Runs a command to its end and hands on what it prints. `folder` is an empty folder on the outside, for the sandbox's root.

    When cancelled it kills the command and returns (by raising) after the last process is gone. Raises Invalid when this machine
    has no user namespaces.
    """
    root = folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    spec_file = folder / "sandbox.json"
    spec_file.write_text(json.dumps(_spec(command, limits, root)))
    result, result_end = os.pipe()
    line, line_end = socket.socketpair()
    try:
        words = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "--"]
        words += [BASE_PYTHON, "-I", "-S", str(_INIT), str(spec_file), str(result_end)]
        words += [str(line_end.fileno())] if command.egress is not None else []
        passed = (result_end,) if command.egress is None else (result_end, line_end.fileno())
        child = Child(words, environment={"PATH": os.environ.get("PATH", os.defpath)}, pass_fds=passed)
        os.close(result_end)
        result_end = -1
        line_end.close()
        watch = _Watch()
        leading = asyncio.create_task(_lead_out(line, command.egress), name="sandbox egress")
        watching = asyncio.create_task(_watch(child, limits, watch), name="sandbox watch")
        expiring = asyncio.create_task(_expire(child, limits, watch), name="sandbox time-out")
        draining = asyncio.create_task(child.drain(output), name="sandbox output")
        try:
            await asyncio.shield(draining)
            await child.wait()
        finally:
            watching.cancel()
            expiring.cancel()
            leading.cancel()
            child.kill()
            # The end of the output is the end of the last process that could write to it, and all of them can.
            await asyncio.wait({watching, expiring, draining}, timeout=_GONE_S)
            draining.cancel()
            await asyncio.gather(draining, leading, return_exceptions=True)
            await child.end()
        return _ended(await asyncio.to_thread(os.read, result, 65_536), watch)
    finally:
        os.close(result)
        line.close()
        line_end.close()
        if result_end >= 0:
            os.close(result_end)


async def check() -> None:
    """Raises Invalid, saying what is missing, when this machine cannot make sandboxes."""
    said = bytearray()
    with tempfile.TemporaryDirectory(prefix="headrace-sandbox-") as folder:
        ended = await run(Command(["/bin/true"], {}), Limits(2**30, 2**20, 60), Path(folder), said.extend)
    if ended.code != 0:
        raise Invalid(f"this machine cannot run training in a sandbox: {ended.error or said.decode(errors='replace').strip() or ended}")


async def _lead_out(line: socket.socket, egress: Egress | None) -> None:
    """Serves the proxy on the socket that comes out of the sandbox through `line`, until it is cancelled."""
    if egress is None:
        return
    line.setblocking(False)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(line.fileno(), readable.set)
    try:
        await readable.wait()
        _, descriptors, _, _ = socket.recv_fds(line, 16, 1)
    finally:
        loop.remove_reader(line.fileno())
    if not descriptors:
        return  # the sandbox could not be made, and says why itself
    proxy = Proxy(socket.socket(fileno=descriptors[0]), egress)
    try:
        await proxy.start()
        await asyncio.Event().wait()
    finally:
        await proxy.stop()


def visible_python(prefix: Path) -> list[Path | tuple[Path, str]]:
    """What a command must see to run the interpreter that the environment at `prefix` was made from."""
    base = Path(sys.base_prefix)
    return [prefix] if base.is_relative_to("/usr") else [base, prefix]


def _spec(command: Command, limits: Limits, root: Path) -> dict[str, Any]:
    binds: list[tuple[str, str, bool]] = []
    links: dict[str, str] = {}
    for path in (*SYSTEM, *_LINKER):
        if os.path.exists(path):
            binds.append((os.path.realpath(path), path, False))
    for path in _ROOTS:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            binds.append((path, path, False))
    binds.append(("/sys", "/sys", False))
    for visible in command.visible:
        source, place = visible if isinstance(visible, tuple) else (visible, str(visible))
        binds.append((str(source), place, False))
    binds += [(str(path), str(path), True) for path in command.writable]
    space = limits.disk_bytes
    if command.source is not None:
        binds.append((str(command.source), SOURCE, False))
        space += _size(command.source)
    return {
        "root": str(root),
        "binds": binds,
        "links": links,
        "files": {
            "/etc/passwd": f"user:x:0:0::{HOME}:/bin/sh\n",
            "/etc/group": "user:x:0:\n",
            # Processes that find one another by the machine's name must find themselves; all other names are resolved by the proxy.
            "/etc/hosts": f"127.0.0.1 localhost {socket.gethostname()}\n::1 localhost\n",
        },
        "devices": sorted(f"/dev/{name}" for name in os.listdir("/dev") if f"/dev/{name}".startswith(_GPUS)),
        "space_bytes": space,
        "copies_source": command.source is not None,
        "folder": WORK,
        "command": list(command.words),
        "proxy_port": PORT,
        "environment": {**_proxy_environment(command), "HOME": HOME, "TMPDIR": "/tmp"},  # noqa: S108 - its own /tmp, in the sandbox
        "limits": {"CORE": 0, "NOFILE": MAX_FILES, "NPROC": MAX_THREADS},  # NPROC counts threads
    }


def _proxy_environment(command: Command) -> dict[str, str]:
    given = dict(command.environment)
    return given if command.egress is None else {**given, **egress_environment(command.egress.allowed)}


def _size(folder: Path) -> int:
    """Bytes that a copy takes on a tmpfs: whole pages, one more for each entry."""
    page = 4096
    total = 0
    for parent, folders, files in os.walk(folder):
        total += page * (len(files) + len(folders))
        for name in files:
            with contextlib.suppress(OSError):  # a link that leads nowhere
                size = os.lstat(os.path.join(parent, name)).st_size
                total += (size + page - 1) // page * page
    return total


async def _watch(child: Child, limits: Limits, watch: _Watch) -> None:
    """Polls what the command uses, and kills the sandbox when that is too much."""
    late = 0
    while True:
        look = asyncio.create_task(asyncio.to_thread(_used, child.pid, watch, limits.memory_bytes))
        try:
            in_time = True
            while not (await asyncio.wait({look}, timeout=SLOW_S))[0]:
                in_time = False
                late += 1
                if late > 1:
                    return _kill(child, watch, f"its memory could not be watched: a look at it takes more than {SLOW_S:g} s")
            late = 0 if in_time else late
            used, count = look.result()
        except memory.Unwatchable as exc:
            return _kill(child, watch, str(exc))
        finally:
            look.cancel()
        watch.peak = max(watch.peak, used)
        if count > MAX_PROCESSES:
            return _kill(child, watch, f"too many processes: {count}, at most {MAX_PROCESSES}")
        if used > limits.memory_bytes:
            return _kill(child, watch, f"out of memory: used {human(used)} of {human(limits.memory_bytes)}")
        await asyncio.sleep(POLL_S)


async def _expire(child: Child, limits: Limits, watch: _Watch) -> None:
    """Kills the sandbox when its time is over, however long a look at its memory takes."""
    await asyncio.sleep(limits.timeout_s)
    _kill(child, watch, f"timed out after {limits.timeout_s:g} s")


def _kill(child: Child, watch: _Watch, why: str) -> None:
    watch.killed = watch.killed or why
    child.kill()


def _used(pid: int, watch: _Watch, limit: int) -> tuple[int, int]:
    """Bytes in memory and number of the command's processes; those of the sandbox itself do not count. Blocks."""
    try:
        if watch.init is None:
            watch.init = next(iter(psutil.Process(pid).children()), None)
            return 0, 0
        processes = watch.init.children(recursive=True)
    except psutil.Error:
        return 0, 0
    memory.check_sockets(watch.init.pid)
    used = memory.used([process.pid for process in processes], limit) if len(processes) <= MAX_PROCESSES else 0
    return used, len(processes)


def _ended(result: bytes, watch: _Watch) -> Ended:
    told: dict[str, Any] = json.loads(result) if result else {}
    # A sandbox that was killed tells nothing; SIGKILL is what its command got.
    ended = Ended(told.get("code", -signal.SIGKILL), watch.killed, told.get("full", False), told.get("error", ""), watch.peak)
    ended.full = ended.full or told.get("free_bytes", 1 << 30) < 4096
    return ended


def human(size: int) -> str:
    """A size as people write it."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
