"""Request ids, trace context and spans of the data path, at no cost to requests that are not sampled.

Whether a request is sampled is decided from its trace id before a span exists. The ids are made here, because the runtime must
be told them before anybody knows whether there will be a span: an error gets one in any case, at its end. A span is therefore
built when it ends, from what the exchange knows, and handed straight to the SDK's span processors.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

SCOPE = "headrace.gateway"
ERROR_SPAN = "headrace.error_span"
"""True on a span that was made because of an error in a trace that is not recorded."""

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_randbits = random.getrandbits
_LOW_62 = (1 << 62) - 1
_VARIANT = 1 << 63


def new_trace_id() -> bytes:
    """32 hex digits: a UUID of version 7 (RFC 9562) without its dashes; its last 62 bits are random, which W3C asks of a trace id."""
    bits = _randbits(74)
    return b"%012x7%03x%016x" % (int(time.time() * 1000), bits >> 62, bits & _LOW_62 | _VARIANT)


def as_uuid(hex32: bytes) -> bytes:
    """32 hex digits with the dashes of a UUID."""
    return b"%b-%b-%b-%b-%b" % (hex32[:8], hex32[8:12], hex32[12:16], hex32[16:20], hex32[20:])


class Trace:
    """The ids of one request. Its request id is its trace id as a UUID, unless the caller brought a trace of its own."""

    __slots__ = ("parent_span_id", "request_id", "sampled", "span_id", "trace_id", "traceparent")

    def __init__(self, bound: int, inbound: bytes | None) -> None:
        """`bound`: of the trace id's last 56 bits, below which it is sampled. A caller's sampled flag is honoured."""
        fresh = new_trace_id()
        self.request_id = as_uuid(fresh)
        self.trace_id = fresh
        self.parent_span_id = b""
        wished = False
        if inbound is not None:
            match = _TRACEPARENT.fullmatch(inbound)
            if match is not None:
                self.trace_id, self.parent_span_id = match[1], match[2]
                wished = int(match[3], 16) & 1 == 1
        self.sampled = wished or (bound > 0 and int(self.trace_id[18:], 16) < bound)
        self.span_id = b"%016x" % (_randbits(64) or 1)
        self.traceparent = b"00-%b-%b-%b" % (self.trace_id, self.span_id, b"01" if self.sampled else b"00")

    def child(self) -> Trace:
        """The ids of a span below this one, in the same trace."""
        below = Trace.__new__(Trace)
        below.request_id, below.trace_id, below.sampled = self.request_id, self.trace_id, self.sampled
        below.parent_span_id = self.span_id
        below.span_id = b"%016x" % (_randbits(64) or 1)
        below.traceparent = b"00-%b-%b-%b" % (below.trace_id, below.span_id, self.traceparent[-2:])
        return below


def sampling_bound(ratio: float) -> int:
    """The bound for `Trace`, for a share of all traces."""
    return round(ratio * (1 << 56))


class Spans:
    """Makes the spans of finished requests."""

    def __init__(self, on_end: Callable[[ReadableSpan], None] | None = None, resource: Resource | None = None) -> None:
        """Without `on_end` no span is made."""
        self._on_end = on_end
        self._resource = resource or Resource.get_empty()
        self._scope = InstrumentationScope(SCOPE)

    @classmethod
    def of(cls, provider: TracerProvider) -> Spans:
        """Spans that go where the provider's own go. Raises RuntimeError when the SDK is not the one this was written for."""
        processor = getattr(provider, "_active_span_processor", None)
        if processor is None or not callable(getattr(processor, "on_end", None)):
            raise RuntimeError("this opentelemetry-sdk has no _active_span_processor: gateway.tracing has to be adapted")
        return cls(processor.on_end, provider.resource)

    def record(
        self, ids: Trace, name: str, elapsed_s: float, attributes: Mapping[str, Any], *, error: str | None, kind: SpanKind = SpanKind.SERVER
    ) -> None:
        """A span that ends now and lasted `elapsed_s`. `error`: its class, or None. Attributes hold names and numbers, never a payload."""
        if self._on_end is None:
            return
        end = time.time_ns()
        trace_id = int(ids.trace_id, 16)
        context = SpanContext(trace_id, int(ids.span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        parent = SpanContext(trace_id, int(ids.parent_span_id, 16), is_remote=True) if ids.parent_span_id else None
        told = dict(attributes)
        if error is not None:
            told["error.type"] = error
            if not ids.sampled:
                told[ERROR_SPAN] = True
        self._on_end(
            ReadableSpan(
                name=name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=told,
                kind=kind,
                status=Status(StatusCode.ERROR) if error is not None else Status(StatusCode.UNSET),
                start_time=end - int(elapsed_s * 1e9),
                end_time=end,
                instrumentation_scope=self._scope,
            )
        )
