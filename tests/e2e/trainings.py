"""Trainings of end-to-end tests: a source folder with real packages, and trainings that wait in the middle for a test to act."""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
from headrace.cli.training import upload_source

from tests.e2e.world import World, eventually

_SCRIPT = Path(__file__).parent / "source" / "train.py"
_LOCK = Path(__file__).parents[2] / "requirements.lock"
_PACKAGES = ("ml-dtypes", "numpy", "onnx", "protobuf", "typing-extensions")
"""What the script needs, and what that does. What the SDK needs, the trainer brings."""

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


def submit(world: World, source: Path, *words: str) -> str:
    """Uploads and submits as `headrace run -- WORDS` does; returns the training's id."""
    command = ["python", "train.py", *words]
    body = {"delivery": world.name, "source": upload_source(world.client, source), "seed": 3, "command": command}
    return str(world.client.post("/api/v1/trainings", body)["training"]["training_id"])


def training(world: World, training_id: str) -> dict[str, Any]:
    return dict(world.client.get(f"/api/v1/trainings/{training_id}")["training"])


def ended(world: World, training_id: str, seconds: float = 120) -> dict[str, Any]:
    """Waits for the end of a training."""

    def over() -> dict[str, Any] | None:
        told = training(world, training_id)
        return told if told["status"] in ("succeeded", "failed", "cancelled") else None

    return dict(eventually(over, seconds, f"training {training_id} ends"))


class Waiting:
    """A training whose script waits before it trains, in each attempt anew, until it is told to go on.

    Scripts are found among the processes of this machine by a word in their command: a sandbox has no other way to meet.
    """

    def __init__(self, world: World, source: Path) -> None:
        self._world = world
        self._word = secrets.token_hex(8)
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.most_at_once = 0
        self.id = submit(world, source, "--wait", self._word)

    def __enter__(self) -> Waiting:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()

    def until_waiting(self, attempt: int) -> str:
        """Waits until the script of this attempt waits; returns its run."""

        def run() -> str:
            told = training(self._world, self.id)
            log = self._world.client.lines(f"/api/v1/trainings/{self.id}/log")
            return told["run_id"] if told["attempt"] == attempt and f"run {told['run_id']} waits" in log else ""

        return str(eventually(run, 120, f"attempt {attempt} is in the middle"))

    def until_gone(self) -> None:
        """Waits until no process of it is left."""
        eventually(lambda: not self._running(), 30, "its process is gone")

    def go(self) -> None:
        """Lets the script train that waits."""
        (process,) = self._running()
        process.send_signal(signal.SIGUSR1)

    def _running(self) -> list[psutil.Process]:
        command = ["python", "train.py", "--wait", self._word]
        return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == command]

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.most_at_once = max(self.most_at_once, len(self._running()))
