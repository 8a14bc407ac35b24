"""What `headrace up`, `down`, `status` and `logs` call. Blocking functions, each safe to repeat and to call from several processes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import psutil

from localstack import layout, mlflow_page, process, seaweed, triton
from localstack.cache import Progress, exclusive
from localstack.errors import Missing, StackError
from localstack.layout import Paths
from localstack.ports import Ports, is_free
from localstack.progress import shown
from localstack.services import inherited

_START_S = 180.0
_TRIES = 4
"""A part that ended so often while it started is given up on."""
_STOP_S = 45.0

_ours: list[process.Child] = []
"""Supervisors that are our children, kept until they have ended and were waited for."""


@dataclass(frozen=True)
class StackInfo:
    """A running stack."""

    gateway_url: str
    otlp_url: str
    state_dir: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PartStatus:
    """One row of `headrace status`.

    `rss_bytes`: resident memory of the part and all it has forked, each shared page by its share (PSS); 0 when it does not run.
    """

    name: str
    state: str
    pid: int | None
    port: int | None
    restarts: int
    rss_bytes: int
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def up(state_dir: Path, progress: bool | Progress = True, *, with_services: bool = True, die_with_us: bool = False) -> StackInfo:
    """Downloads what is missing, starts what does not run, and returns when all of it is ready.

    `die_with_us`: for tests: the stack ends with the calling process, however that ends.
    Raises Missing with what to install, StackError when a part does not come up (with the end of its log); the others then stay
    up, so that one can look at them.
    """
    paths = Paths(state_dir.resolve())
    _check_machine()
    with exclusive(paths.order), shown(progress) as show:
        running = paths.supervisor()
        if running is None or _needs_restart(paths, with_services):
            _start(paths, show, with_services, die_with_us)
        try:
            _await_ready(paths, show)
        except StackError:
            if not _lost_a_port(paths):
                raise
            show.step("supervisor", "a port was taken meanwhile: choosing others")
            _start(paths, show, with_services, die_with_us)
            _await_ready(paths, show)
        return _info(paths)


def moved(info: StackInfo) -> str:
    """That the gateway listens elsewhere because its port is taken, in words; empty when it is where it should be."""
    port = urlsplit(info.gateway_url).port
    return f"{layout.GATEWAY_PORT} is taken, using {port}" if port != layout.GATEWAY_PORT and not is_free(layout.GATEWAY_PORT) else ""


def down(state_dir: Path) -> list[str]:
    """Stops everything of this stack and removes what it left in /tmp and /dev/shm; returns the names of what ran. Data stays."""
    paths = Paths(state_dir.resolve())
    if not paths.state.is_dir():
        return []
    with exclusive(paths.order):
        names = [row.name for row in status(paths.state) if row.pid is not None]
        _stop(paths)
        triton.sweep(paths.state / "triton")
        s3_port = Ports(paths.state / "ports.json").get("s3")
        if s3_port is not None:
            seaweed.sweep(s3_port)
        return names


def status(state_dir: Path) -> list[PartStatus]:
    """What runs, with memory; empty when nothing was ever started here."""
    paths = Paths(state_dir.resolve())
    content = paths.read()
    if not content:
        return []
    supervisor = paths.supervisor()
    rows = [PartStatus("supervisor", "ready" if supervisor else "stopped", supervisor.pid if supervisor else None, None, 0, 0, "")]
    for part in content["parts"]:
        identity = process.ProcessId(part["pid"], part["started"]) if part["pid"] else None
        alive = identity is not None and identity.alive()
        rows.append(
            PartStatus(
                name=part["name"],
                # Nobody keeps the file up to date when the supervisor was killed.
                state=part["state"] if supervisor else "stopped",
                pid=part["pid"] if alive else None,
                port=part["port"],
                restarts=part["restarts"],
                rss_bytes=0,
                detail=part["detail"],
            )
        )
    return [_with_memory(row) for row in rows]


def logs(state_dir: Path, names: Sequence[str] = (), *, follow: bool = False, lines: int = 50) -> Iterator[str]:
    """The last lines of the logs named (all: none named), each with its name before it; with `follow` goes on for ever.

    Raises StackError when a name has no log.
    """
    paths = Paths(state_dir.resolve())
    known = sorted(file.stem for file in paths.logs.glob("*.log"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise StackError(f"there is no log of {', '.join(unknown)}: there is {', '.join(known) or 'none at all, run `headrace up`'}")
    chosen = list(names) or known
    width = max(map(len, chosen), default=0)
    offsets = {}
    for name in chosen:
        file = paths.log(name)
        offsets[name] = file.stat().st_size
        for line in process.tail(file, lines).splitlines():
            yield f"{name:<{width}} | {line}"
    while follow:
        quiet = True
        for name in chosen:
            file = paths.log(name)
            size = file.stat().st_size
            if size < offsets[name]:
                offsets[name] = 0  # it was trimmed
            if size == offsets[name]:
                continue
            with file.open("rb") as content:
                content.seek(offsets[name])
                fresh = content.read(size - offsets[name])
            whole = fresh[: fresh.rfind(b"\n") + 1]
            offsets[name] += len(whole)
            quiet = quiet and not whole
            for line in whole.decode(errors="replace").splitlines():
                yield f"{name:<{width}} | {line}"
        if quiet:
            time.sleep(0.2)


def _needs_restart(paths: Paths, with_services: bool) -> bool:
    """Whether a running supervisor cannot give what is asked for: it has no services, or a part keeps failing (ports are chosen anew)."""
    content = paths.read()
    given_up = any(part["state"] == "failed" and _is_given_up(paths, part) for part in content["parts"])
    return given_up or (with_services and not content["with_services"])


def _is_given_up(paths: Paths, part: dict[str, Any]) -> bool:
    # Nobody gives a port back: no need to try as often as with other faults.
    restarts: int = part["restarts"]
    return restarts >= _TRIES or (restarts >= 2 and _lost_a_port(paths))


def _lost_a_port(paths: Paths) -> bool:
    """Whether a part fails while somebody else holds one of its ports: it was free when it was chosen."""
    failed = [part["name"] for part in paths.read()["parts"] if part["state"] == "failed"]
    ports = Ports(paths.state / "ports.json")
    return any(not is_free(port) for name in failed for port in ports.of(name))


def _start(paths: Paths, show: Progress, with_services: bool, die_with_us: bool) -> None:
    # What a killed supervisor left still holds the ports that we want back.
    _stop(paths)
    _prepare(paths.state, show, with_services)
    _spawn_supervisor(paths, with_services, die_with_us)


def _stop(paths: Paths) -> None:
    running = paths.supervisor()
    if running is not None:
        process.stop_process(running, _STOP_S)
    process.sweep(paths.mark(), paths.recorded())
    _ours[:] = [child for child in _ours if child.exit_code() is None]


def _check_machine() -> None:
    if not sys.platform.startswith("linux"):
        raise Missing("the local stack runs on Linux: elsewhere use docker-compose.yml")
    missing = [name for name in ("setpriv", "unshare", "setsid") if which(name) is None]
    if missing:
        raise Missing(f"not on the PATH: {', '.join(missing)}; they belong to util-linux: install that package")


def _prepare(state: Path, show: Progress, with_services: bool) -> None:
    stack = layout.make(state, with_services=with_services)
    with ThreadPoolExecutor(max_workers=4) as pool:
        work = [part.server.prepare for part in stack.parts]
        if with_services:
            work.append(mlflow_page.fetch_if_possible)
        for done in [pool.submit(each, show) for each in work]:
            done.result()


def _spawn_supervisor(paths: Paths, with_services: bool, die_with_us: bool) -> None:
    paths.logs.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "localstack.supervisor", str(paths.state), *([] if with_services else ["--servers-only"])]
    if die_with_us:
        mark = f"supervisor of {paths.mark()}"
        _ours.append(process.spawn("supervisor", argv, log=paths.supervisor_log, env=inherited(), mark=mark, cwd=paths.state))
    else:
        process.trim_log(paths.supervisor_log)
        with paths.supervisor_log.open("ab") as log:
            command = ["setsid", "--fork", *argv]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=inherited(), cwd=paths.state, check=True)
    deadline = time.monotonic() + 30
    while paths.supervisor() is None:
        if time.monotonic() > deadline:
            raise StackError(f"the supervisor did not start; its log ends:\n{process.tail(paths.supervisor_log)}")
        time.sleep(0.02)


def _await_ready(paths: Paths, show: Progress) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        parts = paths.read()["parts"]
        for part in parts:
            show.step(part["name"], part["state"] if part["state"] in ("ready", "waiting", "starting") else _short(part["detail"]))
        late = [part for part in parts if part["state"] != "ready"]
        if not late:
            return
        for part in late:
            if _is_given_up(paths, part):
                raise StackError(f"{part['name']} does not start: {part['detail']}\n(`headrace logs {part['name']}` shows more)")
        if paths.supervisor() is None:
            raise StackError(f"the supervisor ended; its log ends:\n{process.tail(paths.supervisor_log)}")
        if time.monotonic() > deadline:
            waiting = "; ".join(f"{part['name']}: {part['state']} {_short(part['detail'])}" for part in late)
            raise StackError(f"not ready after {_START_S:.0f} s: {waiting}")
        time.sleep(0.05)


def _short(detail: str) -> str:
    return re.sub(r"\s+", " ", detail)[:100]


def _info(paths: Paths) -> StackInfo:
    content = paths.read()
    return StackInfo(gateway_url=content["gateway_url"], otlp_url=content["otlp_url"], state_dir=str(paths.state))


def _with_memory(row: PartStatus) -> PartStatus:
    if row.pid is None:
        return row
    try:
        root = psutil.Process(row.pid)
        # The supervisor's children have rows of their own.
        family = [root] if row.name == "supervisor" else [root, *root.children(recursive=True)]
        memory = sum(one.memory_full_info().pss for one in family)
    except psutil.Error:
        memory = 0
    return PartStatus(**{**asdict(row), "rss_bytes": memory})
