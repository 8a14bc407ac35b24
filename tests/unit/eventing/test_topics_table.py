"""The table of topics, and the checks of the outbox that rest on it."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from eventing import schema, topics
from eventing.envelope import Event
from eventing.outbox import Outbox
from eventing.relay import channel, lock_key
from servicekit.errors import Invalid, TooLarge


class Recorder:
    """Stands where a connection stands, and keeps what it is told to execute."""

    def __init__(self):
        self.statements = []

    async def exec_driver_sql(self, statement, parameters):
        self.statements.append((statement, parameters))


def event(**changes):
    values = {"type": "run.finished", "topic": topics.RUNS, "key": "r", "sequence": 1, "payload": b"p", "id": uuid.UUID(int=1)}
    return Event(**{**values, "time": datetime(2026, 1, 1, tzinfo=UTC), **changes})


def test_the_topics_are_those_of_the_design():
    assert {topic.name.removeprefix("headrace."): (topic.compacted, topic.best_effort) for topic in topics.TOPICS} == {
        "runs": (False, False),
        "evals": (False, False),
        "models": (False, False),
        "deploys": (False, False),
        "jobs": (False, False),
        "routes": (True, False),
        "deliveries": (True, False),
        "access": (True, False),
        "traffic": (False, True),
    }


def test_durable_topics_are_kept_for_ever_and_have_a_topic_for_dead_letters():
    specs = {spec.name: spec for spec in topics.specs("p.", replication=3)}
    assert len(specs) == len(topics.TOPICS) + 8
    assert all(spec.replication == 3 for spec in specs.values())
    for topic in topics.TOPICS:
        assert (specs[f"p.{topic.name}"].retention_ms == -1) is not topic.best_effort
        assert (f"p.{topic.dead_letters}" in specs) is not topic.best_effort
        assert topics.is_dead_letters(topic.dead_letters) is not topic.best_effort


def test_names_that_are_not_in_the_table_are_refused():
    with pytest.raises(Invalid, match="there is no topic"):
        topics.topic("headrace.other")
    with pytest.raises(Invalid, match="best effort"):
        topics.durable(topics.TRAFFIC)
    assert topics.durable(topics.ROUTES).key == "endpoint"


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"topic": "headrace.other"}, Invalid, "no topic"),
        ({"topic": topics.TRAFFIC}, Invalid, "best effort"),
        ({"key": ""}, Invalid, "needs a key"),
        ({"sequence": 0}, Invalid, "counts from 1"),
        ({"payload": bytes(101)}, TooLarge, "101 bytes, the limit is 100"),
        ({"subject": "s" * 4000}, TooLarge, "more than 4000 characters"),
    ],
)
async def test_the_outbox_refuses_what_could_not_be_published(changes, error, reason):
    outbox = Outbox(schema.tables("alpha"), max_payload=100)
    conn = Recorder()
    with pytest.raises(error, match=reason):
        await outbox.append(conn, [event(), event(**changes)])
    assert conn.statements == []


async def test_the_outbox_takes_one_statement_however_many_events():
    outbox = Outbox(schema.tables("alpha"), max_payload=100, shards=4)
    conn = Recorder()
    await outbox.append(conn, [])
    await outbox.append(conn, [event(payload=bytes(100))])
    await outbox.append(conn, [event(sequence=n) for n in (1, 2, 3)])
    await outbox.append(conn, [event(topic="headrace.runs.dlq", sequence=0)])
    assert [len(parameters) for _, parameters in conn.statements] == [11, 11, 11]
    assert conn.statements[1][1][3] == [1, 2, 3]
    shards = {parameters[0] if isinstance(parameters[0], int) else parameters[0][0] for _, parameters in conn.statements}
    assert len(shards) == 1  # a key stays in its shard
    assert shards <= set(range(4))


async def test_committed_wakes_every_relay_that_asked():
    outbox = Outbox(schema.tables("alpha"))
    outbox.committed()
    woken = []
    outbox.on_committed(lambda: woken.append(1))
    outbox.on_committed(lambda: woken.append(2))
    outbox.committed()
    assert woken == [1, 2]


@pytest.mark.parametrize("name", ["", "Alpha", "a b", 'a"b', "1a", "a;drop"])
def test_a_schema_that_is_no_plain_name_is_refused(name):
    with pytest.raises(ValueError, match="plain lower-case name"):
        schema.tables(name)


def test_each_schema_and_shard_has_a_lock_and_a_channel_of_its_own():
    every = [(name, shard) for name in ("alpha", "beta") for shard in (0, 1)]
    assert len({lock_key(*one) for one in every}) == len({channel(*one) for one in every}) == 4
    assert all(-(2**63) <= lock_key(*one) < 2**63 for one in every)
    assert schema.tables("alpha").schema == "alpha"
