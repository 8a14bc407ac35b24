"""What gateways report reaches the rollout that it is about, whole, and is judged by what is known last."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

from deployer.domain.inputs import Input
from deployer.domain.policy import parse
from deployer.domain.rollout import Rollout, State
from deployer.domain.version import Version
from deployer.domain.windows import Counts, Merged, ShadowCounts
from deployer.handlers import Deployer
from deployer.judging import ArmReport, EndpointReport, Judge, Report
from deployer.ports import RolloutRecord, Store
from servicekit.clock import FakeClock

POLICY = parse({"endpoint": "e", "rollout": {"steps": [{"weight": "50%", "requests": 40}]}})
STEPPING = Rollout("r1", "e", "v2-g2", POLICY, State.STEPPING, "v1-g1", revision=3)
ARMS = {name: ArmReport(Counts(10), ShadowCounts(compared=10)) for name in ("v1-g1", "v2-g2")}


class Told:
    """Store and handlers of one rollout: what is told is noted down, and changes nothing but what a test changes."""

    def __init__(self, rollout: Rollout) -> None:
        self.record = RolloutRecord(rollout, cast(Version, None))
        self.windows: list[Merged] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def live(self) -> list[RolloutRecord]:
        found = [self.record]
        await self.reads.wait()
        return found

    async def tell(self, rollout_id: str, given: Input, epoch: int | None = None) -> RolloutRecord:
        assert (rollout_id, epoch) == ("r1", 1)
        if isinstance(given, Merged):
            self.windows.append(given)
        return self.record


async def judge_of(told: Told) -> Judge:
    judge = Judge(cast(Store, told), cast(Deployer, told), FakeClock(datetime(2026, 1, 1, tzinfo=UTC)))
    await judge.lead(1)
    return judge


def report(sequence: int, arms: Any = ARMS, revision: int = 3) -> Report:
    return Report("g", "boot", sequence, 1.0, (EndpointReport("e", revision, "r1", arms, False),), False)


async def test_a_window_that_was_lost_before_a_message_without_counts_is_a_gap() -> None:
    told = Told(STEPPING)
    judge = await judge_of(told)
    await judge.heard(report(1))
    await judge.heard(report(2))
    # Number 3 is lost; number 4 says only which revision is served.
    await judge.heard(report(4, arms={}))
    await judge.heard(report(5))
    await judge.heard(report(6))
    assert [window.gap for window in told.windows] == [True, False, True, False]


async def test_what_was_decided_while_rollouts_were_read_is_not_forgotten() -> None:
    told = Told(replace(STEPPING, state=State.SHADOWING, revision=2))
    judge = await judge_of(told)
    told.reads.clear()
    reading = asyncio.create_task(judge.refresh())
    await asyncio.sleep(0)
    # The read has begun. Now a window moves the rollout into its step, and the read ends.
    told.record = RolloutRecord(STEPPING, cast(Version, None), decisions=1)
    await judge.heard(report(1, revision=2))
    told.reads.set()
    await reading
    told.windows.clear()
    await judge.heard(report(2))
    (window,) = told.windows
    assert (window.revision, window.canary.units) == (3, 10)
