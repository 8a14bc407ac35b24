"""A run seen from the training script: parameters, metrics, files and the model, sent in batches to the gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace.http import Client, HeadraceError, InvalidInput
from headrace.uploads import upload

_BATCH = 500
_FLUSH_EVERY_S = 1.0
_LEASE_S = 60
_PATIENCE_S = 300.0
"""How long logging waits for a gateway that is away: a training of hours must not die of an outage of minutes."""


class Run:
    """One run. Made by `start_run`; use it as a context manager.

    Metrics are buffered and sent by a background thread at least every second; `flush` sends them now. Everything else blocks
    until the server has stored it. A run that this process started ends FINISHED when the block ends, FAILED when it raises.
    """

    def __init__(self, client: Client, run_id: str, *, owned: bool) -> None:
        self.id = run_id
        self._client = client
        self._owned = owned
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._metrics: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._background, name="headrace-run", daemon=True)
        self._thread.start()

    # -- logging

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Stores parameters; one that is there already must have the same value. Repeatable."""
        self._log({"params": {key: str(value) for key, value in params.items()}})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Stores tags; the last value stays. Repeatable."""
        self._log({"tags": {key: str(value) for key, value in tags.items()}})

    def log_metric(self, key: str, value: float, step: int = 0) -> None:
        """Adds one point to a metric. Does not block; a failure to send is raised by the next call that sends, at the latest at the end."""
        self.log_metrics({key: value}, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Adds one point to each of several metrics; see log_metric."""
        now = int(time.time() * 1000)
        points = [{"key": key, "value": float(value), "step": int(step), "timestamp_ms": now} for key, value in metrics.items()]
        with self._lock:
            self._metrics.extend(points)
            full = len(self._metrics) >= _BATCH
        if full:
            self.flush()

    def log_input(self, dataset: str, version: int) -> None:
        """Says that this run reads a version of a data set. Repeatable."""
        self._client.post(f"/api/v1/runs/{self.id}/inputs", {"inputs": [{"name": dataset, "version": version}]}, repeatable=True)

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> str:
        """Uploads one file and returns its path in the run. Repeatable: the last content stays."""
        file = Path(path)
        if not file.is_file():
            raise InvalidInput(f"there is no file {file}")
        target = artifact_path or file.name
        upload(self._client, f"/api/v1/runs/{self.id}/uploads", file, {"path": target})
        return target

    def log_model(
        self,
        path: str | Path,
        name: str = "model",
        format: str = "onnx",
        *,
        signature: Mapping[str, Any],
        samples: Mapping[str, Any],
    ) -> None:
        """Uploads a model and declares it deliverable. Repeatable.

        `signature`: {"inputs": [{"name", "datatype", "shape"}], "outputs": [...]} in the words of the Open Inference Protocol; -1 is any
        length. `samples`: {"inputs": {name: rows}, "outputs": {name: rows}}: what the training code itself got; the exported file must
        give the same.
        """
        self.log_artifact(path, f"{name}/model.{format}")
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            file = Path(folder) / "samples.json"
            file.write_text(json.dumps(samples))
            self.log_artifact(file, f"{name}/samples.json")
        self._client.post(
            f"/api/v1/runs/{self.id}/models",
            {
                "name": name,
                "path": f"{name}/model.{format}",
                "format": format,
                "signature": dict(signature),
                "samples_path": f"{name}/samples.json",
            },
            repeatable=True,
        )

    # -- life

    def flush(self) -> None:
        """Sends what is buffered. Blocks. Raises when it cannot be sent; it stays buffered."""
        self._send_buffered()

    def finish(self, status: str = "FINISHED", reason: str = "") -> None:
        """Flushes and ends the run. A run that a trainer started is only flushed: the trainer ends it. Repeatable."""
        self._stop.set()
        self._thread.join()
        try:
            self.flush()
            if self._owned:
                ended = {"status": status, "reason": reason, "finished_ms": int(time.time() * 1000)}
                self._client.post(f"/api/v1/runs/{self.id}/finish", ended, repeatable=True)
        finally:
            self._client.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt):
            self.finish("KILLED", "interrupted")
        else:
            self.finish("FAILED", f"{type(error).__name__}: {error}"[:500])

    def _log(self, batch: dict[str, Any]) -> None:
        self._client.post(f"/api/v1/runs/{self.id}/log-batch", batch, repeatable=True)

    def _send_buffered(self) -> None:
        with self._sending:  # one sender at a time keeps the points in order
            while True:
                with self._lock:
                    points = self._metrics[:_BATCH]
                if not points:
                    return
                self._log({"metrics": points})
                with self._lock:
                    del self._metrics[: len(points)]

    def _background(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(_FLUSH_EVERY_S):
            try:
                self._send_buffered()
                if self._owned and time.monotonic() - renewed > _LEASE_S / 3:
                    self._client.post(f"/api/v1/runs/{self.id}/lease", {}, repeatable=True)
                    renewed = time.monotonic()
            except HeadraceError:
                continue  # the points stay buffered: the next round tries again, and flush raises what persists


def start_run(
    experiment: str | None = None, name: str | None = None, *, tags: Mapping[str, str] | None = None, client: Client | None = None
) -> Run:
    """Starts a run, or attaches to the one in HEADRACE_RUN_ID when a trainer started this process.

    `experiment` is created when there is none of this name; left out, it is HEADRACE_EXPERIMENT or Default. The run has a lease:
    when this process dies without a word, the server ends it as FAILED.
    """
    own = client or Client(patience_s=_PATIENCE_S)
    if run_id := os.environ.get("HEADRACE_RUN_ID"):
        return Run(own, run_id, owned=False)
    answer = own.post(
        "/api/v1/runs",
        {
            "experiment": experiment or os.environ.get("HEADRACE_EXPERIMENT") or "Default",
            "name": name or "",
            "tags": dict(tags or {}),
            "lease_seconds": _LEASE_S,
            "source": {**_git_state(), "command": " ".join(sys.argv)},
            "request_id": str(uuid.uuid4()),
        },
    )
    return Run(own, answer["run"]["run_id"], owned=True)


def _git_state() -> dict[str, Any]:
    """Commit and dirtiness of the working folder; empty outside a git checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        dirty = bool(
            subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": dirty}
