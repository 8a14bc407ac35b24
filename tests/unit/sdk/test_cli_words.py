"""What commands tell people: the next step, the file that was given, the key alone on stdout, and nothing when nobody reads on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from headrace.cli import deliveries, stack
from headrace.cli.app import main
from localstack import api, layout


class Gateway(ThreadingHTTPServer):
    """Answers from a table of (method, path without the query); what is not in it is there and empty."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.table: dict[tuple[str, str], tuple[int, Any]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.server.table.get((self.command, self.path.partition("?")[0]), (200, {}))
        told = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gateway]:
    server = Gateway()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HEADRACE_URL", server.url)
    monkeypatch.setenv("HEADRACE_API_KEY", "k")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


class Told:
    """Runs commands in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr(sys, "argv", ["headrace", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(monkeypatch, capsys)


NEW_KEY = {"secret": "hr_1_s", "key": {"key_id": "1", "expires_at": "2026-12-24T00:00:00Z"}}


def test_a_new_key_is_alone_on_stdout(gateway: Gateway, told: Told) -> None:
    gateway.table["POST", "/api/v1/keys"] = (201, NEW_KEY)
    gateway.table["GET", "/api/v1/endpoints"] = (200, {"endpoints": [{"name": "flights"}]})
    code, out, err = told("keys", "create", "my-app", "--endpoint", "flights", "--endpoint", "*")
    assert (code, out) == (0, "hr_1_s\n")
    assert "key 1 of my-app, shown this once; it expires: 2026-12-24" in err
    assert "warning" not in err
    code, out, err = told("keys", "create", "my-app", "--endpoint", "flihgts")
    assert (code, out) == (0, "hr_1_s\n")
    assert "warning: there is no endpoint flihgts yet" in err
    gateway.table["GET", "/api/v1/endpoints"] = (403, {"error": {"message": "not for you"}})
    code, out, err = told("keys", "create", "my-app", "--endpoint", "flights")
    assert (code, out) == (0, "hr_1_s\n")
    assert "flights is not known: not for you" in err


@pytest.mark.parametrize("error", [{"code": "NOT_FOUND"}, {"code": "INVALID", "violations": [{"field": "approval_id"}]}])
def test_an_approval_that_there_is_not(gateway: Gateway, told: Told, error: dict[str, Any]) -> None:
    gateway.table["POST", "/api/v1/approvals/a-1/decision"] = (404, {"error": {"message": "no", **error}})
    code, _, err = told("approve", "a-1")
    assert code == 2
    assert "there is no approval a-1; `headrace approvals` lists" in err


def test_an_approval_that_is_decided_keeps_its_reason(gateway: Gateway, told: Told) -> None:
    gateway.table["POST", "/api/v1/approvals/a-1/decision"] = (409, {"error": {"message": "it was rejected", "code": "CONFLICT"}})
    assert "it was rejected" in told("reject", "a-1")[2]


@pytest.mark.parametrize("text", ["{}", "[]", "rows", '{"signature": {}}'])
def test_a_file_of_samples_that_is_none(gateway: Gateway, told: Told, tmp_path: Path, text: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "rows.json").write_text(text)
    code, _, err = told("deploy", "model.onnx", "--endpoint", "flights", "--samples", "rows.json")
    assert code == 2
    assert 'rows.json must hold a JSON object: {"signature": {"inputs": [{"name"' in err


def test_a_bad_model_file_is_named_as_it_was_given(gateway: Gateway, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "rows.json").write_text('{"signature": {}, "samples": {}}')
    gateway.table["GET", "/api/v1/deliveries"] = (200, {"deliveries": [{"name": "d", "endpoint": "flights", "experiment": "e"}]})
    gateway.table["POST", "/api/v1/runs"] = (201, {"run": {"run_id": "r-1"}, "fencing_token": 0})
    wrong = [{"field": "path", "message": "is no ONNX file"}, {"field": "samples.inputs.x", "message": "is missing"}]
    gateway.table["POST", "/api/v1/runs/r-1/models"] = (400, {"error": {"message": "not valid", "violations": wrong}})
    monkeypatch.setattr("headrace.runs.Run.log_artifact", lambda *_: None)
    code, _, err = told("deploy", "model.onnx", "--endpoint", "flights", "--samples", "rows.json")
    assert code == 2
    assert "  model.onnx: is no ONNX file" in err
    assert "  rows.json: samples.inputs.x: is missing" in err


TRACEBACK = """exit code 1
Traceback (most recent call last):
  File "train.py", line 1, in <module>
ValueError: no rows

"""


def training(status: str, **more: str) -> dict[str, Any]:
    made = {"training_id": "t-1", "delivery": "d", "status": status, "attempt": 1, "run_id": "", "created_at": "now", "reason": ""}
    return {**made, **more}


def test_a_traceback_is_in_the_log_and_its_last_line_in_the_sentence(gateway: Gateway, told: Told) -> None:
    failed = training("failed", reason=TRACEBACK, run_id="r-12345678")
    gateway.table["GET", "/api/v1/trainings/t-1/log"] = (200, TRACEBACK.removeprefix("exit code 1\n"))
    gateway.table["GET", "/api/v1/trainings/t-1"] = (200, {"training": failed})
    gateway.table["GET", "/api/v1/trainings"] = (200, {"trainings": [failed]})
    code, out, err = told("attach", "t-1")
    assert (code, out.count("Traceback")) == (1, 1)
    assert err == "training failed: ValueError: no rows  (run r-12345678)\n"
    code, out, _ = told("trainings")
    assert "Traceback" not in out
    assert "ValueError: no rows" in out
    assert json.loads(told("trainings", "--json")[1])["trainings"][0]["reason"] == TRACEBACK
    gateway.table["GET", "/api/v1/trainings/t-1"] = (200, {"training": training("cancelled", reason="cancelled by ada")})
    assert told("attach", "t-1")[2] == "training cancelled: cancelled by ada\n"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("succeeded", "already succeeded: nothing to cancel"),
        ("failed", "already failed: nothing to cancel"),
        ("cancelled", "cancelled"),
        ("queued", "being cancelled, still queued"),
    ],
)
def test_what_has_ended_is_not_cancelled(gateway: Gateway, told: Told, status: str, words: str) -> None:
    gateway.table["POST", "/api/v1/trainings/t-1/cancel"] = (200, {"training": training(status)})
    assert told("cancel", "t-1")[:2] == (0, f"training t-1: {words}\n")


def test_progress_is_told_now_and_then_and_that_there_is_none(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0

    def waits(_: float) -> None:
        nonlocal seconds
        seconds += 1

    def journey(path: str, **_: object) -> dict[str, Any]:
        detail = f"{min(seconds, 25)} of 200 shadow answers compared"
        return {"journeys": [{"journey_id": "j", "state": "completed" if seconds == 90 else "shadowing", "detail": detail}]}

    clock = SimpleNamespace(monotonic=lambda: float(seconds), sleep=waits, strftime=lambda _: "noon")
    monkeypatch.setattr(deliveries, "time", clock)
    client: Any = SimpleNamespace(get=journey)
    assert deliveries.follow(client, "d", None, timeout_s=1000.0)["state"] == "completed"
    assert capsys.readouterr().err.splitlines() == [
        "noon  d  shadowing  0 of 200 shadow answers compared",
        "noon  d  shadowing  10 of 200 shadow answers compared",
        "noon  d  shadowing  20 of 200 shadow answers compared",
        "noon  d  shadowing  25 of 200 shadow answers compared",
        "noon  d  shadowing  nothing new for 30 s: it goes on when the endpoint gets traffic",
        "noon  d  completed  25 of 200 shadow answers compared",
    ]


def test_status_without_a_stack_names_up(told: Told, tmp_path: Path) -> None:
    code, out, _ = told("status", "--state-dir", str(tmp_path))
    assert (code, out) == (1, "none: no stack was started here; `headrace up` starts one\n")


def test_a_gateway_that_is_down_names_up(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_API_KEY", "k")
    monkeypatch.setattr("headrace.http.time.sleep", lambda _: None)
    for words in (("models",), ("predict", "flights", "-d", '{"inputs": []}')):
        code, _, err = told(*words)
        assert code == 3
        assert "`headrace up` starts a local one" in err


def test_up_says_how_to_reach_it_and_that_its_port_was_taken(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = api.StackInfo("http://127.0.0.1:10957", "", str(tmp_path / "a b"))
    monkeypatch.setattr(stack, "_api", lambda: SimpleNamespace(up=lambda *_, **__: info, moved=api.moved))
    monkeypatch.setattr(api, "is_free", lambda port: port != layout.GATEWAY_PORT)
    code, out, err = told("up", "--state-dir", str(tmp_path))
    assert code == 0
    assert err == "8080 is taken, using 10957\n"
    assert out.startswith("ready: http://127.0.0.1:10957 ")
    assert f"  export HEADRACE_URL=http://127.0.0.1:10957 HEADRACE_API_KEY=$(cat '{tmp_path}/a b/secrets/admin-key')\n" in out
    monkeypatch.setattr(api, "is_free", lambda _: True)  # it keeps the port that it got once
    assert told("up", "--state-dir", str(tmp_path))[2] == ""


@pytest.mark.parametrize("words", [["trace", "r-1"], ["models", "--json"]])  # rich writes, and print does
def test_nobody_reads_on(gateway: Gateway, words: list[str]) -> None:
    models = [{"name": f"model-{number}", "latest_version": 1, "champion_version": 0} for number in range(3000)]
    gateway.table["GET", "/api/v1/models"] = (200, {"models": models})
    gateway.table["GET", "/api/v1/traces/r-1"] = (200, {"lineage": {f"step {number}": "x" * 200 for number in range(2000)}})
    code = "from headrace.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(60) == 141


@pytest.mark.parametrize(("opens", "words"), [(True, ""), (False, "there is no browser here; open the address above where there is one\n")])
def test_whoever_has_no_browser_is_told_so(gateway: Gateway, told: Told, monkeypatch: pytest.MonkeyPatch, opens: bool, words: str) -> None:
    judged = {"evaluation_id": "e-1", "status": "passed", "reason": "", "judgement": {"report_html": "k", "gates": []}}
    gateway.table["GET", "/api/v1/evaluations/e-1"] = (200, {"evaluation": judged})
    gateway.table["GET", "/api/v1/evaluations/e-1/report"] = (200, {"url": "http://127.0.0.1/page"})
    asked: list[str] = []

    def browse(url: str) -> bool:
        asked.append(url)
        return opens

    monkeypatch.setattr("webbrowser.open", browse)
    code, out, err = told("report", "e-1", "--open")
    assert (code, asked, err) == (0, ["http://127.0.0.1/page"], words)
    assert "http://127.0.0.1/page" in out
