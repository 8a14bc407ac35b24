"""Deliveries: their train sections are validated for the registry, kept by the highest revision, and trained from."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from contracts.registry.v1 import events_pb2 as registry_events
from contracts.registry.v1 import service_pb2 as registry_pb2
from contracts.trainer.v1 import service_pb2 as pb
from eventing import topics
from eventing.broker import Record
from eventing.envelope import Event, encode_headers
from eventing.kafka import KafkaBroker
from servicekit import rpc
from servicekit.access import Caller
from servicekit.errors import Forbidden, Invalid, NotFound

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADA = Caller("gateway", "ada", frozenset({"editor"}))
SECTION = {
    "source": {"path": "examples/flights"},
    "command": ["python", "train.py"],
    "environment": {"MODE": "slow", "KEPT": "yes"},
    "resources": {"memory": "256MiB", "disk": "64MiB", "timeout": "2m"},
    "seed": 11,
}


NO_REPOSITORY = {"git": {"url": "https://127.0.0.1:9/no.git", "ref": "main"}}


async def publish(shared: Any, *messages: registry_events.DeliveryApplied | bytes) -> None:
    """Puts records on headrace.deliveries, as the registry's relay does."""
    prefix = shared.environment["HEADRACE_TOPIC_PREFIX"]
    broker = KafkaBroker(shared.environment["HEADRACE_KAFKA_BOOTSTRAP"], "test")
    await topics.ensure_topics(broker, prefix)
    producer = broker.producer()
    await producer.start()
    try:
        for message in messages:
            payload = message if isinstance(message, bytes) else message.SerializeToString()
            name = "broken" if isinstance(message, bytes) else message.name
            event = Event("delivery.applied", topics.DELIVERIES, name, 1, payload, uuid4(), datetime.now(UTC))
            record = Record(prefix + topics.DELIVERIES, name.encode(), payload, encode_headers(event, "/headrace/registry"), 0)
            assert await producer.send([record]) == [None]
    finally:
        await producer.stop()
        await broker.close()


def applied(revision: int, *, name: str = "flight-delays", deleted: bool = False, **changes: Any) -> registry_events.DeliveryApplied:
    by = changes.pop("applied_by", "grace")
    section = json.dumps({**SECTION, **changes})
    return registry_events.DeliveryApplied(
        name=name, revision=revision, deleted=deleted, train_json=section, experiment="flights", applied_by=by
    )


async def until_revision(shared: Any, revision: int, name: str = "flight-delays") -> None:
    async with asyncio.timeout(60):
        while True:
            rows = await shared.rows("SELECT revision FROM trainer.delivery WHERE name = :name", name=name)
            if rows and rows[0].revision == revision:
                return
            await asyncio.sleep(0.05)


async def test_a_delivery_fills_what_a_request_leaves_out_by_its_highest_revision(shared: Any) -> None:
    # The highest revision counts, whatever comes last; what cannot be read is passed over.
    await publish(shared, applied(1, seed=1), applied(3), applied(2, seed=2), b"\xff\xff", applied(1, name="last"))
    await until_revision(shared, 1, "last")
    await until_revision(shared, 3)
    with rpc.acting_for(ADA), pytest.raises(Invalid, match="must be uploaded"):
        await shared.trainer.SubmitTraining(pb.SubmitTrainingRequest(delivery="flight-delays"))
    script = "import os, sys; print(os.environ['MODE'], os.environ['KEPT'], os.environ['HEADRACE_SEED'], sys.argv)"
    source = await shared.upload({"train.py": script})
    training = await shared.submit("", source=source, delivery="flight-delays", command=[], environment={"MODE": "fast"})
    assert (training.experiment, training.seed, list(training.command)) == ("flights", 11, ["python", "train.py"])
    assert (training.resources.memory_bytes, training.resources.disk_bytes) == (256 * 2**20, 64 * 2**20)
    assert (training.resources.timeout_seconds, training.resources.processes) == (120, 1)
    ended = await shared.ended(training.training_id)
    assert ended.status == "succeeded"
    assert "fast yes 11 ['train.py']" in await shared.log(training.training_id)
    run = await shared.run(ended.run_id)
    assert run.tags["headrace.delivery"] == "flight-delays"

    await publish(shared, applied(4, deleted=True))
    await until_revision(shared, 4)
    with rpc.acting_for(ADA), pytest.raises(NotFound):
        await shared.trainer.SubmitTraining(pb.SubmitTrainingRequest(delivery="flight-delays", source=source))


async def test_the_registry_has_sections_validated(shared: Any) -> None:
    async def violations(section: Any) -> list[str]:
        request = registry_pb2.ValidateSectionRequest(delivery="d", section="train", section_json=json.dumps(section))
        return [violation.field for violation in (await shared.sections.ValidateSection(request)).violations]

    assert await violations(SECTION) == []
    assert await violations({**SECTION, "command": "python train.py", "seed": -1}) == ["train.command", "train.seed"]
    assert await violations({**SECTION, "resources": {"memory": "9GiB"}}) == ["train.resources.memory"]
    # Nothing would ever start it.
    assert await violations({**SECTION, "triggers": [{"cron": "0 3 * * *"}, "push", "drift"]}) == ["train.triggers[1]", "train.triggers[2]"]
    with pytest.raises(Invalid):
        await shared.sections.ValidateSection(registry_pb2.ValidateSectionRequest(section="serve", section_json="{}"))
    stub = type(shared.sections)(shared.channel_to(await shared.started[0].port(), "gateway"))
    with rpc.acting_for(ADA), pytest.raises(Forbidden):
        await stub.ValidateSection(registry_pb2.ValidateSectionRequest(section="train", section_json="{}"))


async def test_a_delivery_with_a_cron_trigger_is_trained_when_it_is_due_as_it_was_last_uploaded(shared: Any) -> None:
    name = "nightly"
    await publish(shared, applied(1, name=name, triggers=[{"cron": "* * * * *"}]))
    await until_revision(shared, 1, name)
    source = await shared.upload({"train.py": "print('as uploaded')"})
    pushed = await shared.submit("", source=source, delivery=name, command=[])
    scheduled = await until_due(shared, name)
    await publish(shared, applied(2, name=name))  # without the trigger it is not due again
    await until_revision(shared, 2, name)
    ended = await shared.ended(scheduled)
    assert (ended.status, ended.delivery, ended.source.upload_id) == ("succeeded", name, source.upload_id)
    # Its author is who uploaded what it trained: they approve nothing that comes of it.
    run = await shared.run(ended.run_id)
    assert (ended.submitted_by, run.user, run.tags["headrace.started_by"]) == ("ada", "ada", "schedule")
    assert "headrace.started_by" not in (await shared.run((await shared.ended(pushed.training_id)).run_id)).tags
    assert "as uploaded" in await shared.log(ended.training_id)
    assert (await shared.ended(pushed.training_id)).status == "succeeded"


async def until_due(shared: Any, name: str) -> str:
    """Makes a delivery due: it was last looked at some minutes ago, and once only however long that is. Returns its training's id."""
    await shared.rows("UPDATE trainer.delivery SET scheduled_at = now() - interval '10 minutes' WHERE name = :name RETURNING 1", name=name)
    row = await until_row(shared, "SELECT training_id FROM trainer.training WHERE request_id LIKE :ids", ids=f"cron:{name}:%")
    return str(row.training_id)


async def until_row(shared: Any, query: str, **parameters: Any) -> Any:
    """The first row of the query as soon as there is one."""
    async with asyncio.timeout(60):
        while True:
            if rows := await shared.rows(query, **parameters):
                return rows[0]
            await asyncio.sleep(0.1)


async def test_the_author_of_what_a_schedule_trains_from_a_repository_is_who_applied_the_delivery(shared: Any) -> None:
    name = "nightly-git"
    changes: dict[str, Any] = {"source": NO_REPOSITORY, "triggers": [{"cron": "* * * * *"}]}
    await publish(shared, applied(1, name=name, applied_by="ken", **changes))
    # A later revision by somebody else makes them the author; the same revision told again does not.
    await publish(shared, applied(2, name=name, applied_by="mallory", **changes), applied(2, name=name, applied_by="ada", **changes))
    await until_revision(shared, 2, name)
    scheduled = await until_due(shared, name)
    await publish(shared, applied(3, name=name, **changes | {"triggers": []}))
    await until_revision(shared, 3, name)
    rows = await shared.rows("SELECT submitted_by, started_by FROM trainer.training WHERE training_id = :id", id=scheduled)
    assert [tuple(row) for row in rows] == [("mallory", "schedule")]
    with rpc.acting_for(ADA):
        await shared.trainer.CancelTraining(pb.CancelTrainingRequest(training_id=scheduled))
    await shared.ended(scheduled)


async def test_a_delivery_kept_without_who_applied_it_is_trained_by_schedule_once_that_is_told(shared: Any) -> None:
    name = "nightly-old"
    changes: dict[str, Any] = {"source": NO_REPOSITORY, "triggers": [{"cron": "* * * * *"}]}
    await publish(shared, applied(1, name=name, applied_by="", **changes))
    await until_revision(shared, 1, name)
    past = "UPDATE trainer.delivery SET scheduled_at = now() - interval '10 minutes' WHERE name = :name RETURNING scheduled_at"
    was = (await shared.rows(past, name=name))[0].scheduled_at
    await until_row(shared, "SELECT 1 FROM trainer.delivery WHERE name = :name AND scheduled_at > :was", name=name, was=was)
    assert await shared.rows("SELECT 1 FROM trainer.training WHERE delivery = :name", name=name) == []  # looked at, and nothing started
    await publish(shared, applied(1, name=name, applied_by="ken", **changes))
    await until_row(shared, "SELECT 1 FROM trainer.delivery WHERE name = :name AND applied_by = 'ken'", name=name)
    scheduled = await until_due(shared, name)
    await publish(shared, applied(2, name=name, **changes | {"triggers": []}))
    await until_revision(shared, 2, name)
    with rpc.acting_for(ADA):
        training = (await shared.trainer.CancelTraining(pb.CancelTrainingRequest(training_id=scheduled))).training
    assert training.submitted_by == "ken"
    await shared.ended(scheduled)
