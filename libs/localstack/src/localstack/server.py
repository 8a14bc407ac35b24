"""The one shape of every local server, so that the supervisor and the tests treat them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from localstack.cache import Progress
from localstack.errors import NotReady
from localstack.process import Child


class Server(Protocol):
    """A real server on this machine. All methods block; all may be repeated."""

    child: Child | None
    """The running process, None before the first start."""

    @property
    def name(self) -> str: ...

    @property
    def port(self) -> int: ...

    def prepare(self, progress: Progress) -> None:
        """Downloads what is missing and lays out the data folder. May take minutes the first time."""

    def start(self) -> None:
        """Starts the process and returns at once. Data of an earlier start is kept."""

    def ready(self) -> str | None:
        """None when the server answers and has proved to be ours, else the reason. Takes at most a few seconds."""

    def stop(self) -> None:
        """Ends the process and what it left behind, keeping its data."""


def wait_ready(server: Server, timeout_s: float = 60, given_up: Callable[[], bool] = lambda: False) -> None:
    """Blocks until a started server is ready. Raises NotReady with its last reason, or with the end of its log when it ended.

    `given_up` is asked between the looks: when it says so, NotReady is raised at once.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.03
    while True:
        if given_up():
            raise NotReady(f"{server.name} is not waited for any longer")
        child = server.child
        if child is None:
            raise NotReady(f"{server.name} was not started")
        reason = server.ready()
        if reason is None:
            return
        code = child.exit_code()
        if code is not None:
            raise NotReady(f"{server.name} ended with {code} while it started; its log ends:\n{child.last_words()}")
        if time.monotonic() > deadline:
            raise NotReady(f"{server.name} was not ready after {timeout_s:.0f} s: {reason}; its log ends:\n{child.last_words()}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 0.25)


def run(server: Server, progress: Progress, timeout_s: float = 60) -> None:
    """Prepares, starts and waits."""
    server.prepare(progress)
    server.start()
    wait_ready(server, timeout_s)


def crash(server: Server) -> None:
    """SIGKILL to the server and all it forked, and waits for its end. `server.start()` brings it back."""
    if server.child is not None:
        server.child.kill()


def restart(server: Server, timeout_s: float = 60) -> None:
    """Starts a stopped or crashed server again and waits until it is ready. Raises NotReady."""
    server.start()
    wait_ready(server, timeout_s)
