"""A deployer that dies between any two of its steps leaves nothing half-done: the next one goes on from what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from deployer import bootstrap
from deployer.adapters.memory_runtime import MemoryRuntime
from deployer.adapters.store import SqlStore, SqlUnitOfWork
from deployer.domain.signature import Rows, Signature
from eventing import topics


class Fuse:
    """Blows at one point: nobody gets beyond it, or any other, until it is armed again. So ends a process that was killed there."""

    def __init__(self) -> None:
        self.point = ""
        self.blown = asyncio.Event()

    def arm(self, point: str) -> None:
        self.point = point
        self.blown = asyncio.Event()

    async def pass_by(self, point: str) -> None:
        if point == self.point:
            self.blown.set()
        if self.blown.is_set():
            await asyncio.Event().wait()


class FusedWork(SqlUnitOfWork):
    """Remembers to which state a transaction moves its rollout."""

    target = ""

    async def log(self, rollout_id: str, source: str, target: str, reason: str, evidence: dict[str, Any]) -> None:
        if reason != "window":
            self.target = "alarm" if reason.startswith("alarm: ") else target.partition("(")[0]
        await super().log(rollout_id, source, target, reason, evidence)


class FusedStore(SqlStore):
    fuse = Fuse()

    def on(self, conn: Any) -> FusedWork:
        return FusedWork(conn, self._outbox, self._jobs, self._encode_event, self._encode_route)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        await self.fuse.pass_by("transaction")
        async with super().transaction() as work:
            assert isinstance(work, FusedWork)
            yield work
            await self.fuse.pass_by(f"before {work.target}")
        await self.fuse.pass_by(f"after {work.target}")


class FusedRuntime(MemoryRuntime):
    fuse = Fuse()

    async def load(self, model: str, content: bytes, signature: Signature) -> None:
        await self.fuse.pass_by("before load")
        await super().load(model, content, signature)
        await self.fuse.pass_by("after load")

    async def unload(self, model: str) -> None:
        await self.fuse.pass_by("before unload")
        await super().unload(model)
        await self.fuse.pass_by("after unload")

    async def infer(self, model: str, inputs: Rows, signature: Signature) -> Rows:
        await self.fuse.pass_by("before infer")
        return await super().infer(model, inputs, signature)


@pytest.fixture
def fuse(stand: Any, monkeypatch: pytest.MonkeyPatch) -> Fuse:
    made = Fuse()
    monkeypatch.setattr(FusedStore, "fuse", made)
    monkeypatch.setattr(FusedRuntime, "fuse", made)
    monkeypatch.setattr(bootstrap, "SqlStore", FusedStore)
    monkeypatch.setattr(bootstrap, "LEASE_S", 1.5)
    stand.runtime = FusedRuntime(stand.runtime.answer)
    return made


async def crash_at(stand: Any, fuse: Fuse, *points: str, cause: Callable[[], Any] | None = None) -> None:
    """Let the deployer die at each point in turn, and start another each time. `cause` leads to the first point."""
    for number, point in enumerate(points):
        fuse.arm(point)
        if number:
            await stand.start()
        elif cause is not None:
            await cause()
        try:
            async with asyncio.timeout(30):
                await fuse.blown.wait()
        except TimeoutError:
            raise AssertionError(f"nobody came by at {point!r}") from None
        await stand.crash(stand.running[0])
    fuse.arm("nowhere")
    await stand.start()


def check_ledger(stand: Any) -> None:
    """Nothing was told twice, left out or told in another order, and every route sums up."""
    for topic in (topics.DEPLOYS, topics.ROUTES):
        sequences = stand.sequences_of(topic)
        assert sorted(set(sequences)) == list(range(1, max(sequences) + 1))


async def test_a_rollout_survives_crashes_at_every_step_and_completes_once(stand: Any, fuse: Fuse) -> None:
    await stand.start()
    gateway = await stand.live()
    await crash_at(
        stand,
        fuse,
        "before preparing",
        "after preparing",
        "before load",
        "after load",
        "before warming",
        "after warming",
        "before infer",
        "before shadowing",
        "after shadowing",
        "before stepping",
        "after stepping",
        "before completing",
        "after completing",
        "before completed",
        "after completed",
        cause=lambda: stand.promote(2),
    )
    await stand.ended(2, "deploy.completed")
    assert stand.story(2) == ["deploy.canary", "deploy.advanced", "deploy.completed"]
    assert gateway.weights() == {2: 10_000}
    check_ledger(stand)
    # What half-done loads left behind is taken down; the version before is kept.
    await stand.eventually(lambda: len(stand.runtime.loaded) == 2, "the models of earlier attempts to be unloaded")
    assert {model.runtime_model for model in gateway.route().arms} <= set(stand.runtime.loaded)


async def test_a_roll_back_survives_crashes_at_every_step_and_is_told_once(stand: Any, fuse: Fuse) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.bad[2] = 0.9
    await crash_at(
        stand,
        fuse,
        "before aborting",
        "after aborting",
        "before rolled_back",
        "after rolled_back",
        "before unload",
        "after unload",
        cause=lambda: stand.promote(2),
    )
    await stand.eventually(lambda: len(stand.runtime.loaded) == 1, "the canary to be unloaded")
    assert stand.story(2) == ["deploy.canary", "deploy.rolled_back"]
    assert gateway.weights() == {1: 10_000}
    check_ledger(stand)


async def test_a_verdict_that_is_out_of_date_survives_crashes_and_is_told_once(stand: Any, fuse: Fuse) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    await stand.promote(3)
    await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "waiting"), "version 3 to wait")
    await stand.crash(stand.running[0])
    await stand.start()
    gateway.per_window = 40
    await crash_at(stand, fuse, "before completed", "after completed", "before superseded", "after superseded")
    assert (await stand.ended(3, "deploy.superseded")).by_version == 2
    await crash_at(stand, fuse, "before preparing", "after preparing", cause=lambda: stand.promote(3))
    await stand.ended(3, "deploy.completed")
    assert stand.story(3) == ["deploy.superseded", "deploy.canary", "deploy.advanced", "deploy.completed"]
    check_ledger(stand)


async def test_a_watch_survives_crashes_and_raises_its_alarm_once(stand: Any, fuse: Fuse) -> None:
    await stand.start()
    gateway = await stand.live()
    await stand.crash(stand.running[0])
    gateway.bad[1] = 0.95
    await crash_at(stand, fuse, "before alarm", "after alarm", cause=stand.start)
    alarm = await stand.ended(1, "deploy.alarmed")
    assert alarm.rollout.version.version == 1
    await stand.windows(40)
    assert stand.story(1) == ["deploy.completed", "deploy.alarmed"]
    assert gateway.weights() == {1: 10_000}
    check_ledger(stand)


async def test_two_deployers_one_leads_and_the_other_takes_over(stand: Any) -> None:
    first = await stand.start()
    await stand.eventually(lambda: len(stand.leaders()) == 1, "a leader")
    leader = stand.leaders()[0]
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    await stand.ended(2, "deploy.canary")
    assert stand.leaders() == [leader]
    await stand.crash(first)
    await stand.ended(2, "deploy.completed")
    (successor,) = stand.leaders()
    assert successor.epoch > 1
    assert stand.story(2) == ["deploy.canary", "deploy.advanced", "deploy.completed"]
    assert gateway.weights() == {2: 10_000}
    check_ledger(stand)


async def test_a_leader_whose_epoch_is_over_changes_nothing(stand: Any) -> None:
    from deployer.domain.inputs import Abort
    from deployer.ports import Deposed

    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    (leader,) = stand.leaders()
    live = next(record for record in await stand.deployer().rollouts("", 5, "") if record.rollout.state == "shadowing")
    with pytest.raises(Deposed):
        await stand.deployer().tell(live.rollout.id, Abort("from the past"), leader.epoch - 1)
    assert (await stand.deployer().rollout(live.rollout.id)).rollout.state == "shadowing"


async def test_a_runtime_that_restarts_ends_the_rollout_and_gets_its_models_back(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    serving = set(stand.runtime.loaded)
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    stand.runtime.restart()
    ended = await stand.ended(2, "deploy.rolled_back")
    assert "restarted" in ended.reason
    # The same name is loaded again: the route need not change.
    await stand.eventually(lambda: set(stand.runtime.loaded) == serving, "version 1 to be loaded again")
    assert gateway.weights() == {1: 10_000}


async def test_a_rollout_lets_a_runtime_that_restarted_load_first_what_serves(stand: Any) -> None:
    await stand.start()
    await stand.live()
    (serving,) = stand.runtime.loaded
    stand.runtime.away = True
    stand.runtime.restart()
    await stand.promote(2)
    await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "preparing"), "version 2 to be prepared")
    stand.runtime.slow = 8  # loading it again takes some of the reconciler's rounds
    before = len(stand.runtime.calls)
    stand.runtime.away = False
    await stand.ended(2, "deploy.completed")
    loads = [name for kind, name in stand.runtime.calls[before:] if kind == "load"]
    assert loads[:8] == [serving] * 8
    assert "-v2-" in loads[8]


async def test_a_model_that_kills_its_runtime_is_not_tried_again(stand: Any) -> None:
    await stand.start()
    await stand.live()
    serving = set(stand.runtime.loaded)
    stand.runtime.dies_of = stand.content(2).data
    await stand.promote(2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert "went away while it loaded" in ended.reason
    assert [kind for kind, name in stand.runtime.calls if "-v2-" in name and kind == "load"] == ["load"]
    await stand.eventually(lambda: set(stand.runtime.loaded) == serving, "version 1 to be loaded again")


async def test_a_runtime_that_is_away_is_waited_for(stand: Any) -> None:
    await stand.start()
    await stand.live()
    stand.runtime.away = True
    await stand.promote(2)
    preparing = await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "preparing"), "version 2 to be prepared")
    assert preparing.canary.startswith("v2-")
    await stand.windows(20)
    stand.runtime.away = False
    await stand.ended(2, "deploy.completed")


async def test_kafka_away_is_waited_for(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    await stand.ended(2, "deploy.canary")
    stand.broker.available = False
    served = dict(gateway.served)
    await stand.eventually(lambda: gateway.served[1] > served[1] + 1000, "gateways to go on serving")
    stand.broker.available = True
    await stand.ended(2, "deploy.completed")
    check_ledger(stand)


async def test_postgresql_away_is_waited_for(own_postgres: Any, make_stand: Any) -> None:
    from localstack import server as servers

    server = await asyncio.to_thread(own_postgres)
    stand = await make_stand(server.dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    await stand.ended(2, "deploy.canary")
    (leader,) = stand.leaders()
    before = leader.epoch
    await asyncio.to_thread(servers.crash, server)
    served = dict(gateway.served)
    await stand.eventually(lambda: gateway.served[1] > served[1] + 1000, "gateways to go on serving")
    await asyncio.to_thread(servers.restart, server)
    await stand.ended(2, "deploy.completed")
    # The lock was lost with the session, so a new term began.
    assert leader.epoch > before
    check_ledger(stand)


async def test_after_a_restart_of_everything_routes_say_where_the_runtime_is_now(stand: Any) -> None:
    first = await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    serving = {arm.runtime_model for arm in gateway.route().arms if arm.version == 1}
    await stand.stop(first)
    stand.runtime.restart()
    stand.runtime.upstream = "127.0.0.1:2"
    (leader,) = [component for component in await stand.start() if type(component).__name__ == "Leader"]
    # Ready means that what is served is loaded again.
    await stand.eventually(lambda: leader.epoch and leader.ready() is None, "the leader to be ready")
    assert serving <= set(stand.runtime.loaded)
    await stand.ended(2, "deploy.rolled_back")
    await stand.eventually(lambda: {arm.upstream for arm in gateway.route().arms} == {"127.0.0.1:2"}, "routes with the new address")
    gateway.per_window = 40
    await stand.promote(3)
    await stand.ended(3, "deploy.completed")


async def test_a_version_is_still_watched_when_its_route_is_published_with_another_address(stand: Any) -> None:
    first = await stand.start()
    gateway = await stand.live()
    stand.runtime.away = True
    await stand.promote(2)
    await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "preparing"), "version 2 to be prepared")
    await stand.stop(first)
    stand.runtime.upstream = "127.0.0.1:2"
    await stand.start()
    await stand.eventually(lambda: {arm.upstream for arm in gateway.route().arms} == {"127.0.0.1:2"}, "a route with the new address")
    gateway.bad[1] = 0.95
    await stand.ended(1, "deploy.alarmed")
