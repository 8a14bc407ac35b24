"""The envelope: what is written is read again, and what is not an event is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from eventing.broker import Fetched, Partition
from eventing.envelope import Event, decode_headers, encode_headers
from eventing.records import pack_headers, receive, receive_any, unpack_headers
from hypothesis import given, settings
from hypothesis import strategies as st
from servicekit.errors import Invalid

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.sampled_from([UTC, timezone(timedelta(hours=-7))]))
EVENTS = st.builds(
    Event,
    type=TEXT,
    topic=st.just("headrace.runs"),
    key=TEXT,
    sequence=st.integers(1, 2**62),
    payload=st.binary(max_size=100),
    id=st.uuids(),
    time=TIMES,
    subject=st.one_of(st.just(""), TEXT),
    traceparent=st.sampled_from(["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]),
    must_understand=st.booleans(),
)
GOOD = Event("run.finished", "headrace.runs", "r", 7, b"p", UUID(int=1), datetime(2026, 5, 4, 3, 2, 1, 9, UTC))


def fetched(event, headers=None, **changes):
    headers = encode_headers(event, "/test") if headers is None else headers
    values = {"key": event.key.encode(), "value": event.payload, "headers": headers, **changes}
    return Fetched(Partition("x.headrace.runs", 3), 42, timestamp_ms=0, **values)


@settings(deadline=None)
@given(EVENTS)
def test_an_event_is_received_as_it_was_sent(event):
    received = receive(fetched(event), "headrace.runs", "cluster")
    for name in ("type", "topic", "key", "sequence", "payload", "id", "time", "subject", "traceparent", "must_understand"):
        assert getattr(received, name) == getattr(event, name), name
    assert (received.source, received.partition, received.offset, received.cluster_id) == ("/test", 3, 42, "cluster")


def test_the_headers_are_those_of_the_binding():
    event = Event("run.finished", "headrace.runs", "r", 7, b"p", GOOD.id, GOOD.time, "flights", "00-tp", True)
    assert dict(encode_headers(event, "/headrace/tracker")) == {
        "ce_specversion": b"1.0",
        "ce_id": b"00000000-0000-0000-0000-000000000001",
        "ce_type": b"run.finished",
        "ce_source": b"/headrace/tracker",
        "ce_time": b"2026-05-04T03:02:01.000009Z",
        "ce_sequence": b"7",
        "ce_subject": b"flights",
        "ce_mustunderstand": b"1",
        "traceparent": b"00-tp",
        "content-type": b"application/protobuf",
    }


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ce_specversion", None, "ce_specversion is not 1.0 but None"),
        ("ce_specversion", b"0.3", "ce_specversion is not 1.0 but b'0.3'"),
        ("ce_id", None, "header ce_id is missing"),
        ("ce_id", b"seven", "unreadable header"),
        ("ce_type", None, "header ce_type is missing"),
        ("ce_type", b"\xff", "unreadable header"),
        ("ce_source", None, "header ce_source is missing"),
        ("ce_time", None, "header ce_time is missing"),
        ("ce_time", b"yesterday", "unreadable header"),
        ("ce_time", b"2026-01-01T00:00:00", "has no time zone"),
        ("ce_sequence", None, "header ce_sequence is missing"),
        ("ce_sequence", b"0", "header ce_sequence is missing"),
        ("ce_sequence", b"-1", "ce_sequence is b'-1'"),
        ("ce_sequence", b"", "ce_sequence is b''"),
        ("ce_sequence", b"\xc2\xb2", "ce_sequence is"),
    ],
)
def test_a_record_with_a_wrong_header_is_no_event(name, value, reason):
    headers = dict(encode_headers(GOOD, "/test"))
    headers.pop(name)
    if value is not None:
        headers[name] = value
    with pytest.raises(Invalid, match=reason):
        receive(fetched(GOOD, tuple(headers.items())), "headrace.runs", "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"value": None}, "no value"), ({"key": None}, "no key"), ({"key": b""}, "no key"), ({"key": b"\xff"}, "not UTF-8")],
)
def test_a_record_without_key_or_value_is_no_event(changes, reason):
    with pytest.raises(Invalid, match=reason):
        receive(fetched(GOOD, **changes), "headrace.runs", "")


def test_an_event_outside_the_promise_has_no_sequence():
    event = Event("traffic.window", "headrace.traffic", "g", 0, b"", GOOD.id, GOOD.time)
    assert receive_any(fetched(event), "headrace.traffic", "").sequence == 0


def test_the_first_of_two_headers_counts_and_foreign_ones_do_not():
    headers = (*encode_headers(GOOD, "/test"), ("ce_type", b"forged"), ("x-other", b"\xff"))
    assert decode_headers(headers).type == "run.finished"


def test_a_time_without_zone_is_refused():
    with pytest.raises(Invalid, match="no time zone"):
        encode_headers(Event("t", "headrace.runs", "r", 1, b"", GOOD.id, datetime(2026, 1, 1)), "/test")


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.binary(max_size=40))))
def test_headers_are_kept_byte_for_byte(headers):
    assert unpack_headers(pack_headers(tuple(headers))) == tuple(headers)
