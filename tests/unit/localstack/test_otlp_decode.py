"""Both encodings of OTLP say the same, and what is neither is refused."""

from __future__ import annotations

import json

import pytest
from localstack.otlp_decode import Malformed, decode_json, decode_protobuf
from localstack.span_store import Reference, Span
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

WANTED = Span(
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="b7ad6b7169203331",
    parent_id="00f067aa0ba902b7",
    service="triton",
    name="infer",
    kind="server",
    start_ns=1_700_000_000_000_000_001,
    end_ns=1_700_000_000_000_000_900,
    status="error",
    attributes={"headrace.request_id": "r-1", "batch": 8, "share": 0.5, "warm": True, "shape": [1, 3]},
    links=(Reference("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b8"),),
)


def as_protobuf() -> bytes:
    span = trace_pb2.Span(
        trace_id=bytes.fromhex(WANTED.trace_id),
        span_id=bytes.fromhex(WANTED.span_id),
        parent_span_id=bytes.fromhex(WANTED.parent_id),
        name="infer",
        kind=trace_pb2.Span.SPAN_KIND_SERVER,
        start_time_unix_nano=WANTED.start_ns,
        end_time_unix_nano=WANTED.end_ns,
        status=trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR),
        attributes=[
            KeyValue(key="headrace.request_id", value=AnyValue(string_value="r-1")),
            KeyValue(key="batch", value=AnyValue(int_value=8)),
            KeyValue(key="share", value=AnyValue(double_value=0.5)),
            KeyValue(key="warm", value=AnyValue(bool_value=True)),
            KeyValue(key="shape", value=AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(int_value=3)]))),
        ],
        links=[trace_pb2.Span.Link(trace_id=bytes.fromhex(link.trace_id), span_id=bytes.fromhex(link.span_id)) for link in WANTED.links],
    )
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value="triton"))])
    scope = trace_pb2.ScopeSpans(spans=[span])
    return ExportTraceServiceRequest(resource_spans=[trace_pb2.ResourceSpans(resource=resource, scope_spans=[scope])]).SerializeToString()


def as_json(**changes: object) -> bytes:
    span = {
        "traceId": WANTED.trace_id.upper(),
        "spanId": WANTED.span_id,
        "parentSpanId": WANTED.parent_id,
        "name": "infer",
        "kind": 2,
        "startTimeUnixNano": str(WANTED.start_ns),
        "endTimeUnixNano": WANTED.end_ns,
        "status": {"code": "STATUS_CODE_ERROR"},
        "attributes": [
            {"key": "headrace.request_id", "value": {"stringValue": "r-1"}},
            {"key": "batch", "value": {"intValue": "8"}},
            {"key": "share", "value": {"doubleValue": 0.5}},
            {"key": "warm", "value": {"boolValue": True}},
            {"key": "shape", "value": {"arrayValue": {"values": [{"intValue": "1"}, {"intValue": 3}]}}},
        ],
        "links": [{"traceId": link.trace_id, "spanId": link.span_id} for link in WANTED.links],
        **changes,
    }
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "triton"}}]}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span]}]}]}).encode()


def test_protobuf_and_json_give_the_same_span() -> None:
    assert decode_protobuf(as_protobuf()) == [WANTED]
    assert decode_json(as_json()) == [WANTED]


def test_a_kind_may_be_a_number_or_a_name() -> None:
    assert [decode_json(as_json(kind=kind))[0].kind for kind in (3, "SPAN_KIND_CONSUMER", 77, "NONSENSE")] == [
        "client",
        "consumer",
        "unspecified",
        "unspecified",
    ]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', as_json(traceId="zz"), as_json(spanId=WANTED.trace_id), as_json(startTimeUnixNano="soon")]
)
def test_json_that_is_no_export_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        decode_json(body)


def test_protobuf_that_is_no_export_is_refused() -> None:
    with pytest.raises(Malformed):
        decode_protobuf(b"\xff\xff\xff")
    request = ExportTraceServiceRequest(
        resource_spans=[trace_pb2.ResourceSpans(scope_spans=[trace_pb2.ScopeSpans(spans=[trace_pb2.Span(trace_id=b"short")])])]
    )
    with pytest.raises(Malformed, match="32 hex digits"):
        decode_protobuf(request.SerializeToString())
