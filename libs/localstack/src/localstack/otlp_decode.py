"""OTLP trace exports, protobuf or JSON, as spans. In JSON, ids are hex (OTLP specification) and numbers may be text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localstack.span_store import Reference, Span

_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
_STATUSES = ("unset", "ok", "error")


class Malformed(ValueError):
    """The bytes are no trace export."""


def decode_protobuf(body: bytes) -> list[Span]:
    """The spans of an ExportTraceServiceRequest. Raises Malformed."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise Malformed("not an ExportTraceServiceRequest") from error
    spans = []
    for resource in request.resource_spans:
        service = str(_protobuf_attributes(resource.resource.attributes).get("service.name", "unknown"))
        for scope in resource.scope_spans:
            for span in scope.spans:
                spans.append(
                    Span(
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id.hex(),
                        parent_id=span.parent_span_id.hex(),
                        service=service,
                        name=span.name,
                        kind=_word(_KINDS, span.kind),
                        start_ns=span.start_time_unix_nano,
                        end_ns=span.end_time_unix_nano,
                        status=_word(_STATUSES, span.status.code),
                        attributes=_protobuf_attributes(span.attributes),
                        links=tuple(Reference(link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    )
                )
    return _checked(spans)


def decode_json(body: bytes) -> list[Span]:
    """The spans of an ExportTraceServiceRequest in OTLP's JSON. Raises Malformed."""
    try:
        request = json.loads(body)
        return _checked([span for resource in request.get("resourceSpans", []) for span in _json_resource(resource)])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Malformed(f"not a trace export in JSON: {error}") from error


def _json_resource(resource: Mapping[str, Any]) -> Iterator[Span]:
    service = str(_json_attributes(resource.get("resource", {}).get("attributes", [])).get("service.name", "unknown"))
    for scope in resource.get("scopeSpans", []):
        for span in scope.get("spans", []):
            yield Span(
                trace_id=span["traceId"].lower(),
                span_id=span["spanId"].lower(),
                parent_id=span.get("parentSpanId", "").lower(),
                service=service,
                name=span.get("name", ""),
                kind=_word(_KINDS, span.get("kind", 0)),
                start_ns=int(span.get("startTimeUnixNano", 0)),
                end_ns=int(span.get("endTimeUnixNano", 0)),
                status=_word(_STATUSES, span.get("status", {}).get("code", 0)),
                attributes=_json_attributes(span.get("attributes", [])),
                links=tuple(Reference(link["traceId"].lower(), link["spanId"].lower()) for link in span.get("links", [])),
            )


def _checked(spans: list[Span]) -> list[Span]:
    for span in spans:
        for reference in (span.reference, *span.links):
            if not (_is_hex(reference.trace_id, 32) and _is_hex(reference.span_id, 16)):
                raise Malformed("a trace id has 32 hex digits and a span id 16")
    return spans


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and all(each in "0123456789abcdef" for each in text)


def _word(words: Sequence[str], value: int | str) -> str:
    """An enumeration's value, by number or by its protobuf name (SPAN_KIND_SERVER), as one of our words."""
    if isinstance(value, str):
        word = value.rsplit("_", 1)[-1].lower()
        return word if word in words else words[0]
    return words[value] if 0 <= value < len(words) else words[0]


def _protobuf_attributes(attributes: Any) -> dict[str, Any]:
    return {each.key: _protobuf_value(each.value) for each in attributes}


def _protobuf_value(value: Any) -> Any:
    which = value.WhichOneof("value")
    if which is None:
        return None
    content = getattr(value, which)
    if which == "array_value":
        return [_protobuf_value(each) for each in content.values]
    if which == "kvlist_value":
        return _protobuf_attributes(content.values)
    return content.hex() if which == "bytes_value" else content


def _json_attributes(attributes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {each["key"]: _json_value(each.get("value", {})) for each in attributes}


def _json_value(value: Mapping[str, Any]) -> Any:
    for which, content in value.items():
        match which:
            case "intValue":
                return int(content)
            case "arrayValue":
                return [_json_value(each) for each in content.get("values", [])]
            case "kvlistValue":
                return _json_attributes(content.get("values", []))
            case _:
                return content
    return None
