"""The process behind `headrace up`: starts the parts of a stack as soon as what they need is ready, and starts again what ends.

`python -m localstack.supervisor STATE_DIR [--servers-only]`. Its children die with it, so that kill -9 leaves nothing half alive.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from localstack import layout, process, schemas
from localstack.errors import StackError
from localstack.layout import SETUP, Part, Paths, Stack
from localstack.process import Child
from localstack.server import wait_ready
from localstack.services import SERVICES, inherited

_LOOK_S = 5.0
"""How often the readiness of a running part is looked at again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STEADY_S = 0.2, 10.0, 60.0

_log = logging.getLogger("localstack.supervisor")


@dataclass
class PartState:
    """What `stack.json` says of one part. `state`: waiting, starting, ready, not ready, failed, stopped."""

    name: str
    port: int | None = None
    state: str = "waiting"
    pid: int | None = None
    started: int | None = None
    restarts: int = 0
    detail: str = ""


class Supervisor:
    """Owns the children of one stack from `run` to its end. One thread per part; they share only the states, under a lock."""

    def __init__(self, stack: Stack, *, with_services: bool) -> None:
        self._stack = stack
        self._with_services = with_services
        self._stopping = threading.Event()
        # Readable for ever once stopping: every thread that waits for a child also waits for this.
        self._stop_read, self._stop_write = os.pipe()
        self._lock = threading.Lock()
        self._states = {part.server.name: PartState(part.server.name, part.server.port) for part in stack.parts}
        self._ready = {name: threading.Event() for name in self._states}
        if with_services:
            self._states[SETUP] = PartState(SETUP)
            self._ready[SETUP] = threading.Event()

    def run(self) -> None:
        """Blocks until told to stop by SIGTERM or SIGINT, then stops everything in order and returns."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        left = process.sweep(self._stack.mark, self._stack.paths.recorded())
        if left:
            _log.warning("killed %d processes that an earlier supervisor left", left)
        self._write()
        threads = [threading.Thread(target=self._guarded, args=(part,), name=part.server.name) for part in self._stack.parts]
        if self._with_services:
            threads.append(threading.Thread(target=self._set_up, name=SETUP))
        for thread in threads:
            thread.start()
        while not self._stopping.wait(_LOOK_S):
            for log in self._stack.paths.logs.glob("*.log"):
                process.trim_log(log)
        for thread in threads:
            thread.join()
        self._stop_all()

    def stop(self) -> None:
        """Asks `run` to end; returns at once."""
        self._stopping.set()
        if self._stop_write >= 0:
            os.close(self._stop_write)
            self._stop_write = -1

    def _guarded(self, part: Part) -> None:
        try:
            self._tend(part)
        except Exception:
            _log.exception("bug while tending %s", part.server.name)
            self._change(part.server.name, state="failed", detail="the supervisor failed here, see its log")

    def _tend(self, part: Part) -> None:
        server, name = part.server, part.server.name
        if not self._await(part.needs):
            return
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            began = time.monotonic()
            self._change(name, state="starting")
            try:
                server.start()
                self._adopt(name, server.child)
                wait_ready(server, part.ready_s, self._stopping.is_set)
            except StackError as error:
                if self._stopping.is_set():
                    return
                reason = str(error)
                server.stop()
            else:
                _log.info("%s is ready after %.1f s", name, time.monotonic() - began)
                self._change(name, state="ready", detail="")
                self._ready[name].set()
                reason = self._watch(part)
                if self._stopping.is_set():
                    return
            _log.warning("%s: %s", name, reason)
            if time.monotonic() - began > _STEADY_S:
                pause_s = _FIRST_PAUSE_S
            self._change(name, state="failed", detail=reason, pid=None, started=None, restarts=self._states[name].restarts + 1)
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _watch(self, part: Part) -> str:
        """Blocks while the part runs and nobody stops us; then says how it ended."""
        server = part.server
        child = server.child
        if child is None:
            return "it was never started"
        descriptor = os.pidfd_open(child.pid)
        try:
            while True:
                readable, _, _ = select.select([descriptor, self._stop_read], [], [], _LOOK_S)
                if descriptor in readable:
                    code = child.exit_code()
                    child.kill()  # what it had forked goes with it
                    return f"ended with {code}; its log ends: {child.last_words(3)}"
                if readable:
                    return "stopping"
                reason = server.ready()
                self._change(server.name, state="ready" if reason is None else "not ready", detail=reason or "")
        finally:
            os.close(descriptor)

    def _set_up(self) -> None:
        """Roles, schemas and topics; tried again until it works."""
        stack = self._stack
        if not self._await((stack.postgres.name, stack.kafka.name)):
            return
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            self._change(SETUP, state="starting")
            try:
                self._set_up_once()
            except StackError as error:
                if self._stopping.is_set():
                    return
                _log.warning("%s: %s", SETUP, error)
                self._change(SETUP, state="failed", detail=str(error), restarts=self._states[SETUP].restarts + 1)
                self._stopping.wait(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                self._change(SETUP, state="ready", detail="")
                self._ready[SETUP].set()
                return

    def _set_up_once(self) -> None:
        stack = self._stack
        schemas.make_roles(stack.postgres, stack.passwords)
        fingerprint = schemas.fingerprint(stack.kafka.cluster_id)
        if schemas.is_done(stack.postgres, fingerprint):
            return
        env = {**inherited(), **schemas.targets(stack.addresses.database, stack.addresses.kafka)}
        child = process.spawn(SETUP, schemas.command(), log=stack.paths.log(SETUP), env=env, mark=stack.mark, cwd=stack.paths.state)
        descriptor = os.pidfd_open(child.pid)
        try:
            select.select([descriptor, self._stop_read], [], [])
        finally:
            os.close(descriptor)
        child.stop(5)
        if child.exit_code() != 0:
            raise StackError(f"migrations or topics failed; the log ends:\n{child.last_words()}")
        schemas.record_done(stack.postgres, fingerprint)

    def _await(self, needs: Sequence[str]) -> bool:
        """Blocks until the parts named are ready; False when we stop first."""
        for need in needs:
            while not self._ready[need].wait(0.1):
                if self._stopping.is_set():
                    return False
        return not self._stopping.is_set()

    def _stop_all(self) -> None:
        """Services first, so that they can hand back their work while the servers are there."""
        service_names = {service.name for service in SERVICES}
        services = [part.server for part in self._stack.parts if part.server.name in service_names]
        servers = [part.server for part in self._stack.parts if part.server.name not in service_names]
        for group in (services, servers):
            with ThreadPoolExecutor(max_workers=max(1, len(group))) as pool:
                list(pool.map(lambda server: server.stop(), group))
        process.sweep(self._stack.mark)
        with self._lock:
            for state in self._states.values():
                state.state, state.pid, state.started, state.detail = "stopped", None, None, ""
        self._write(running=False)

    def _adopt(self, name: str, child: Child | None) -> None:
        if child is not None:
            self._change(name, pid=child.pid, started=child.identity.started)

    def _change(self, name: str, **changes: object) -> None:
        with self._lock:
            state = self._states[name]
            if all(getattr(state, field) == value for field, value in changes.items()):
                return
            for field, value in changes.items():
                setattr(state, field, value)
        self._write()

    def _write(self, *, running: bool = True) -> None:
        me = process.identify(os.getpid())
        content: dict[str, object] = {
            "stack_id": self._stack.mark,
            "supervisor": {"pid": me.pid, "started": me.started} if me and running else None,
            "with_services": self._with_services,
            "gateway_url": self._stack.gateway_url,
            "otlp_url": self._stack.addresses.otlp,
        }
        file = self._stack.paths.stack
        with self._lock:
            content["parts"] = [asdict(state) for state in self._states.values()]
            draft = file.with_suffix(".new")
            draft.write_text(json.dumps(content, indent=1) + "\n")
            draft.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m localstack.supervisor")
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--servers-only", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    state = arguments.state_dir.resolve()
    with Paths(state).lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another supervisor runs in {state}") from None
        with_services = not arguments.servers_only
        Supervisor(layout.make(state, with_services=with_services), with_services=with_services).run()


if __name__ == "__main__":
    main()
