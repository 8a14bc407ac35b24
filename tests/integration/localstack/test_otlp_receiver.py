"""The receiver takes spans from the real exporter and the real Triton, and shows what belongs together to holders of the secret."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import tritonclient.grpc as grpcclient
from localstack import server
from localstack.cache import Silent
from localstack.ports import Ports
from localstack.receiver import OtlpReceiver
from localstack.triton import GRPC_SECRET_METADATA, Triton
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, SpanContext, TraceFlags

SECRET = "only for the test"


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[OtlpReceiver]:
    ports = Ports(tmp_path / "ports.json", random_only=True)
    one = OtlpReceiver(tmp_path / "otlp dir", port=ports.claim("otlp", 0), secret=SECRET, mark=secrets.token_hex(4), log=tmp_path / "log")
    server.run(one, Silent())
    yield one
    one.stop()


def ask(receiver: OtlpReceiver, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=20)
    try:
        connection.request(method, path, body or None, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def query(receiver: OtlpReceiver, question: str) -> dict[str, Any]:
    status, body = ask(receiver, "GET", f"/spans?{question}", Authorization=f"Bearer {SECRET}")
    assert status == 200
    answer: dict[str, Any] = json.loads(body)
    return answer


def until(look: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("compression", list(Compression))
def test_spans_of_the_sdk_become_one_tree_across_traces(receiver: OtlpReceiver, compression: Compression) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "tracker"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.endpoint}/v1/traces", compression=compression)))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("finish", attributes={"headrace.run_id": "r1"}), tracer.start_as_current_span("outbox") as cause:
        pass
    with tracer.start_as_current_span("evaluate", context=None, links=[Link(cause.get_span_context())]):
        pass
    provider.shutdown()

    for question in ("run_id=r1", f"trace_id={cause.get_span_context().trace_id:032x}"):
        answer = query(receiver, question)
        (root,) = answer["tree"]
        assert (root["name"], root["service"], root["attributes"]) == ("finish", "tracker", {"headrace.run_id": "r1"})
        (outbox,) = root["children"]
        (evaluate,) = outbox["children"]
        assert (outbox["name"], evaluate["name"], evaluate["linked"]) == ("outbox", "evaluate", True)
        assert len(answer["spans"]) == 3
    assert query(receiver, "run_id=another")["spans"] == []


def test_triton_joins_the_trace_of_its_caller(receiver: OtlpReceiver, tmp_path: Path) -> None:
    ports = Ports(tmp_path / "triton-ports.json", random_only=True)
    triton = Triton(
        tmp_path / "a dir",
        http_port=ports.claim("http", 0),
        grpc_port=ports.claim("grpc", 0),
        metrics_port=ports.claim("metrics", 0),
        secret="s",
        mark=secrets.token_hex(4),
        log=tmp_path / "triton.log",
        otlp_endpoint=receiver.endpoint,
    )
    server.run(triton, Silent())
    client = grpcclient.InferenceServerClient(triton.grpc)
    try:
        tensor = {"data_type": "TYPE_FP32", "dims": [-1]}
        config = json.dumps({"backend": "python", "input": [{"name": "x", **tensor}], "output": [{"name": "y", **tensor}]})
        shim = b"""
import triton_python_backend_utils as backend

class TritonPythonModel:
    def execute(self, requests):
        same = [backend.Tensor("y", backend.get_input_tensor_by_name(each, "x").as_numpy()) for each in requests]
        return [backend.InferenceResponse([each]) for each in same]
"""
        client.load_model("echo", config=config, files={"file:1/model.py": shim}, headers={GRPC_SECRET_METADATA: "s"})
        asked = grpcclient.InferInput("x", [1], "FP32")
        asked.set_data_from_numpy(numpy.array([1], numpy.float32))
        caller = SpanContext(
            trace_id=secrets.randbits(127) | 1, span_id=secrets.randbits(63) | 1, is_remote=False, trace_flags=TraceFlags(1)
        )
        traceparent = f"00-{caller.trace_id:032x}-{caller.span_id:016x}-01"
        client.infer("echo", [asked], headers={"traceparent": traceparent})
        answer = until(lambda: (found := query(receiver, f"trace_id={caller.trace_id:032x}"))["spans"] and found)
    finally:
        client.close()
        triton.stop()
    (root,) = answer["tree"]
    assert root["service"] == "triton"
    assert root["name"] == "InferRequest"
    assert answer["spans"][0]["parent_id"] == f"{caller.span_id:016x}"
    assert "compute" in json.dumps(root["children"]).lower()


def test_what_was_received_survives_kill_9(receiver: OtlpReceiver) -> None:
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "a" * 32, "spanId": "b" * 16, "name": "kept"}]}]}]}
    assert ask(receiver, "POST", "/v1/traces", json.dumps(body).encode(), Content_Type="application/json") == (200, b"{}")
    server.crash(receiver)
    server.restart(receiver)
    assert query(receiver, f"trace_id={'a' * 32}")["spans"][0]["name"] == "kept"


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", SECRET, "Bearer ü"])
def test_spans_are_not_shown_without_the_secret(receiver: OtlpReceiver, authorization: str) -> None:
    if authorization == SECRET:
        authorization = f"Basic {SECRET}"
    status, body = ask(receiver, "GET", f"/spans?trace_id={'a' * 32}", Authorization=authorization)
    assert (status, b"spans are shown" in body) == (401, True)


def test_bad_requests_are_refused_and_the_server_goes_on(receiver: OtlpReceiver) -> None:
    json_type = {"Content_Type": "application/json"}
    assert ask(receiver, "POST", "/v1/traces", b"{", **json_type)[0] == 400
    assert ask(receiver, "POST", "/v1/traces", b"\xff\xff", Content_Type="application/x-protobuf")[0] == 400
    assert ask(receiver, "POST", "/v1/traces", b"not gzip", Content_Encoding="gzip")[0] == 400
    assert ask(receiver, "POST", "/v1/nothing", b"{}", **json_type)[0] == 404
    assert ask(receiver, "POST", "/v1/traces", b"x", Content_Length="99999999999")[0] == 413
    assert ask(receiver, "POST", "/v1/metrics", b"{}", **json_type) == (200, b"{}")
    assert ask(receiver, "GET", "/spans?trace_id=1&run_id=2", Authorization=f"Bearer {SECRET}")[0] == 404
    assert receiver.ready() is None
