"""Traces and metrics as they leave the process: over OTLP to a server that reads them, sampled as decided, waiting for no dead one."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from servicekit import telemetry
from servicekit.errors import Internal, NotFound, Unavailable
from servicekit.settings import ServiceSettings


class Collector(ThreadingHTTPServer):
    """Takes OTLP/HTTP in protobuf and keeps it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Take)
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/traces":
            self.server.traces.append(ExportTraceServiceRequest.FromString(body))
        elif self.path == "/v1/metrics":
            self.server.metrics.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


Recorded = Callable[[], tuple[ReadableSpan, ...]]


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    """The finished spans of a process that samples the share that the test names."""
    exporter = InMemorySpanExporter()
    active = telemetry.setup("tracker", ServiceSettings(trace_sample_ratio=request.param), span_exporters=[exporter])
    yield exporter.get_finished_spans
    active.shutdown()


always, never = pytest.mark.parametrize("recorded", [1.0], indirect=True), pytest.mark.parametrize("recorded", [0.0], indirect=True)


def test_spans_and_metrics_reach_a_collector(collector: Collector) -> None:
    active = telemetry.setup("tracker", ServiceSettings(otlp_endpoint=collector.url + "/", trace_sample_ratio=1.0))
    with telemetry.start_span("finish run", SpanKind.SERVER, attributes={"run.id": "abc"}):
        telemetry.meter().create_counter("runs").add(2)
    active.shutdown()
    active.shutdown()
    (resource_spans,) = collector.traces[0].resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in resource_spans.resource.attributes}
    assert resource["service.name"] == "tracker"
    (span,) = resource_spans.scope_spans[0].spans
    assert (span.name, span.attributes[0].key, span.attributes[0].value.string_value) == ("finish run", "run.id", "abc")
    metrics = [m for r in collector.metrics for rm in r.resource_metrics for sm in rm.scope_metrics for m in sm.metrics]
    assert [(m.name, m.sum.data_points[0].as_int) for m in metrics if m.name == "runs"] == [("runs", 2)]


async def test_spans_arrive_by_themselves(collector: Collector) -> None:
    active = telemetry.setup("tracker", ServiceSettings(otlp_endpoint=collector.url, trace_sample_ratio=1.0))
    with telemetry.start_span("now"):
        pass
    async with asyncio.timeout(20):
        while not collector.traces:  # noqa: ASYNC110  # they come by another thread
            await asyncio.sleep(0.02)
    await asyncio.to_thread(active.shutdown)


async def test_a_collector_that_is_away_stops_nothing() -> None:
    active = telemetry.setup("tracker", ServiceSettings(otlp_endpoint="http://127.0.0.1:1", trace_sample_ratio=1.0))
    with telemetry.start_span("lost"):
        telemetry.meter().create_counter("runs").add(1)
    async with asyncio.timeout(30):
        await asyncio.to_thread(active.shutdown)


@always
def test_children_parents_and_links(recorded: Recorded) -> None:
    with telemetry.start_span("first") as first:
        stored = telemetry.current_traceparent()
    assert telemetry.current_traceparent() == ""
    with telemetry.start_span("child", parent=telemetry.context_from(stored)) as child:
        pass
    with telemetry.start_span("linked", links=[stored, "", "nonsense", None]) as linked:
        pass
    first_span, child_span, linked_span = recorded()
    assert child_span.parent is not None
    assert child_span.parent.span_id == first.get_span_context().span_id
    assert child.get_span_context().trace_id == first.get_span_context().trace_id
    assert linked.get_span_context().trace_id != first.get_span_context().trace_id
    assert [link.context.span_id for link in linked_span.links] == [first.get_span_context().span_id]
    assert first_span.parent is None


@pytest.mark.parametrize("recorded", [1.0], indirect=True)
@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_says_nothing_begins_a_new_trace(recorded: Recorded, traceparent: str) -> None:
    with (
        telemetry.start_span("current") as current,
        telemetry.start_span("new", parent=telemetry.context_from(traceparent)) as new,
    ):
        assert new.get_span_context().trace_id != current.get_span_context().trace_id
    assert telemetry.link_to(traceparent) is None


@never
def test_a_parents_decision_is_followed(recorded: Recorded) -> None:
    sampled, unsampled = (f"00-{'a' * 32}-{'b' * 16}-{flags}" for flags in ("01", "00"))
    with telemetry.start_span("sampled elsewhere", parent=telemetry.context_from(sampled)):
        assert is_sampled(telemetry.current_traceparent())
        assert "a" * 32 in telemetry.current_traceparent()
    with telemetry.start_span("not sampled elsewhere", parent=telemetry.context_from(unsampled)):
        assert not is_sampled(telemetry.current_traceparent())
    with telemetry.start_span("begun here"):
        assert not is_sampled(telemetry.current_traceparent())
    assert [span.name for span in recorded()] == ["sampled elsewhere"]


def is_sampled(traceparent: str) -> bool:
    """The lowest bit of the flags (W3C Trace Context); the next says that the trace id is random."""
    return bool(int(traceparent.rpartition("-")[2], 16) & 1)


def fail(error: BaseException, **options: Any) -> Any:
    with telemetry.start_span("work", **options) as span:
        raise error
    return span


@always
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("the payload"), StatusCode.ERROR),
        (Unavailable("the payload"), StatusCode.ERROR),
        (NotFound("the payload"), StatusCode.UNSET),
        (asyncio.CancelledError("the payload"), StatusCode.UNSET),
    ],
)
def test_a_span_tells_the_class_of_its_error_and_no_more(recorded: Recorded, error: BaseException, status: StatusCode) -> None:
    with pytest.raises(type(error)):
        fail(error)
    (span,) = recorded()
    assert span.status.status_code is status
    assert span.attributes is not None
    assert span.attributes[telemetry.ERROR_TYPE] == type(error).__qualname__
    assert "payload" not in span.to_json()
    assert telemetry.ERROR_SPAN not in span.attributes


@never
def test_errors_are_recorded_though_their_trace_is_not(recorded: Recorded) -> None:
    traceparents = []

    def inner() -> None:
        with telemetry.start_span("inner", attributes={"run.id": "abc"}):
            traceparents.append(telemetry.current_traceparent())
            raise Internal("internal error 42", error_id="42")

    def outer() -> None:
        with telemetry.start_span("outer"):
            traceparents.append(telemetry.current_traceparent())
            inner()

    with pytest.raises(Internal):
        outer()
    inner_span, outer_span = recorded()
    assert [span.name for span in (inner_span, outer_span)] == ["inner", "outer"]
    # The ids are those that logs and callees saw before anyone knew that there would be an error.
    for span, traceparent in zip((outer_span, inner_span), traceparents, strict=True):
        assert traceparent.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")
        assert not is_sampled(traceparent)
    assert inner_span.parent is not None
    assert inner_span.parent.span_id == outer_span.context.span_id
    assert inner_span.attributes is not None
    assert inner_span.attributes["run.id"] == "abc"
    assert inner_span.attributes[telemetry.ERROR_ID] == "42"
    assert inner_span.attributes[telemetry.ERROR_SPAN] is True
    assert inner_span.status.status_code is StatusCode.ERROR
    assert inner_span.start_time is not None
    assert inner_span.end_time is not None
    assert inner_span.start_time <= inner_span.end_time


@never
def test_the_callers_fault_leaves_no_span_in_a_trace_that_is_not_recorded(recorded: Recorded) -> None:
    with pytest.raises(NotFound):
        fail(NotFound("no run"))
    with pytest.raises(ValueError, match="bug"):
        fail(ValueError("bug"), parent=telemetry.context_from(f"00-{'a' * 32}-{'b' * 16}-00"))
    (span,) = recorded()
    assert span.context.trace_id == int("a" * 32, 16)
    assert span.parent is not None
    assert span.parent.span_id == int("b" * 16, 16)


def test_without_a_set_up_traces_still_pass_through() -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    with telemetry.start_span("quiet", parent=telemetry.context_from(traceparent)):
        assert telemetry.current_traceparent() == traceparent
    with pytest.raises(ValueError, match="x"):
        fail(ValueError("x"))
    telemetry.meter().create_counter("nothing").add(1)
