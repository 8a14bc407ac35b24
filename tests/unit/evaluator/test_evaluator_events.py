"""The handlers of events: what is believed about deliveries that have not been read yet, and what each event is handed to."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.registry.v1 import events_pb2 as registry_pb
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from evaluator.domain.delivery import Deliveries
from evaluator.domain.evaluation import Champion
from evaluator.entrypoints.consumer import Events
from evaluator.handlers import Outcome, Reevaluation
from eventing import topics
from eventing.broker import Partition, Record
from eventing.envelope import Received
from eventing.memory import MemoryBroker
from eventing.readthrough import ReadThrough
from eventing.snapshots import SnapshotReader
from google.protobuf.message import Message
from servicekit.errors import Invalid, Unavailable

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECTION = json.dumps({"experiment": "e", "holdout": {"dataset": "d", "version": 1}, "metric": {"name": "auc"}})


def received(kind: str, message: Message | bytes, *, partition: int = 0, offset: int = 0) -> Received:
    payload = message if isinstance(message, bytes) else message.SerializeToString()
    return Received(kind, "t", "key", 1, payload, UUID(int=1), NOW, "", "", False, "/test", partition, offset, (), "cluster")


class Recorder:
    """An intake that notes what it is given, and whose answer for runs can be set."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.outcome = Outcome.RECORDED

    async def run_finished(self, work: Any, run: Any) -> Outcome:
        self.seen.append(run)
        return self.outcome

    async def champion_changed(self, work: Any, model: str, champion: Any) -> None:
        self.seen.append((model, champion))

    async def reevaluation_requested(self, work: Any, request: Any) -> Outcome:
        self.seen.append(request)
        return Outcome.RECORDED


class Bench:
    """The handlers over a broker in memory."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.intake, self.deliveries = Recorder(), Deliveries()
        intake: Any = self.intake
        self.read = ReadThrough(self.broker, topics.DELIVERIES)
        self.events = Events(intake, self.deliveries, self.read, lambda conn: conn)  # type: ignore[arg-type, return-value]

    def publish(self) -> None:
        """Puts a delivery into its topic, where nobody has read it yet."""
        self.broker.append(Record(topics.DELIVERIES, b"delays", b"", (), 0))

    async def handle(self, kind: str, message: Message | bytes) -> None:
        await self.events.handlers()[kind](None, received(kind, message))  # type: ignore[arg-type]

    async def read_all(self) -> None:
        """What the reader of the deliveries does."""
        every = [Partition(topics.DELIVERIES, number) for number in range(topics.topic(topics.DELIVERIES).partitions)]
        for partition, (_, end) in (await self.broker.offsets(every)).items():
            for offset in range(end):
                delivery = registry_pb.DeliveryApplied(name="delays", revision=offset + 1, experiment="e", model="m", evaluate_json=SECTION)
                self.events.on_delivery("delays", received("delivery.applied", delivery, partition=partition.number, offset=offset))
            self.read.saw(partition.number, end)


RUN = tracker_pb.RunFinished(run_id="r" * 32, experiment_name="e")


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await topics.ensure_topics(made.broker)
    return made


async def test_before_the_deliveries_are_read_no_run_is_judged(bench: Bench) -> None:
    bench.publish()
    with pytest.raises(Unavailable):
        await bench.handle("run.finished", RUN)
    assert not bench.intake.seen
    await bench.read_all()
    await bench.handle("run.finished", RUN)
    assert [run.run_id for run in bench.intake.seen] == ["r" * 32]


async def test_that_nobody_claims_a_run_is_believed_only_when_all_deliveries_of_that_moment_are_read(bench: Bench) -> None:
    await bench.handle("run.finished", RUN)
    bench.publish()
    await bench.handle("run.finished", RUN)  # somebody claims it: nothing more to know
    bench.intake.outcome = Outcome.UNCLAIMED
    with pytest.raises(Unavailable):
        await bench.handle("run.finished", RUN)
    await bench.read_all()
    await bench.handle("run.finished", RUN)


async def test_a_delivery_is_taken_in_and_a_tombstone_or_another_type_passed_over(bench: Bench) -> None:
    bench.publish()
    await bench.read_all()
    claim = bench.deliveries.of_experiment("e")
    assert claim is not None
    assert (claim.delivery, claim.model) == ("delays", "m")
    bench.events.on_delivery("delays", None)
    bench.events.on_delivery("delays", received("delivery.paused", b"\xff"))
    with pytest.raises(Invalid):
        bench.events.on_delivery("delays", received("delivery.applied", b"\xff"))


@pytest.mark.parametrize("value", [None, b"no event"])
async def test_a_tombstone_or_what_is_no_event_at_the_end_of_a_partition_keeps_no_run_waiting(bench: Bench, value: bytes | None) -> None:
    bench.publish()
    bench.broker.append(Record(topics.DELIVERIES, b"delays", value, (), 0))  # type: ignore[arg-type]  # a tombstone, which only others write
    reader = SnapshotReader(bench.broker, topics.DELIVERIES, bench.events.on_delivery, on_read=bench.read.saw)
    await reader.start()
    try:
        async with asyncio.timeout(10):
            await reader.loaded()
        await bench.handle("run.finished", RUN)
        assert [run.run_id for run in bench.intake.seen] == ["r" * 32]
    finally:
        await reader.stop()


async def test_each_event_reaches_its_use_case(bench: Bench) -> None:
    rollout = deployer_pb.RolloutRef(version=registry_pb.VersionRef(model="m", version=2))
    blob = model_pb2.BlobRef(sha256="ab" * 32, size_bytes=1, key="k")
    await bench.handle("deploy.completed", deployer_pb.DeployCompleted(rollout=rollout, blob=blob))
    await bench.handle("deploy.reverted", deployer_pb.DeployReverted(rollout=rollout))
    await bench.handle("model.reevaluation_requested", registry_pb.ModelReevaluationRequested(evaluation_id="e1", champion_version=3))
    (model, champion), nobody, request = bench.intake.seen
    assert (model, isinstance(champion, Champion), nobody) == ("m", True, ("m", None))
    assert request == Reevaluation("e1", 3, "")
