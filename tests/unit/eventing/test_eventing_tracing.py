"""The spans of eventing: one trace from cause to effect at low rates, one span per batch at high ones."""

from __future__ import annotations

import pytest
from eventing import tracing
from eventing.tracing import RateMeter, Tracing, current_traceparent, span_context
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from servicekit.clock import FakeClock

CAUSE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = 0x0AF7651916CD43DD8448EB211C80319C
SPAN = 0xB7AD6B7169203331


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    return exporter


def made(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


@settings(deadline=None)
@given(st.text(max_size=60))
def test_whatever_is_no_traceparent_is_nothing(text):
    found = span_context(text)
    assert found is None or text.startswith("00-")


def test_a_traceparent_names_a_span():
    found = span_context(CAUSE)
    assert (found.trace_id, found.span_id, found.trace_flags, found.is_remote) == (TRACE, SPAN, 1, True)
    assert span_context("00-" + "0" * 32 + "-b7ad6b7169203331-01") is None
    assert current_traceparent() == ""


def test_the_rate_is_that_of_the_last_second():
    clock = FakeClock()
    rate = RateMeter(clock, limit=100)
    assert not rate.add(100)
    assert rate.add(1)
    clock.advance(1.0)
    assert rate.add(1)  # the second that ended was fast
    clock.advance(1.0)
    assert not rate.add(1)


def test_cause_send_and_effect_are_one_trace(spans):
    sender = Tracing(FakeClock())
    (sent,) = sender.sending(["headrace.runs"], ["r"], ["id"], [CAUSE])
    send = made(spans)["send headrace.runs"]
    assert (send.kind, send.context.trace_id, send.parent.span_id) == (SpanKind.PRODUCER, TRACE, SPAN)
    assert span_context(sent).span_id == send.context.span_id

    reader = Tracing(FakeClock())
    batch = reader.batch([sent])
    with batch.whole("evaluator"), batch.event("evaluator", "headrace.runs", "r", "id", sent):
        inside = current_traceparent()
    process = made(spans)["process headrace.runs"]
    assert (process.kind, process.context.trace_id, process.parent.span_id) == (SpanKind.CONSUMER, TRACE, send.context.span_id)
    assert [link.context.span_id for link in process.links] == [send.context.span_id]
    assert span_context(inside).span_id == process.context.span_id  # the handler's own events go on from here
    assert dict(process.attributes)["messaging.consumer.group.name"] == "evaluator"
    assert "process batch" not in made(spans)


def test_an_event_without_a_cause_has_a_span_of_its_own_when_processed(spans):
    assert Tracing(FakeClock()).sending(["headrace.runs"], ["r"], ["id"], [""]) == [""]
    assert made(spans) == {}
    batch = Tracing(FakeClock()).batch([""])
    with batch.event("evaluator", "headrace.runs", "r", "id", ""):
        pass
    assert made(spans)["process headrace.runs"].parent is None


def test_a_failed_handler_is_seen_and_its_words_are_not(spans):
    batch = Tracing(FakeClock()).batch([CAUSE])
    with pytest.raises(ValueError, match="secret"), batch.event("evaluator", "headrace.runs", "r", "id", CAUSE):
        raise ValueError("secret payload")
    span = made(spans)["process headrace.runs"]
    assert not span.status.is_ok
    assert dict(span.attributes)["error.type"] == "ValueError"
    assert span.events == ()
    assert "secret" not in span.to_json()


def test_above_the_rate_spans_stand_for_batches(spans):
    causes = [f"00-{n:032x}-{n:016x}-01" for n in range(1, 151)]
    sender = Tracing(FakeClock())
    assert sender.sending(["headrace.runs"] * 150, ["r"] * 150, ["id"] * 150, causes) == causes
    reader = Tracing(FakeClock())
    batch = reader.batch(causes)
    inside = []
    with batch.whole("evaluator"):
        for cause in causes[:3]:
            with batch.event("evaluator", "headrace.runs", "r", "id", cause):
                inside.append(current_traceparent())
        with batch.event("evaluator", "headrace.runs", "r", "id", ""):
            inside.append(current_traceparent())
    finished = spans.get_finished_spans()
    assert sorted(span.name for span in finished) == ["process batch", "send batch"]
    assert inside[:3] == causes[:3]  # what a handler causes still belongs to the trace of its event
    assert span_context(inside[3]).span_id == made(spans)["process batch"].context.span_id
    for span in finished:
        assert len(span.links) == tracing.MAX_LINKS
        assert dict(span.attributes)["messaging.batch.message_count"] == 150
