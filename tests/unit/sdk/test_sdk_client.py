"""The client against a small HTTP server: what is repeated, what is not, and how errors are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from headrace.config import Connection
from headrace.datasets import DatasetVersion, pull_dataset, push_dataset
from headrace.http import Client, Denied, HeadraceError, InvalidInput, Unreachable
from headrace.runs import Run, start_run

Reply = tuple[int, dict[str, Any]]


class Gateway(ThreadingHTTPServer):
    """Answers by a function of (method, path, body), and remembers every request."""

    def __init__(self, answer: Callable[[str, str, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[tuple[str, str, dict[str, Any], str]] = []

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for _, asked, body, _ in self.requests if asked == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else {}
        self.server.requests.append((self.command, self.path, body, self.headers.get("authorization", "")))
        status, answer = self.server.answer(self.command, self.path, body)
        told = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def gateway() -> Iterator[Callable[[Callable[[str, str, dict[str, Any]], Reply]], Gateway]]:
    running: list[Gateway] = []

    def make(answer: Callable[[str, str, dict[str, Any]], Reply]) -> Gateway:
        server = Gateway(answer)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.http.time.sleep", lambda _: None)


def client_of(server: Gateway) -> Client:
    return Client(Connection(f"http://127.0.0.1:{server.server_address[1]}", "hr_k_secret"), patience_s=0.5)


MakeGateway = Callable[[Callable[[str, str, dict[str, Any]], Reply]], Gateway]


def error(code: str, message: str = "no", violations: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "violations": violations or []}}


def test_a_repeatable_call_survives_a_gateway_that_is_busy_for_a_moment(gateway: MakeGateway) -> None:
    replies = iter([(503, error("UNAVAILABLE")), (429, error("EXHAUSTED")), (200, {"ok": 1})])
    server = gateway(lambda *_: next(replies))
    with client_of(server) as client:
        assert client.get("/api/v1/x", a=1, b=None) == {"ok": 1}
    assert [path for _, path, _, _ in server.requests] == ["/api/v1/x?a=1"] * 3
    assert {token for *_, token in server.requests} == {"Bearer hr_k_secret"}


def test_a_call_that_may_not_be_repeated_is_sent_once(gateway: MakeGateway) -> None:
    server = gateway(lambda *_: (503, error("UNAVAILABLE", "PostgreSQL is down")))
    with client_of(server) as client, pytest.raises(Unreachable, match="PostgreSQL is down"):
        client.post("/api/v1/x", {"a": 1})
    assert len(server.requests) == 1


def test_a_post_with_a_request_id_may_be_repeated(gateway: MakeGateway) -> None:
    replies = iter([(503, error("UNAVAILABLE")), (200, {})])
    server = gateway(lambda *_: next(replies))
    with client_of(server) as client:
        client.post("/api/v1/x", {"request_id": "r"})
    assert server.bodies("/api/v1/x") == [{"request_id": "r"}] * 2


@pytest.mark.parametrize(
    ("status", "kind", "exit_code"),
    [(400, InvalidInput, 2), (404, InvalidInput, 2), (409, InvalidInput, 2), (401, Denied, 4), (403, Denied, 4), (500, HeadraceError, 1)],
)
def test_errors_have_a_kind_and_an_exit_code(gateway: MakeGateway, status: int, kind: type[HeadraceError], exit_code: int) -> None:
    server = gateway(lambda *_: (status, error("X", "because")))
    with client_of(server) as client, pytest.raises(kind, match="because") as caught:
        client.get("/api/v1/x")
    assert caught.value.exit_code == exit_code
    assert len(server.requests) == 1


def test_violations_are_kept(gateway: MakeGateway) -> None:
    violation = {"field": "serve.endpoint", "message": "is taken", "line": 12}
    server = gateway(lambda *_: (400, error("INVALID", "wrong", [violation])))
    with client_of(server) as client, pytest.raises(InvalidInput) as caught:
        client.post("/api/v1/x")
    assert caught.value.violations == (violation,)


def test_nobody_listening_is_told_in_a_sentence() -> None:
    with Client(Connection("http://127.0.0.1:1", "k"), patience_s=0.1) as client, pytest.raises(Unreachable, match="headrace status"):
        client.get("/api/v1/x")


def test_a_connection_hides_its_key() -> None:
    assert "hr_k_secret" not in repr(Connection("http://x", "hr_k_secret"))


def run_server(gateway: MakeGateway) -> Gateway:
    return gateway(lambda method, path, body: (200, {"run": {"run_id": "r1"}} if path == "/api/v1/runs" else {}))


def test_a_run_that_ends_well_is_finished_with_all_its_metrics(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_RUN_ID", raising=False)
    server = run_server(gateway)
    with start_run("e", client=client_of(server)) as run:
        for step in range(1200):
            run.log_metric("loss", float(step), step)
    points = [point for body in server.bodies("/api/v1/runs/r1/log-batch") for point in body["metrics"]]
    assert [point["step"] for point in points] == list(range(1200))
    assert [body["status"] for body in server.bodies("/api/v1/runs/r1/finish")] == ["FINISHED"]
    assert server.requests[-1][1].endswith("/finish"), "the run ends after everything it logged"
    assert all(len(body["metrics"]) <= 1000 for body in server.bodies("/api/v1/runs/r1/log-batch"))


def test_tags_are_stored_as_text_at_once(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_RUN_ID", raising=False)
    server = run_server(gateway)
    with start_run("flights", client=client_of(server)) as run:
        run.set_tags({"owner": "ann", "fold": 3})
        assert server.bodies("/api/v1/runs/r1/log-batch") == [{"tags": {"owner": "ann", "fold": "3"}}]


def test_a_run_that_raises_is_failed_with_the_reason(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_RUN_ID", raising=False)
    server = run_server(gateway)
    with pytest.raises(ValueError, match="diverged"), start_run("e", client=client_of(server)):
        raise ValueError("the loss diverged")
    (finish,) = server.bodies("/api/v1/runs/r1/finish")
    assert (finish["status"], finish["reason"]) == ("FAILED", "ValueError: the loss diverged")


def test_a_run_of_a_trainer_is_attached_to_and_not_finished(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_RUN_ID", "given")
    server = run_server(gateway)
    with start_run("ignored", client=client_of(server)) as run:
        run.log_metric("loss", 1.0)
    assert run.id == "given"
    assert [path for _, path, _, _ in server.requests] == ["/api/v1/runs/given/log-batch"]


def test_points_that_could_not_be_sent_are_sent_later(gateway: MakeGateway) -> None:
    down = threading.Event()
    down.set()
    server = gateway(lambda method, path, body: (400, error("INVALID")) if down.is_set() else (200, {}))
    run = Run(client_of(server), "r1", owned=False)
    run.log_metric("loss", 2.0)
    with pytest.raises(InvalidInput):
        run.flush()
    down.clear()
    run.finish()
    assert server.bodies("/api/v1/runs/r1/log-batch")[-1]["metrics"][0]["value"] == 2.0


def test_an_error_that_is_not_the_callers_fault_names_its_id(gateway: Any) -> None:
    told = {"error": {"code": "INTERNAL", "message": "internal error", "error_id": "0a1b"}}
    with client_of(gateway(lambda *_: (500, told))) as client, pytest.raises(HeadraceError, match=r"internal error \(error 0a1b\)"):
        client.post("/api/v1/runs", {})


def test_a_holdout_is_pushed_as_one_and_a_training_is_told_why_it_gets_none(gateway: Any, tmp_path: Path) -> None:
    reason = "exam version 1 is a holdout: models are judged on it, so no run may read it"

    def answer(method: str, path: str, body: dict[str, Any]) -> Reply:
        if path.startswith("/api/v1/datasets/exam/download"):
            return 403, {"error": {"code": "FORBIDDEN", "message": reason}}
        if path.endswith("/uploads"):
            return 200, {"upload_id": "u1", "complete": True}
        if path.startswith("/api/v1/uploads/"):
            return 200, {"object": {}}
        return 200, {"dataset": {"ref": {"name": "exam", "version": 1, "sha256": "a" * 64}, "holdout": body.get("holdout", True)}}

    server = gateway(answer)
    file = tmp_path / "april.csv"
    file.write_text("x\n1\n")
    with client_of(server) as client:
        assert push_dataset("exam", file, holdout=True, client=client) == DatasetVersion("exam", 1, "a" * 64, holdout=True)
        assert not push_dataset("exam", file, client=client).holdout
        assert [body["holdout"] for body in server.bodies("/api/v1/datasets/exam/versions")] == [True, False]
        with pytest.raises(Denied, match=reason):
            pull_dataset("exam", tmp_path / "stolen.csv", client=client)
    assert not (tmp_path / "stolen.csv").exists()
