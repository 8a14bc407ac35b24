"""The spans of eventing. The context in which an event was made is stored with it; sending and processing refer to it.

At low rates every event has a producer span and a consumer span in the trace of its cause, so that one trace holds a causal chain.
Above SPANS_PER_SECOND one span stands for a batch and links to its events' contexts, and the events keep the context of their cause.
Semantic conventions: OpenTelemetry, messaging spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from servicekit.clock import Clock

SPANS_PER_SECOND = 100.0
"""Above this rate spans stand for batches: a span costs more than an event."""

MAX_LINKS = 64
"""Links of a batch's span; more are cut off."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")  # W3C Trace Context, level 1


def current_traceparent() -> str:
    """The W3C traceparent of the current span, empty outside of any."""
    return _format(trace.get_current_span().get_span_context())


def span_context(traceparent: str) -> SpanContext | None:
    """The remote span that a traceparent names; None if it is empty or malformed."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    found = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return found if found.is_valid else None


class RateMeter:
    """Tells whether events come faster than spans should: counts them per second, by the clock it is given."""

    def __init__(self, clock: Clock, limit: float = SPANS_PER_SECOND) -> None:
        self._clock = clock
        self._limit = limit
        self._since = clock.monotonic()
        self._count = 0
        self._fast = False

    def add(self, events: int) -> bool:
        """Counts `events`; True when the rate, of the last whole second or of the running one, is above the limit."""
        elapsed = self._clock.monotonic() - self._since
        if elapsed >= 1.0:
            self._fast = self._count / elapsed > self._limit
            self._count = 0
            self._since = self._clock.monotonic()
        self._count += events
        return self._fast or self._count > self._limit


class Tracing:
    """Makes the spans of one relay or consumer."""

    def __init__(self, clock: Clock) -> None:
        self._tracer = trace.get_tracer("eventing")
        self._rate = RateMeter(clock)

    def sending(self, topics: Sequence[str], keys: Sequence[str], ids: Sequence[str], traceparents: Sequence[str]) -> list[str]:
        """Makes the producer spans of a batch about to be sent, and returns the traceparents to send."""
        if self._rate.add(len(topics)):
            attributes: dict[str, str | int] = {
                "messaging.system": "kafka",
                "messaging.operation.type": "send",
                "messaging.batch.message_count": len(topics),
            }
            self._tracer.start_span("send batch", kind=SpanKind.PRODUCER, links=_links(traceparents), attributes=attributes).end()
            return list(traceparents)
        sent = []
        for topic, key, event_id, traceparent in zip(topics, keys, ids, traceparents, strict=True):
            cause = span_context(traceparent)
            if cause is None:
                sent.append(traceparent)
                continue
            span = self._tracer.start_span(
                f"send {topic}",
                kind=SpanKind.PRODUCER,
                context=trace.set_span_in_context(NonRecordingSpan(cause)),
                attributes=_attributes("send", topic, key, event_id),
            )
            span.end()
            sent.append(_format(span.get_span_context()) or traceparent)
        return sent

    def batch(self, traceparents: Sequence[str]) -> BatchTracing:
        """What makes the consumer spans of a batch."""
        return BatchTracing(self._tracer, traceparents, per_event=not self._rate.add(len(traceparents)))


class BatchTracing:
    """The consumer spans of one batch: use `whole` around it and `event` around each handler."""

    def __init__(self, tracer: trace.Tracer, traceparents: Sequence[str], per_event: bool) -> None:
        self._tracer = tracer
        self._traceparents = traceparents
        self._per_event = per_event

    @contextmanager
    def whole(self, consumer: str) -> Iterator[None]:
        """The span of the batch, when events have none of their own."""
        if self._per_event:
            yield
            return
        attributes: dict[str, str | int] = {
            "messaging.system": "kafka",
            "messaging.operation.type": "process",
            "messaging.consumer.group.name": consumer,
            "messaging.batch.message_count": len(self._traceparents),
        }
        links = _links(self._traceparents)
        with self._tracer.start_as_current_span("process batch", kind=SpanKind.CONSUMER, links=links, attributes=attributes):
            yield

    @contextmanager
    def event(self, consumer: str, topic: str, key: str, event_id: str, traceparent: str) -> Iterator[None]:
        """The context of one handler: what it does, and the events it makes, belong to the trace of the event's cause."""
        cause = span_context(traceparent)
        if cause is None and not self._per_event:
            yield
            return
        parent = otel_context.get_current() if cause is None else trace.set_span_in_context(NonRecordingSpan(cause))
        if not self._per_event:
            token = otel_context.attach(parent)
            try:
                yield
            finally:
                otel_context.detach(token)
            return
        with self._tracer.start_as_current_span(
            f"process {topic}",
            context=parent,
            kind=SpanKind.CONSUMER,
            links=[] if cause is None else [Link(cause)],
            attributes={**_attributes("process", topic, key, event_id), "messaging.consumer.group.name": consumer},
            record_exception=False,  # its text may quote the payload
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except Exception as exc:
                span.set_attribute("error.type", type(exc).__qualname__)
                span.set_status(Status(StatusCode.ERROR))
                raise


def _links(traceparents: Sequence[str]) -> list[Link]:
    distinct = dict.fromkeys(traceparents)
    return [Link(found) for text in list(distinct)[:MAX_LINKS] if (found := span_context(text)) is not None]


def _attributes(operation: str, topic: str, key: str, event_id: str) -> dict[str, str]:
    return {
        "messaging.system": "kafka",
        "messaging.operation.type": operation,
        "messaging.destination.name": topic,
        "messaging.kafka.message.key": key,
        "messaging.message.id": event_id,
    }


def _format(found: SpanContext) -> str:
    if not found.is_valid:
        return ""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
