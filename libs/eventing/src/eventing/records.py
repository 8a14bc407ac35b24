"""From a record of the log to the event in it, and the form in which a record's headers are kept in the database."""

from __future__ import annotations

import json

from servicekit.errors import Invalid

from eventing.broker import Fetched
from eventing.envelope import Headers, Received, decode_headers


def receive(fetched: Fetched, topic: str, cluster_id: str) -> Received:
    """The event in a record of a durable topic. Raises Invalid if it is none."""
    event = receive_any(fetched, topic, cluster_id)
    if event.sequence < 1:
        raise Invalid("header ce_sequence is missing")
    return event


def receive_any(fetched: Fetched, topic: str, cluster_id: str) -> Received:
    """The event in a record, sequenced or not. Raises Invalid if it is none."""
    if fetched.value is None:
        raise Invalid("the record has no value")
    try:
        key = (fetched.key or b"").decode()
    except UnicodeDecodeError as exc:
        raise Invalid("the key is not UTF-8") from exc
    if not key:
        raise Invalid("the record has no key")
    attributes = decode_headers(fetched.headers)
    return Received(
        type=attributes.type,
        topic=topic,
        key=key,
        sequence=attributes.sequence,
        payload=fetched.value,
        id=attributes.id,
        time=attributes.time,
        subject=attributes.subject,
        traceparent=attributes.traceparent,
        must_understand=attributes.must_understand,
        source=attributes.source,
        partition=fetched.partition.number,
        offset=fetched.offset,
        headers=fetched.headers,
        cluster_id=cluster_id,
    )


def pack_headers(headers: Headers) -> bytes:
    """Headers as the column parked_event.headers holds them: JSON, bytes as Latin-1."""
    return json.dumps([[name, value.decode("latin-1")] for name, value in headers]).encode()


def unpack_headers(packed: bytes) -> Headers:
    """The reverse of `pack_headers`."""
    return tuple((name, value.encode("latin-1")) for name, value in json.loads(packed))
