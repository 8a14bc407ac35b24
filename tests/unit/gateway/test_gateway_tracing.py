"""The data path's spans as the SDK takes them, and the ids that requests get."""

from __future__ import annotations

import re

import pytest
from gateway.tracing import ERROR_SPAN, Spans, Trace, as_uuid, new_trace_id, sampling_bound
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

INBOUND = b"00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01"


def test_spans_go_where_the_providers_own_go_and_can_be_sent() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "gateway"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans.of(provider)
    sampled, failed = Trace(0, INBOUND), Trace(0, None)
    spans.record(sampled, "POST", 0.25, {"a": 1, "b": "x", "c": True}, error=None)
    spans.record(failed, "POST", 0.0, {}, error="504")
    encoded = encode_spans(exporter.get_finished_spans()).resource_spans[0]
    assert encoded.resource.attributes[0].value.string_value == "gateway"
    one, two = encoded.scope_spans[0].spans
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == ("0123456789abcdef0123456789abcdef", "00f067aa0ba902b7")
    assert one.span_id.hex() == sampled.span_id.decode()
    assert (one.end_time_unix_nano - one.start_time_unix_nano) == 250_000_000
    assert {attribute.key for attribute in one.attributes} == {"a", "b", "c"}
    assert {attribute.key for attribute in two.attributes} == {"error.type", ERROR_SPAN}
    assert (two.status.code, two.parent_span_id) == (2, b"")
    provider.shutdown()


def test_a_provider_of_another_sdk_is_refused() -> None:
    with pytest.raises(RuntimeError, match="_active_span_processor"):
        Spans.of(object())  # type: ignore[arg-type]  # that is the point


def test_ids_are_unique_ordered_in_time_and_of_version_7() -> None:
    made = [new_trace_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert [one[:11] for one in made] == sorted(one[:11] for one in made)
    assert all(re.fullmatch(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", as_uuid(one)) for one in made)


@pytest.mark.parametrize(
    "inbound",
    [
        b"", b"x", INBOUND[:-1], b"ff" + INBOUND[2:], INBOUND.upper(), INBOUND.replace(b"0123456789abcdef0123456789abcdef", b"0" * 32),
        INBOUND.replace(b"00f067aa0ba902b7", b"0" * 16), INBOUND + b"0", b" " + INBOUND,
    ],
)  # fmt: skip
def test_a_malformed_trace_context_is_not_joined(inbound: bytes) -> None:
    ids = Trace(0, inbound)
    assert (ids.parent_span_id, ids.sampled) == (b"", False)
    assert ids.trace_id != b"0123456789abcdef0123456789abcdef"


def test_the_share_of_sampled_traces_is_the_ratio() -> None:
    assert not any(Trace(sampling_bound(0.0), None).sampled for _ in range(1000))
    assert all(Trace(sampling_bound(1.0), None).sampled for _ in range(1000))
    share = sum(Trace(sampling_bound(0.25), None).sampled for _ in range(8000)) / 8000
    assert 0.22 < share < 0.28
    later = Trace(0, b"01" + INBOUND[2:] + b"-more")
    assert (later.sampled, later.trace_id) == (True, b"0123456789abcdef0123456789abcdef")
