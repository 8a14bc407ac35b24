"""Time and identifiers as things that are handed in, so that tests decide what time it is and which id comes next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID


class Clock(Protocol):
    """Time as a service sees it."""

    def now(self) -> datetime:
        """The wall clock: aware, UTC. May jump; never compare it across machines."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary point, never going back: for durations within this process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits; may be cancelled."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class FakeClock:
    """A clock that moves only when `advance` is called; sleepers whose time has come wake then, in order."""

    def __init__(self, start: datetime | None = None) -> None:
        self._now = start or datetime(2026, 1, 1, tzinfo=UTC)
        self._monotonic = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), future))
        await future

    def advance(self, seconds: float) -> None:
        """Moves both clocks on. Sleepers run when the caller next awaits. Not thread-safe."""
        if seconds < 0:
            raise ValueError("time does not go back")
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    @property
    def sleeping(self) -> int:
        """How many callers of `sleep` are waiting: lets a test wait until the code under test has reached its sleep."""
        return sum(not future.done() for _, _, future in self._sleepers)


class Ids(Protocol):
    """Where new identifiers come from."""

    def uuid7(self) -> UUID:
        """A UUID of version 7 (RFC 9562), greater than every one given before by this object."""
        ...

    def hex32(self) -> str:
        """32 lower-case hexadecimal digits that nobody can guess."""
        ...


class SystemIds:
    """Random identifiers; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def uuid7(self) -> UUID:
        # RFC 9562, 6.2, method 3: the 12 bits after the milliseconds hold a fraction of the millisecond (here in 1/4096).
        milliseconds, rest = divmod(time.time_ns(), 1_000_000)
        stamp = milliseconds << 12 | rest * 4096 // 1_000_000
        with self._lock:
            stamp = self._last = max(stamp, self._last + 1)
        return _uuid7(stamp, secrets.randbits(62))

    def hex32(self) -> str:
        return secrets.token_hex(16)


class SequentialIds:
    """Identifiers that count from one, for tests."""

    def __init__(self) -> None:
        self._count = itertools.count(1)

    def uuid7(self) -> UUID:
        return _uuid7(0, next(self._count))

    def hex32(self) -> str:
        return f"{next(self._count):032x}"


def _uuid7(stamp: int, random: int) -> UUID:
    """Puts 60 bits of time and 62 bits of whatever into the layout of RFC 9562, 5.7."""
    milliseconds, fraction = stamp >> 12, stamp & 0xFFF
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | random)
