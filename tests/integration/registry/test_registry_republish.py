"""Snapshots are published again: an older one that a stalled relay stored last does not stay the last."""

from __future__ import annotations

from typing import Any

from contracts.registry.v1 import events_pb2, service_pb2
from eventing import topics
from eventing.broker import Record
from eventing.envelope import Event, encode_headers
from servicekit.clock import SystemClock


async def stale(registry: Any, topic: str) -> None:
    """Stores the first record of a topic behind all others, as a relay does that stood still before it sent it."""
    first = registry.told(topic)[0]
    event = Event(first.type, topic, first.key, first.sequence, first.payload, registry.ids.uuid7(), SystemClock().now())
    registry.broker.append(Record(topic, first.key.encode(), first.payload, encode_headers(event, "/headrace/registry"), 0))


async def test_a_revoked_key_stays_revoked_in_a_log_that_a_stalled_relay_wrote_to(registry: Any) -> None:
    with registry.user("ann", "admin"):
        made = await registry.access.CreateApiKey(service_pb2.CreateApiKeyRequest(subject="bob", roles=["viewer"]))
        await registry.access.RevokeApiKey(service_pb2.RevokeApiKeyRequest(key_id=made.key.key_id))
    await registry.wait_told("access.changed", 2, topics.ACCESS)
    await stale(registry, topics.ACCESS)
    told = [events_pb2.AccessChanged.FromString(one.payload) for one in registry.told(topics.ACCESS)]
    assert [one.revoked for one in told] == [False, True, False]
    await registry.rows("UPDATE api_key SET published_at = published_at - interval '1 minute' RETURNING 1")
    last = (await registry.wait_told("access.changed", 4, topics.ACCESS))[-1]
    assert (last.key, last.sequence) == (made.key.key_id, 3)
    assert events_pb2.AccessChanged.FromString(last.payload) == told[1]


async def test_the_newest_revision_of_a_delivery_is_told_again_and_the_next_one_behind_it(registry: Any) -> None:
    await registry.apply()
    await registry.apply(registry.DELIVERY.replace("[python, train.py]", "[python, other.py]"))
    await registry.wait_told("delivery.applied", 2, topics.DELIVERIES)
    await stale(registry, topics.DELIVERIES)
    await registry.rows("UPDATE delivery SET published_at = published_at - interval '1 minute' RETURNING 1")
    second, last = (await registry.wait_told("delivery.applied", 4, topics.DELIVERIES))[1::2]
    assert (last.sequence, last.payload) == (3, second.payload)
    with registry.user("ann", "admin"):
        await registry.stub.DeleteDelivery(service_pb2.DeleteDeliveryRequest(name="flight-delays"))
    deleted = (await registry.wait_told("delivery.applied", 5, topics.DELIVERIES))[-1]
    message = events_pb2.DeliveryApplied.FromString(deleted.payload)
    assert (deleted.sequence, message.revision, message.deleted) == (4, 3, True)


async def test_nothing_is_told_again_before_its_turn(registry: Any) -> None:
    await registry.apply()
    await registry.wait_told("delivery.applied", 1, topics.DELIVERIES)
    await registry.rows("UPDATE delivery SET changed_at = now() - interval '3 hours', published_at = now() - interval '50 minutes'")
    with registry.user("ann", "admin"):
        await registry.access.CreateApiKey(service_pb2.CreateApiKeyRequest(subject="bob", roles=["viewer"]))
    await registry.rows("UPDATE api_key SET published_at = published_at - interval '1 minute' RETURNING 1")
    await registry.wait_told("access.changed", 2, topics.ACCESS)
    assert len(registry.told(topics.DELIVERIES)) == 1, "it is told again after an hour at most, and not before"
