"""The gRPC server and channel against each other over real sockets: identity, deadlines, errors, streams, traces, retries, shutdown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc
import pytest
from contracts.trainer.v1 import service_pb2 as pb
from contracts.trainer.v1 import service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from servicekit import access, rpc, telemetry
from servicekit.access import ANYONE, Caller, Rule
from servicekit.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    HeadraceError,
    Internal,
    Invalid,
    NotFound,
    TooLarge,
    Transient,
    Unauthenticated,
    Unavailable,
    Violation,
)
from servicekit.settings import ServiceSettings

SERVICE = "headrace.trainer.v1.TrainerService"
GET, SUBMIT, LIST, STREAM = (f"/{SERVICE}/{name}" for name in ("GetTraining", "SubmitTraining", "ListTrainings", "StreamLog"))
GATEWAY_TOKEN, GATEWAY_HASH = access.new_service_token("gateway")
TRACKER_TOKEN, TRACKER_HASH = access.new_service_token("tracker")

RULES = {
    GET: Rule(services={"gateway", "tracker"}, roles=ANYONE),
    SUBMIT: Rule(services={"gateway"}, roles={"editor"}, runs=True),
    STREAM: Rule(services={"tracker"}),
}


class Settings(ServiceSettings):
    service_name: ClassVar[str] = "trainer"


def settings(token: str = "", **fields: Any) -> Settings:
    return Settings.model_validate(
        {
            "service_token": token,
            "service_token_hashes": f"gateway={GATEWAY_HASH},tracker={TRACKER_HASH}",
            "shutdown_grace_s": 2,
            "trace_sample_ratio": 1.0,
            **fields,
        }
    )


class FakeTrainer(pb_grpc.TrainerServiceServicer):
    """Does what the test tells it to."""

    def __init__(self) -> None:
        self.answer: Callable[[Any], Any] = lambda request: None
        self.callers: list[Caller] = []
        self.time_left: list[float | None] = []
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.stream_closed = asyncio.Event()

    async def GetTraining(self, request: pb.GetTrainingRequest, context: Any) -> pb.GetTrainingResponse:
        self.callers.append(access.current_caller())
        self.time_left.append(rpc.time_left())
        self.entered.set()
        result = self.answer(request)
        if asyncio.iscoroutine(result):
            result = await result
        return pb.GetTrainingResponse(training=pb.Training(training_id=request.training_id, status=result or "running"))

    async def ListTrainings(self, request: pb.ListTrainingsRequest, context: Any) -> pb.ListTrainingsResponse:
        raise AssertionError("no rule allows this")

    async def CancelTraining(self, request: pb.CancelTrainingRequest, context: Any) -> pb.CancelTrainingResponse:
        raise AssertionError("no rule allows this")

    async def StartSourceUpload(self, request: pb.StartSourceUploadRequest, context: Any) -> pb.StartSourceUploadResponse:
        raise AssertionError("no rule allows this")

    async def SubmitTraining(self, request: pb.SubmitTrainingRequest, context: Any) -> pb.SubmitTrainingResponse:
        self.callers.append(access.current_caller())
        return pb.SubmitTrainingResponse(training=pb.Training(training_id="t"))

    async def StreamLog(self, request: pb.StreamLogRequest, context: Any) -> AsyncIterator[pb.StreamLogResponse]:
        self.callers.append(access.current_caller())
        try:
            for offset in range(request.offset, request.offset + 3):
                yield pb.StreamLogResponse(offset=offset, data=b"line")
            if request.training_id == "missing":
                raise NotFound("no such training", [Violation("training_id", "is unknown")])
            if request.follow:
                self.entered.set()
                await self.release.wait()
        finally:
            self.stream_closed.set()


@asynccontextmanager
async def serving(trainer: FakeTrainer, address: str = "127.0.0.1:0", **fields: Any) -> AsyncIterator[int]:
    server = rpc.Server(address, settings(**fields), RULES)
    server.add(pb_grpc.add_TrainerServiceServicer_to_server, trainer, SERVICE)
    port = await server.start()
    assert server.listening() == {"grpc": port}
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def stub_for(port: int, token: str = TRACKER_TOKEN, **options: Any) -> AsyncIterator[Any]:
    async with rpc.channel(f"127.0.0.1:{port}", settings(token), **options) as channel:
        yield pb_grpc.TrainerServiceStub(channel)


@pytest.fixture
async def trainer() -> FakeTrainer:
    return FakeTrainer()


async def test_a_known_service_is_served(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        response = await stub.GetTraining(pb.GetTrainingRequest(training_id="abc"))
    assert response.training.training_id == "abc"
    assert trainer.callers == [Caller(service="tracker")]


@pytest.mark.parametrize("token", ["", "tracker.wrong", TRACKER_TOKEN + "x"])
async def test_nobody_gets_in_without_a_token(trainer: FakeTrainer, token: str) -> None:
    async with serving(trainer) as port, stub_for(port, token) as stub:
        with pytest.raises(Unauthenticated):
            await stub.GetTraining(pb.GetTrainingRequest())
        with pytest.raises(Unauthenticated):
            _ = [line async for line in stub.StreamLog(pb.StreamLogRequest())]
    assert trainer.callers == []


async def test_what_has_no_rule_is_denied(trainer: FakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with serving(trainer) as port, stub_for(port) as stub:
            with pytest.raises(Forbidden):
                await stub.ListTrainings(pb.ListTrainingsRequest())
            with pytest.raises(Forbidden):
                await stub.SubmitTraining(pb.SubmitTrainingRequest())
    assert LIST in caplog.text  # a method that was forgotten in the table is named at start
    assert trainer.callers == []


async def test_a_rule_for_a_method_that_does_not_exist_stops_the_start(trainer: FakeTrainer) -> None:
    server = rpc.Server("127.0.0.1:0", settings(), {f"/{SERVICE}/GetTrainnig": Rule(services={"gateway"}, roles=ANYONE)})
    server.add(pb_grpc.add_TrainerServiceServicer_to_server, trainer, SERVICE)
    with pytest.raises(ValueError, match="GetTrainnig"):
        await server.start()


async def test_the_gateway_acts_for_its_user(trainer: FakeTrainer) -> None:
    ann = Caller("gateway", "ann", frozenset({"editor", "viewer"}), run_id="f" * 32, fencing_token=4)
    async with serving(trainer) as port, stub_for(port, GATEWAY_TOKEN) as stub:
        with rpc.acting_for(ann):
            await stub.SubmitTraining(pb.SubmitTrainingRequest())
        with rpc.acting_for(Caller("gateway", "bob", frozenset({"viewer"}))), pytest.raises(Forbidden, match="editor"):
            await stub.SubmitTraining(pb.SubmitTrainingRequest())
        with pytest.raises(Forbidden):
            await stub.SubmitTraining(pb.SubmitTrainingRequest())
    assert trainer.callers == [ann]


async def test_another_service_is_not_believed_about_users(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        with rpc.acting_for(Caller("gateway", "eve", frozenset({"admin"}))):
            await stub.GetTraining(pb.GetTrainingRequest())
    assert trainer.callers == [Caller(service="tracker")]


@pytest.mark.parametrize(
    "error",
    [
        Invalid("wrong", [Violation("a.b", "no", line=3), Violation("c", "never")]),
        NotFound("no training"),
        Conflict("it has ended"),
        TooLarge("too many"),
        Unavailable("the store is away"),
        DeadlineExceeded("too slow"),
    ],
)
async def test_errors_arrive_as_they_were_raised(trainer: FakeTrainer, error: HeadraceError) -> None:
    def fail(request: object) -> None:
        raise error

    trainer.answer = fail
    async with serving(trainer) as port, stub_for(port) as stub:
        with pytest.raises(HeadraceError) as caught:
            await stub.GetTraining(pb.GetTrainingRequest())
    assert type(caught.value) is type(error)
    assert (caught.value.message, caught.value.violations) == (error.message, error.violations)


async def test_a_bug_tells_its_id_only(trainer: FakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: object) -> None:
        raise KeyError("the secret inside")

    trainer.answer = fail
    async with serving(trainer) as port, stub_for(port) as stub:
        with pytest.raises(Internal) as caught:
            await stub.GetTraining(pb.GetTrainingRequest())
    assert "secret" not in str(caught.value)
    assert caught.value.error_id
    logged = [record for record in caplog.records if caught.value.error_id in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info is not None


async def test_the_status_is_the_standard_rich_one(trainer: FakeTrainer) -> None:
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # publishes no types

    def fail(request: object) -> None:
        raise Invalid("wrong", [Violation("a.b", "no", line=3)])

    trainer.answer = fail
    async with serving(trainer) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
        stub: Any = pb_grpc.TrainerServiceStub(bare)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetTraining(pb.GetTrainingRequest(), timeout=5, metadata=[("authorization", f"Bearer {TRACKER_TOKEN}")])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailing = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert [(v.field, v.description) for v in bad_request.field_violations] == [("a.b", "no")]


async def test_a_deadline_is_required(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
        stub: Any = pb_grpc.TrainerServiceStub(bare)
        with pytest.raises(grpc.aio.AioRpcError, match="deadline") as caught:
            await stub.GetTraining(pb.GetTrainingRequest(), metadata=[("authorization", f"Bearer {TRACKER_TOKEN}")])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trainer.callers == []


async def test_deadlines_are_given_inherited_and_capped(trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        await stub.GetTraining(pb.GetTrainingRequest())
        await stub.GetTraining(pb.GetTrainingRequest(), timeout=600)

        async def ask_again(request: pb.GetTrainingRequest) -> str:
            if request.training_id == "outer":
                await stub.GetTraining(pb.GetTrainingRequest(training_id="inner"), timeout=600)
            return "done"

        trainer.answer = ask_again
        await stub.GetTraining(pb.GetTrainingRequest(training_id="outer"), timeout=5)
    by_default, capped, outer, inner = (left or 0.0 for left in trainer.time_left)
    rounding = 0.1  # gRPC rounds the time it sends up
    assert by_default <= rpc.DEFAULT_DEADLINE_S + rounding
    assert capped <= rpc.MAX_DEADLINE_S
    assert inner <= outer + rounding <= 5 + 2 * rounding


async def test_work_past_its_deadline_is_stopped(trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = asyncio.Event()

    async def hang(request: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    trainer.answer = hang
    monkeypatch.setattr(rpc, "MAX_DEADLINE_S", 0.05)
    async with serving(trainer) as port, stub_for(port) as stub:
        with pytest.raises(DeadlineExceeded, match=r"took longer than"):
            await stub.GetTraining(pb.GetTrainingRequest(), timeout=30)  # the server's cap, told by the server
        await asyncio.wait_for(stopped.wait(), 10)
        stopped.clear()
        with pytest.raises(DeadlineExceeded):
            await stub.GetTraining(pb.GetTrainingRequest(), timeout=0.04)
        with pytest.raises(DeadlineExceeded):
            await stub.GetTraining(pb.GetTrainingRequest(), timeout=0)


async def test_streams_pass_through(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        offsets = [line.offset async for line in stub.StreamLog(pb.StreamLogRequest(offset=5))]
        assert offsets == [5, 6, 7]
        got: list[int] = []

        async def read() -> None:
            async for line in stub.StreamLog(pb.StreamLogRequest(training_id="missing")):
                got.append(line.offset)

        with pytest.raises(NotFound) as caught:
            await read()
        assert got == [0, 1, 2]
        assert caught.value.violations == (Violation("training_id", "is unknown"),)
    assert trainer.callers == [Caller(service="tracker")] * 2


async def test_a_reader_that_leaves_stops_the_writer(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        lines = stub.StreamLog(pb.StreamLogRequest(follow=True))
        async for _ in lines:
            break
        await lines.aclose()
        await asyncio.wait_for(trainer.stream_closed.wait(), 10)
    assert not trainer.release.is_set()


async def test_messages_over_the_limit_are_too_large_and_not_transient(trainer: FakeTrainer) -> None:
    async with serving(trainer, grpc_max_message_bytes=1000) as port, stub_for(port) as stub:
        with pytest.raises(TooLarge):
            await stub.GetTraining(pb.GetTrainingRequest(training_id="x" * 2000))


async def test_a_server_that_is_away_is_unavailable() -> None:
    async with rpc.channel("127.0.0.1:1", settings(TRACKER_TOKEN)) as channel:
        stub: Any = pb_grpc.TrainerServiceStub(channel)
        with pytest.raises(Unavailable):
            await stub.GetTraining(pb.GetTrainingRequest())


async def test_only_idempotent_methods_are_tried_again(trainer: FakeTrainer) -> None:
    calls = 0

    def fail_twice(request: object) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Unavailable("not yet")

    trainer.answer = fail_twice
    async with serving(trainer) as port:
        async with stub_for(port, idempotent=[GET]) as stub:
            await stub.GetTraining(pb.GetTrainingRequest())
        assert calls == 3
        calls = 0
        async with stub_for(port) as stub:
            with pytest.raises(Unavailable):
                await stub.GetTraining(pb.GetTrainingRequest())
        assert calls == 1
    with pytest.raises(ValueError, match="GetTraining"):
        rpc.channel("127.0.0.1:1", settings(), idempotent=["GetTraining"])


async def test_a_channel_finds_a_server_that_comes_back(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port) as stub:
        await stub.GetTraining(pb.GetTrainingRequest())
    async with stub_for(port) as stub:
        with pytest.raises(Transient):
            await stub.GetTraining(pb.GetTrainingRequest())
        async with serving(trainer, f"127.0.0.1:{port}"):
            async with asyncio.timeout(20):
                while True:
                    try:
                        await stub.GetTraining(pb.GetTrainingRequest())
                        break
                    except Transient:
                        await asyncio.sleep(0.05)


async def test_calls_in_flight_are_limited(trainer: FakeTrainer) -> None:
    running = most = 0
    full = asyncio.Event()

    async def count(request: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            full.set()
        await trainer.release.wait()
        running -= 1

    trainer.answer = count
    async with serving(trainer) as port, stub_for(port, max_in_flight=3) as stub:
        calls = [asyncio.create_task(stub.GetTraining(pb.GetTrainingRequest())) for _ in range(10)]
        await asyncio.wait_for(full.wait(), 10)
        with pytest.raises(DeadlineExceeded, match="free"):
            await stub.GetTraining(pb.GetTrainingRequest(), timeout=0.05)
        trainer.release.set()
        await asyncio.gather(*calls)
    assert most == 3


async def test_two_thousand_calls_at_once_all_arrive(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port, stub_for(port, deadline_s=60) as stub:
        answers = await asyncio.gather(*(stub.GetTraining(pb.GetTrainingRequest(training_id=str(n))) for n in range(2500)))
    assert [answer.training.training_id for answer in answers] == [str(n) for n in range(2500)]


async def test_stopping_lets_calls_end_and_says_not_serving(trainer: FakeTrainer) -> None:
    async def wait(request: object) -> str:
        await trainer.release.wait()
        return "finished"

    trainer.answer = wait
    server = rpc.Server("127.0.0.1:0", settings(), RULES)
    server.add(pb_grpc.add_TrainerServiceServicer_to_server, trainer, SERVICE)
    port = await server.start()
    async with stub_for(port) as stub, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
        health: Any = health_pb2_grpc.HealthStub(bare)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request, timeout=20)
        statuses = aiter(watch)
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING
        call = asyncio.create_task(stub.GetTraining(pb.GetTrainingRequest()))
        await asyncio.wait_for(trainer.entered.wait(), 10)
        stopping = asyncio.create_task(server.stop(10))
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        trainer.release.set()
        assert (await call).training.status == "finished"
        await stopping
        with pytest.raises(Transient):
            await stub.GetTraining(pb.GetTrainingRequest())


async def test_a_port_that_is_taken_is_an_error(trainer: FakeTrainer) -> None:
    async with serving(trainer) as port:
        second = rpc.Server(f"127.0.0.1:{port}", settings(), {})
        with pytest.raises(OSError, match=str(port)):
            await second.start()


async def test_reflection_needs_a_known_service(trainer: FakeTrainer) -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with serving(trainer) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as bare:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(bare)
        metadata = [("authorization", f"Bearer {TRACKER_TOKEN}")]
        answers = [answer async for answer in stub.ServerReflectionInfo(ask(), timeout=5, metadata=metadata)]
        assert SERVICE in [service.name for service in answers[0].list_services_response.service]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [answer async for answer in stub.ServerReflectionInfo(ask(), timeout=5)]
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_one_trace_over_client_and_server(trainer: FakeTrainer) -> None:
    spans, metrics = InMemorySpanExporter(), InMemoryMetricReader()
    active = telemetry.setup("trainer", settings(), span_exporters=[spans], metric_readers=[metrics])
    try:
        async with serving(trainer) as port, stub_for(port) as stub:
            with telemetry.start_span("outer"):
                await stub.GetTraining(pb.GetTrainingRequest(training_id="payload-of-the-user"))
                _ = [line async for line in stub.StreamLog(pb.StreamLogRequest())]
        data = metrics.get_metrics_data()
    finally:
        active.shutdown()
    finished = {(span.name, span.kind): span for span in spans.get_finished_spans()}
    outer = finished["outer", SpanKind.INTERNAL]
    for method in (GET, STREAM):
        client, server = finished[method[1:], SpanKind.CLIENT], finished[method[1:], SpanKind.SERVER]
        assert client.parent is not None
        assert client.parent.span_id == outer.context.span_id
        assert server.parent is not None
        assert server.parent.span_id == client.context.span_id
        assert server.context.trace_id == outer.context.trace_id
        assert "payload-of-the-user" not in server.to_json() + client.to_json()
        assert TRACKER_TOKEN not in server.to_json() + client.to_json()
    assert data is not None
    recorded = data.to_json()
    assert rpc.SERVER_DURATION in recorded
    assert rpc.CLIENT_DURATION in recorded


async def test_an_error_leaves_a_span_though_the_trace_is_not_recorded(trainer: FakeTrainer) -> None:
    def fail(request: object) -> None:
        raise KeyError("inside")

    spans = InMemorySpanExporter()
    active = telemetry.setup("trainer", settings(trace_sample_ratio=0), span_exporters=[spans])
    try:
        async with serving(trainer) as port, stub_for(port) as stub:
            await stub.GetTraining(pb.GetTrainingRequest())
            assert spans.get_finished_spans() == ()
            trainer.answer = fail
            with pytest.raises(Internal) as caught:
                await stub.GetTraining(pb.GetTrainingRequest())
    finally:
        active.shutdown()
    server, client = spans.get_finished_spans()
    assert (server.kind, client.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert server.parent is not None
    assert server.parent.span_id == client.context.span_id
    assert server.context.trace_id == client.context.trace_id
    assert server.status.status_code is StatusCode.ERROR
    assert server.attributes is not None
    assert server.attributes[telemetry.ERROR_ID] == caught.value.error_id
    assert "inside" not in server.to_json()
