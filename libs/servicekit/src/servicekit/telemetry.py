"""Traces and metrics over OTLP, and logs as JSON lines that carry the trace they belong to.

Whether a trace is recorded is decided before its first span exists, and its children follow. An error inside a trace that
is not recorded still leaves a span: it is made, with the ids and the start of the unrecorded one, when the error comes by.
Spans and metrics hold names, ids, sizes and classes of errors, never a message, a payload or a secret.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes, AttributeValue

from servicekit.clock import SystemIds
from servicekit.errors import HeadraceError, Invalid
from servicekit.jsonlog import JsonFormatter, Seldom
from servicekit.settings import ServiceSettings

SCOPE = "headrace"
"""The instrumentation scope of spans and metrics that name none of their own."""

SPAN_DELAY_MS = 500
"""Spans are sent in batches, at the latest this long after they ended."""

METRIC_INTERVAL_MS = 5_000

EXPORT_TIMEOUT_S = 3
"""A collector gets this long for a batch, attempts included; then the batch is dropped. So long a shutdown may wait for it, too."""

# Attributes of spans.
ERROR_TYPE = "error.type"
ERROR_ID = "headrace.error_id"
ERROR_SPAN = "headrace.error_span"
"""True on a span that was made because of an error in a trace that is not recorded: its siblings and children are missing."""

_PROPAGATOR = TraceContextTextMapPropagator()
_log = logging.getLogger(__name__)


class _ErrorsAlways(Sampler):
    """Records what is marked as an error span; for all else asks the sampler given."""

    def __init__(self, otherwise: Sampler) -> None:
        self._otherwise = otherwise

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        sampler = ALWAYS_ON if attributes and attributes.get(ERROR_SPAN) else self._otherwise
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"ErrorsAlways({self._otherwise.get_description()})"


_same_as: ContextVar[SpanContext | None] = ContextVar("headrace_same_as", default=None)


class _Identities(RandomIdGenerator):
    """Random ids, but those of the span it stands for when an error span is made."""

    def generate_span_id(self) -> int:
        twin = _same_as.get()
        return twin.span_id if twin else super().generate_span_id()

    def generate_trace_id(self) -> int:
        twin = _same_as.get()
        return twin.trace_id if twin else super().generate_trace_id()


class Telemetry:
    """What `setup` made; `shutdown` sends what is left and takes it down again. One is active at a time."""

    def __init__(self, tracer_provider: TracerProvider, meter_provider: MeterProvider, log_handler: logging.Handler) -> None:
        self.tracer_provider = tracer_provider
        self.meter_provider = meter_provider
        self._log_handler = log_handler
        self._down = False

    def flush(self) -> None:
        """Sends the spans that have ended. Blocks until they are sent or given up; does not tell which."""
        self.tracer_provider.force_flush()

    def shutdown(self) -> None:
        """Sends what is left, then stops. Blocks for some seconds at most when the collector is away. May be repeated."""
        global _active
        if _active is self:
            _active = None
        if self._down:
            return
        self._down = True
        # Side by side, so that a collector that is away is waited for once.
        with ThreadPoolExecutor(2) as threads:
            ends = [threads.submit(self.tracer_provider.shutdown), threads.submit(self.meter_provider.shutdown)]
        for end in ends:
            end.result()
        logging.getLogger().removeHandler(self._log_handler)


_active: Telemetry | None = None


def setup(
    service_name: str,
    settings: ServiceSettings,
    *,
    span_exporters: Sequence[SpanExporter] = (),
    metric_readers: Sequence[MetricReader] = (),
    log_stream: TextIO | None = None,
) -> Telemetry:
    """Starts logging, tracing and metrics of this process by its settings; call it once, before anything else is started.

    Without `otlp_endpoint` nothing is sent, but trace ids are still made and passed on. The exporters and readers given are
    added to those of the settings (tests read from them).
    """
    global _active
    handler = logging.StreamHandler(log_stream or sys.stdout)
    handler.setFormatter(JsonFormatter(service_name))
    handler.addFilter(Seldom("opentelemetry.exporter"))  # a collector that is away is no news twice a second
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every address that it asks, presigned ones with their signature

    resource = Resource.create({"service.name": service_name, "service.instance.id": str(SystemIds().uuid7())})
    sampler = _ErrorsAlways(ParentBased(root=TraceIdRatioBased(settings.trace_sample_ratio)))
    tracer_provider = TracerProvider(resource=resource, sampler=sampler, id_generator=_Identities(), shutdown_on_exit=False)
    readers = list(metric_readers)
    if settings.otlp_endpoint:
        base = settings.otlp_endpoint.rstrip("/")
        to_traces = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        to_metrics = OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=EXPORT_TIMEOUT_S)
        tracer_provider.add_span_processor(BatchSpanProcessor(to_traces, schedule_delay_millis=SPAN_DELAY_MS))
        readers.append(PeriodicExportingMetricReader(to_metrics, export_interval_millis=METRIC_INTERVAL_MS))
    for exporter in span_exporters:
        tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    meter_provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)

    # OpenTelemetry's own globals can be set once per process only; libraries that ask them get the first set-up.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(tracer_provider)
        metrics.set_meter_provider(meter_provider)
    _active = Telemetry(tracer_provider, meter_provider, handler)
    return _active


def tracer(name: str = SCOPE) -> Tracer:
    """A tracer of the active set-up; without one its spans are not recorded but pass their parent's trace on."""
    return _active.tracer_provider.get_tracer(name) if _active else trace.NoOpTracerProvider().get_tracer(name)


def meter(name: str = SCOPE) -> Meter:
    """A meter of the active set-up; without one what is measured goes nowhere. Ask for it after `setup`, not at import."""
    return _active.meter_provider.get_meter(name) if _active else metrics.NoOpMeterProvider().get_meter(name)


def current_traceparent() -> str:
    """The W3C traceparent of the current span, to be stored or sent along; empty when there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def context_from(traceparent: str) -> Context:
    """The context to give as `parent`; for an empty or malformed traceparent one that begins a new trace."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())


def link_to(traceparent: str) -> Link | None:
    """A link to the span that a stored traceparent names; None when it names none."""
    span_context = trace.get_current_span(context_from(traceparent)).get_span_context()
    return Link(span_context) if span_context.is_valid else None


class OpenSpan:
    """A span that somebody must `end`; it is not the current one of its own accord."""

    def __init__(
        self,
        name: str,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
        links: Sequence[Link | str | None] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        made = [link for link in (link_to(one) if isinstance(one, str) else one for one in links) if link is not None]
        self._parent = otel_context.get_current() if parent is None else parent
        self._again = {"name": name, "kind": kind, "links": made, "start_time": time.time_ns()}
        self._attributes = dict(attributes or {})
        self.span = self._start(self._attributes)

    def tell(self, attributes: Mapping[str, AttributeValue], *, name: str = "") -> None:
        """Adds what was not known at the start, and gives the span another name if one is given."""
        self._attributes.update(attributes)
        self.span.set_attributes(attributes)
        if name:
            self._again["name"] = name
            self.span.update_name(name)

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span; with an error as the head of this file says."""
        if error is not None:
            record_error(self.span, error)
            identity = self.span.get_span_context()
            if _is_error(error) and not self.span.is_recording() and identity.is_valid:
                # It takes the ids of the span that was not recorded, so that logs, parents and children name the same one.
                token = _same_as.set(identity)
                try:
                    twin = self._start({**self._attributes, ERROR_SPAN: True})
                finally:
                    _same_as.reset(token)
                record_error(twin, error)
                twin.end()
        self.span.end()

    def _start(self, attributes: Mapping[str, AttributeValue]) -> Span:
        return tracer().start_span(context=self._parent, attributes=attributes, **self._again)  # type: ignore[arg-type]  # as above


@contextmanager
def start_span(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
    links: Sequence[Link | str | None] = (),
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Iterator[Span]:
    """Runs the block within a span: child of `parent`, or of the current span when that is None.

    `links` may be traceparents; those that name no span are left out. An exception that leaves the block is told on the span by
    its class alone. It makes the span an error unless it is the caller's fault (`Invalid`) or a cancellation; see the head of
    this file for what then happens in a trace that is not recorded. Not for the body of an async generator, between whose
    items other code would run within the span: `OpenSpan` is.
    """
    opened = OpenSpan(name, kind, parent, links, attributes)
    try:
        with trace.use_span(opened.span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield opened.span
    except BaseException as error:
        opened.end(error)
        raise
    opened.end()


def record_error(span: Span, error: BaseException) -> None:
    """Tells a span of an error: its class always, its id if it has one, and the status unless the caller is at fault."""
    span.set_attribute(ERROR_TYPE, type(error).__qualname__)
    if isinstance(error, HeadraceError) and error.error_id:
        span.set_attribute(ERROR_ID, error.error_id)
    if _is_error(error):
        span.set_status(Status(StatusCode.ERROR))


def _is_error(error: BaseException) -> bool:
    return not isinstance(error, Invalid | asyncio.CancelledError | GeneratorExit)
