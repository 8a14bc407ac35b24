"""Components in the background, their backoff, and the watchdog."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from eventing.background import Background, Backoff
from eventing.broker import Partition
from eventing.faults import is_conflict, passes
from eventing.watchdog import Stuck, Watchdog
from servicekit.clock import FakeClock
from servicekit.errors import Conflict, Unavailable
from sqlalchemy import exc as sa_exc

P, Q = Partition("t", 0), Partition("t", 1)


class Worker(Background):
    def __init__(self, work, **options):
        super().__init__("worker", **options)
        self.work = work
        self.cancelled = False

    async def _run(self):
        try:
            await self.work(self)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def until_stopped(worker):
    await worker._stopping.wait()


def test_a_backoff_doubles_to_its_limit_and_starts_again():
    backoff = Backoff(first_s=1.0, most_s=5.0)
    waits = [backoff.next() for _ in range(5)]
    for wait, middle in zip(waits, [1, 2, 4, 5, 5], strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle
    backoff.reset()
    assert backoff.next() <= 1.25


async def test_a_component_runs_until_it_is_stopped():
    worker = Worker(until_stopped)
    with pytest.raises(RuntimeError, match="was not started"):
        await worker.wait()
    await worker.start()
    with pytest.raises(RuntimeError, match="started before"):
        await worker.start()
    waiting = asyncio.create_task(worker.wait())
    assert worker.ready() is None
    await worker.stop()
    await worker.stop()
    await waiting
    assert not worker.cancelled


async def test_a_component_that_fails_says_why():
    async def fail(worker):
        raise ZeroDivisionError("a bug")

    worker = Worker(fail)
    await worker.start()
    with pytest.raises(ZeroDivisionError):
        await worker.wait()
    assert worker.ready() == "worker failed: a bug"
    await worker.stop()


async def test_a_component_that_does_not_stop_is_cancelled():
    async def hang(worker):
        await asyncio.Event().wait()

    worker = Worker(hang, stop_timeout_s=0.05)
    await worker.start()
    await asyncio.sleep(0)
    await worker.stop()
    assert worker.cancelled
    await worker.wait()


async def test_stopping_what_never_started_is_fine():
    await Worker(until_stopped).stop()


async def test_a_pause_ends_when_stopped():
    async def pause(worker):
        await worker._pause(0.01)
        await worker._pause(3600)

    worker = Worker(pause)
    await worker.start()
    async with asyncio.timeout(5):
        await worker.stop()
        await worker.wait()
    assert not worker.cancelled


def test_the_watchdog_bites_where_records_wait_and_nothing_moves():
    clock = FakeClock()
    watchdog = Watchdog(clock, 60.0)
    watchdog.look({P: 5, Q: 7}, {P: 9, Q: 7})
    clock.advance(61)
    with pytest.raises(Stuck, match=r"t\[0\] stands at 5 since 61 s, and its end is 9"):
        watchdog.look({P: 5, Q: 7}, {P: 9, Q: 7})


@pytest.mark.parametrize("what", ["moved", "no lag", "excused", "all excused", "patient", "given away"])
def test_the_watchdog_knows_when_there_is_no_harm(what):
    clock = FakeClock()
    watchdog = Watchdog(clock, 60.0)
    watchdog.look({P: 5}, {P: 5 if what == "no lag" else 9})
    clock.advance(40)
    if what == "excused":
        watchdog.excuse(P)
    if what == "all excused":
        watchdog.excuse()
    if what == "given away":
        watchdog.look({}, {})
    watchdog.look({P: 6 if what == "moved" else 5}, {P: 5 if what == "no lag" else 9})
    clock.advance(40)
    watchdog.look({P: 6 if what == "moved" else 5}, {P: 9}, patience=5.0 if what == "patient" else 1.0)


def test_the_excuse_of_one_partition_is_none_for_another():
    clock = FakeClock()
    watchdog = Watchdog(clock, 60.0)
    watchdog.look({P: 5, Q: 5}, {P: 9, Q: 9})
    clock.advance(61)
    watchdog.excuse(P)
    with pytest.raises(Stuck, match=r"t\[1\]"):
        watchdog.look({P: 5, Q: 5}, {P: 9, Q: 9})


def test_the_watchdog_counts_from_when_there_was_something_to_read():
    clock = FakeClock()
    watchdog = Watchdog(clock, 60.0)
    watchdog.look({P: 5}, {P: 5})
    clock.advance(3600)
    watchdog.look({P: 5}, {P: 5})
    watchdog.look({P: 5}, {P: 6})
    clock.advance(61)
    with pytest.raises(Stuck):
        watchdog.look({P: 5}, {P: 6})


def error(state):
    class Original(Exception):
        sqlstate = state

    return sa_exc.DBAPIError("statement", {}, Original())


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (Unavailable("away"), True),
        (asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), True),
        (ConnectionRefusedError(), True),
        (error("57P03"), True),
        (error("40P01"), True),
        (error("23505"), False),
        (Conflict("no"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_which_errors_pass(exc, expected):
    assert passes(exc) is expected


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (error("40P01"), True),
        (error("40001"), True),
        (asyncpg.DeadlockDetectedError("x"), True),
        (error("57P03"), False),
        (ValueError(), False),
    ],
)
def test_which_errors_are_conflicts(exc, expected):
    assert is_conflict(exc) is expected
