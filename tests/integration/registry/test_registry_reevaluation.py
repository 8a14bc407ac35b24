"""A version that failed when it was judged again can be judged once more: through the real stores of registry and evaluator."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.registry.v1 import service_pb2
from evaluator import bootstrap as evaluator_bootstrap
from evaluator.adapters.store import SqlStore
from evaluator.adapters.tables import SCHEMA
from evaluator.domain.candidate import Blob, Candidate, Model, Source
from evaluator.domain.delivery import Deliveries
from evaluator.domain.evaluation import Champion, Evaluation, Journey, Status
from evaluator.domain.policy import Against, Holdout, Policy
from evaluator.entrypoints import translate
from evaluator.entrypoints.translate import EventEncoder
from evaluator.handlers import Intake, Outcome
from eventing import schema as eventing_schema
from eventing import topics
from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from jobs import JobQueue
from servicekit import db, migrate
from servicekit.access import hash_secret
from servicekit.clock import SystemClock, SystemIds

POLICY = Policy("flight-delays", Holdout("holdout", 1), Against("auc"))


class Judge:
    """The evaluator without its sandbox: what it records, decides and tells is its own; the outcome is the test's."""

    def __init__(self, registry: Any, engine: Any) -> None:
        clock, ids = SystemClock(), SystemIds()
        self._registry = registry
        self._encoder = EventEncoder(clock, ids)
        self._told: list[Envelope] = []
        self._store = SqlStore(engine, Outbox(eventing_schema.tables(SCHEMA)), JobQueue(engine, SCHEMA, clock, ids), self._encode)
        self._intake = Intake(Deliveries(), clock, ids)

    def _encode(self, event: Any, sequence: int) -> Envelope:
        self._told.append(self._encoder(event, sequence))
        return self._told[-1]

    async def begins(self, evaluation_id: str, run: str) -> None:
        """A candidate of a run is to be evaluated."""
        model = Model("model", "onnx", Blob(hash_secret(run), 9, f"blobs/{run}"))
        journey = Journey(f"journey-{run}", "flight-delays", 1, run)
        candidate = Candidate(run, model, "ann", Source(), ())
        new = Evaluation(evaluation_id, journey, "flights", Status.PENDING, datetime.now(UTC), candidate, POLICY)
        async with self._store.transaction() as work:
            assert await work.evaluations.add(new)

    async def asked(self, payload: bytes) -> Outcome:
        """Does what the registry's event asks for."""
        async with self._store.transaction() as work:
            return await self._intake.reevaluation_requested(work, translate.reevaluation_requested(payload))

    async def decides(self, run: str, champion: int, reason: str) -> str:
        """Ends the one open evaluation of a run; its id."""
        async with self._store.transaction() as work:
            (found,) = [one for one in await work.evaluations.page("", run, "", 10) if one.open]
            against = Champion(champion, Blob(hash_secret(f"r{champion}"), 9, "")) if champion else None
            decided, event = found.decided(replace(found.blank_judgement(), champion=against), reason, datetime.now(UTC))
            await work.evaluations.save(decided)
            await work.emit(event)
        told = self._told[-1]
        self._registry.publish(topics.EVALS, told.type, "flights", told.payload)
        return found.evaluation_id


async def test_what_failed_is_judged_again_when_the_champion_has_changed_and_somebody_promotes_it(registry: Any) -> None:
    await migrate.upgrade(registry.settings.database_url, SCHEMA, evaluator_bootstrap.MIGRATIONS)
    engine = db.create_engine(registry.settings.database_url)
    try:
        judge = Judge(registry, engine)
        await registry.apply()
        await registry.live("r1", 1)

        await judge.begins("e-1", "r2")
        await judge.decides("r2", 0, "")  # before there was a champion
        await registry.wait_version(2, "Staging", "evaluated again")
        requests = await registry.wait_told("model.reevaluation_requested", 1)
        assert await judge.asked(requests[-1].payload) is Outcome.RECORDED
        assert await judge.asked(requests[-1].payload) is Outcome.KNOWN, "an event that comes twice is one request"
        await judge.decides("r2", 1, "auc fell")
        await registry.wait_version(2, "Staging", "auc fell")

        await registry.live("r3", 3, champion=1)
        promote = service_pb2.PromoteModelRequest(model="flights", version=2)
        with registry.user("ed", "editor"):
            await registry.stub.PromoteModel(promote)
        requests = await registry.wait_told("model.reevaluation_requested", 2)
        assert await judge.asked(requests[-1].payload) is Outcome.RECORDED
        await judge.decides("r2", 3, "auc fell further")
        await registry.wait_version(2, "Staging", "auc fell further")

        # Version 1 is back: the version had passed with none, and failed against this one.
        reverted = deployer_pb.DeployReverted(rollout=await registry.rollout(3), to_version=1, reason="pager")
        registry.deploys("deploy.reverted", reverted)
        await registry.wait_version(1, "Production")
        with registry.user("ed", "editor"):
            await registry.stub.PromoteModel(promote)
        requests = await registry.wait_told("model.reevaluation_requested", 3)
        assert await judge.asked(requests[-1].payload) is Outcome.RECORDED
        last = await judge.decides("r2", 1, "")
        assert (await registry.wait_version(2, "Staging", "rolling out")).evaluation_id == last
    finally:
        await engine.dispose()
