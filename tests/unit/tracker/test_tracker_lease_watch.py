"""The lease watch lets holders renew before it judges them, and waits while the database is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from servicekit.errors import Unavailable
from tracker.entrypoints.leases import LeaseWatch


class FakeTracker:
    """Counts looks; `away` pings fail before one succeeds, `broken` is raised by a look."""

    def __init__(self, away: int = 0, broken: BaseException | None = None) -> None:
        self.away, self.broken = away, broken
        self.calls: list[str] = []
        self.looked = asyncio.Event()
        self.pinged = asyncio.Event()

    async def ping(self) -> None:
        self.calls.append("ping")
        if self.away:
            self.away -= 1
            raise Unavailable("the database is away")
        self.pinged.set()

    async def fail_expired(self, limit: int) -> int:
        self.calls.append("look")
        if self.broken is not None:
            broken, self.broken = self.broken, None
            raise broken
        self.looked.set()
        return 0


async def watch(tracker: FakeTracker, until: asyncio.Event, grace_s: float) -> LeaseWatch:
    made = LeaseWatch(tracker, 0.01, grace_s)  # type: ignore[arg-type]  # as much of it as is used
    await made.start()
    async with asyncio.timeout(30):
        await until.wait()
    return made


async def test_nobody_is_judged_before_the_grace_is_over() -> None:
    tracker = FakeTracker(away=2)
    made = await watch(tracker, tracker.pinged, grace_s=3_600)
    await made.stop()
    assert tracker.calls == ["ping", "ping", "ping"]


async def test_after_the_database_was_away_the_grace_begins_anew() -> None:
    tracker = FakeTracker(broken=Unavailable("gone"))
    made = await watch(tracker, tracker.looked, grace_s=0)
    await made.stop()
    assert tracker.calls[:4] == ["ping", "look", "ping", "look"]


async def test_a_bug_stops_the_process_loudly() -> None:
    tracker: Any = FakeTracker(broken=ZeroDivisionError())
    made = LeaseWatch(tracker, 0.01, 0)
    await made.start()
    with pytest.raises(ZeroDivisionError):
        await made.wait()
