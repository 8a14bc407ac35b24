"""Trainings of end-to-end tests: a source folder with real packages, and a meeting point to which scripts that run hold a connection."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.cli.training import upload_source

from tests.e2e.world import World, eventually

_SCRIPT = Path(__file__).parent / "source" / "train.py"
_LOCK = Path(__file__).parents[2] / "requirements.lock"
_PACKAGES = ("anyio", "certifi", "h11", "httpcore", "httpx", "idna", "ml-dtypes", "numpy", "onnx", "protobuf", "typing-extensions")
"""What the script needs, what the SDK does, and what those do."""

TRAIN_SECTION = """train:
  source: {path: source}
  command: [python, train.py]
  resources: {memory: 1GiB, disk: 64MiB, timeout: 5m}
"""


def make_source(folder: Path) -> Path:
    """A user's folder: the script, and a lock of its packages as the workspace's own lock pins them."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(_SCRIPT, source)
    text, pins = _LOCK.read_text(), []
    for name in _PACKAGES:
        found = re.search(rf"^{name}==[^\n]*(?:\n +--hash[^\n]*)*", text, re.MULTILINE)
        assert found is not None, name
        pins.append(found[0])
    (source / "requirements.lock").write_text("\n".join(pins) + "\n")
    return source


def delivery_that_trains(world: World) -> str:
    """The text of this test's delivery file, with a train section."""
    return world.delivery().replace("evaluate:\n", f"{TRAIN_SECTION}evaluate:\n", 1)


def submit(world: World, source: Path, **environment: str) -> str:
    """Uploads and submits as `headrace run` does; returns the training's id."""
    body = {"delivery": world.name, "source": upload_source(world.client, source), "seed": 3, "environment": environment}
    return str(world.client.post("/api/v1/trainings", body)["training"]["training_id"])


def training(world: World, training_id: str) -> dict[str, Any]:
    return dict(world.client.get(f"/api/v1/trainings/{training_id}")["training"])


def ended(world: World, training_id: str, seconds: float = 120) -> dict[str, Any]:
    """Waits for the end of a training."""

    def over() -> dict[str, Any] | None:
        told = training(world, training_id)
        return told if told["status"] in ("succeeded", "failed", "cancelled") else None

    return dict(eventually(over, seconds, f"training {training_id} ends"))


class Meeting:
    """Sees how many scripts run at once, and holds them until it lets them go."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = str(self._listener.getsockname()[1])
        self.met = 0
        self.most_at_once = 0
        self._lines: set[socket.socket] = set()
        self._patient = True
        self._changed = threading.Condition()

    def until(self, *, met: int, running: int, seconds: float = 120) -> None:
        """Waits until so many have come in all, and so many are there."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: (self.met, len(self._lines)) == (met, running), seconds)
            assert arrived, f"{self.met} came and {len(self._lines)} are there, not {met} and {running}"

    def go(self) -> None:
        """Lets everybody train, those that are still to come too."""
        with self._changed:
            self._patient = False
            for line in self._lines:
                line.sendall(b"go")

    @contextmanager
    def open(self) -> Iterator[Meeting]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            # An accept that blocks is not ended by closing its socket, but by a shutdown.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:  # it is closed
                return
            with self._changed:
                self._lines.add(line)
                self.met += 1
                self.most_at_once = max(self.most_at_once, len(self._lines))
                if not self._patient:
                    line.sendall(b"go")
                self._changed.notify_all()
            threading.Thread(target=self._hold, args=(line,), daemon=True).start()

    def _hold(self, line: socket.socket) -> None:
        """Waits for the script's end, which closes its connection."""
        try:
            while line.recv(64):
                pass
        except ConnectionError:
            pass  # a script that is killed resets its connection, which is an end too
        with self._changed:
            self._lines.discard(line)
            self._changed.notify_all()
        line.close()
