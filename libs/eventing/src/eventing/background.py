"""A component whose work is one background task: started, watched, stopped within a time. Base of relay, consumer and readers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from abc import ABC, abstractmethod

_log = logging.getLogger(__name__)

_CANCELLED_S = 6.0
"""How long cancelled work may take to close its connections."""


class Backoff:
    """Seconds to wait before trying again: doubling from `first_s` to `most_s`, with a quarter of jitter either way."""

    def __init__(self, first_s: float = 0.1, most_s: float = 10.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def next(self) -> float:
        """The wait before the next attempt."""
        wait, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return wait * random.uniform(0.75, 1.25)  # noqa: S311 - spreads retries, guards nothing

    def reset(self) -> None:
        """After a success."""
        self._next_s = self._first_s


class Background(ABC):
    """Runs `_run` until `stop`. A subclass returns from `_run` soon after `self._stopping` is set, and raises to fail loudly."""

    def __init__(self, name: str, stop_timeout_s: float = 3.0) -> None:
        """`stop_timeout_s`: how long `stop` lets running work end before it cancels it."""
        self._name = name
        self._stop_timeout_s = stop_timeout_s
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @abstractmethod
    async def _run(self) -> None:
        """The work."""

    async def start(self) -> None:
        """Starts working in the background; returns at once, also when servers are away."""
        if self._task is not None:
            raise RuntimeError(f"{self._name} was started before")
        self._task = asyncio.create_task(self._run(), name=self._name)
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Stops: lets running work end, then cancels it. Returns within a few seconds, also when servers are away. May be repeated."""
        self._stopping.set()
        self._wake()
        if self._task is None or self._task.done():
            return
        await asyncio.wait({self._task}, timeout=self._stop_timeout_s)
        if not self._task.done():
            _log.warning("%s does not stop: cancelled", self._name)
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CANCELLED_S)

    async def wait(self) -> None:
        """Returns when the component has stopped; raises what made it fail."""
        if self._task is None:
            raise RuntimeError(f"{self._name} was not started")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self._task)

    def ready(self) -> str | None:
        """None when working, else why not."""
        if self._failure is not None:
            return f"{self._name} failed: {self._failure}"
        return None

    def _wake(self) -> None:  # noqa: B027 - most need none
        """Called by `stop`, for a subclass that waits on something else than `_pause`."""

    async def _pause(self, seconds: float) -> None:
        """Waits, less when stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            _log.critical("%s stopped: %s", self._name, failure, exc_info=failure)
