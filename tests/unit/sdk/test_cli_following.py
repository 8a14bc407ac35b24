"""Ctrl-C while a command follows something: what is followed goes on, and the command says how to follow or stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class _Gateway(BaseHTTPRequestHandler):
    """A training that has printed one line and goes on, and a delivery that waits."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"training": {"training_id": "t-1", "status": "queued", "run_id": ""}})

    def do_GET(self) -> None:
        if not self.path.startswith("/api/v1/trainings/"):
            self._answer({"journeys": []})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"8\r\nepoch 1\n\r\n")
        self.wfile.flush()
        self.rfile.read(1)  # until the client goes
        self.close_connection = True

    def _answer(self, body: object) -> None:
        told = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def gateway() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gateway)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def interrupted(gateway: str, folder: Path, *words: str, at: str) -> tuple[int, str]:
    """Runs a command, presses Ctrl-C when it has printed `at`; returns its exit code and all that it printed."""
    environment = {**os.environ, "HEADRACE_URL": gateway, "HEADRACE_API_KEY": "k"}
    # A shell's background job hands on that it ignores SIGINT; a terminal does not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from headrace.cli import main; main()"
    program = [sys.executable, "-c", code, *words]
    with subprocess.Popen(
        program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as running:
        assert running.stdout is not None
        printed = ""
        while at not in printed:
            line = running.stdout.readline()
            assert line, f"it ended before {at!r}: {printed}"
            printed += line
        running.send_signal(signal.SIGINT)
        printed += running.communicate(timeout=60)[0]
    return running.returncode, printed


def test_a_training_goes_on_and_can_be_followed_again_or_cancelled(gateway: str, tmp_path: Path) -> None:
    (tmp_path / "delivery.yaml").write_text("metadata: {name: flights}\ntrain: {command: [python, train.py]}\n")
    code, printed = interrupted(gateway, tmp_path, "run", at="epoch 1\n")
    assert code == 130
    assert "the training goes on" in printed
    assert "`headrace attach t-1`" in printed
    assert "`headrace cancel t-1`" in printed
    code, printed = interrupted(gateway, tmp_path, "attach", "t-1", at="epoch 1\n")
    assert (code, "`headrace cancel t-1`" in printed) == (130, True)


def test_a_delivery_goes_on_and_can_be_watched_again(gateway: str, tmp_path: Path) -> None:
    code, printed = interrupted(gateway, tmp_path, "watch", "flights", "--run", "r-1", at="waiting")
    assert code == 130
    assert "`headrace watch flights --run r-1`" in printed
