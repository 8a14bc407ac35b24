"""The fake clock wakes sleepers when it is told to; ids are version 7 and only ever grow."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from servicekit.clock import FakeClock, SequentialIds, SystemClock, SystemIds


async def test_sleepers_wake_in_the_order_of_their_time() -> None:
    clock = FakeClock()
    woken: list[int] = []

    async def sleeper(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (3, 1, 2)]
    await asyncio.sleep(0)
    assert clock.sleeping == 3
    clock.advance(0.5)
    await asyncio.sleep(0)
    assert woken == []
    clock.advance(1.5)
    await asyncio.wait(tasks[1:], timeout=5)
    assert woken == [1, 2]
    clock.advance(1)
    await asyncio.wait_for(tasks[0], 5)
    assert woken == [1, 2, 3]
    assert clock.sleeping == 0


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.sleeping == 0
    clock.advance(2)


def test_both_fake_times_move_together() -> None:
    start = datetime(2026, 5, 1, tzinfo=UTC)
    clock = FakeClock(start)
    before = clock.monotonic()
    clock.advance(90)
    assert clock.now() == start + timedelta(seconds=90)
    assert clock.monotonic() - before == 90
    with pytest.raises(ValueError):
        clock.advance(-1)


async def test_the_system_clock() -> None:
    clock = SystemClock()
    assert clock.now().tzinfo is UTC
    before = clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= before


def test_uuid7_grows_and_has_the_layout_of_the_rfc() -> None:
    ids = SystemIds()
    made = [ids.uuid7() for _ in range(20_000)]
    assert made == sorted(set(made))
    assert all(one.version == 7 and one.variant == "specified in RFC 4122" for one in made)
    stamped = datetime.fromtimestamp((made[0].int >> 80) / 1000, UTC)
    assert abs(stamped - datetime.now(UTC)) < timedelta(minutes=1)
    assert len(ids.hex32()) == 32


def test_sequential_ids_repeat_from_test_to_test() -> None:
    one, two = SequentialIds(), SequentialIds()
    assert [one.uuid7(), one.hex32(), one.uuid7()] == [two.uuid7(), two.hex32(), two.uuid7()]
    assert one.uuid7().version == 7
