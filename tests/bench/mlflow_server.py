"""MLflow's own tracking server, the newest, on PostgreSQL: what the tracker's figures stand beside, in the same run on the same machine."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.mlflow import clients

_START_S = 180.0
WORKERS = 2
"""As many as the machine of the reference has cores; its own default is 4."""


@dataclass(frozen=True)
class MlflowServer:
    """A server that answers at `host:port`, with all processes that it started."""

    host: str
    port: int
    process: psutil.Process

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(int(member.memory_full_info().pss) for member in family)


@contextlib.contextmanager
def mlflow_server(database_url: str, folder: Path) -> Iterator[MlflowServer]:
    """Starts it on an empty database (`postgresql://...`), with artifacts in `folder`, and ends it. Blocks until it answers, which takes
    a minute the first time. Raises RuntimeError when it does not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        str(clients.python("server").with_name("mlflow")),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        str(WORKERS),
    ]
    command += ["--backend-store-uri", database_url, "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "NO_PROXY": "*"}
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server does not answer: {(folder / 'mlflow.log').read_text(errors='replace')[-2_000:]}")
            time.sleep(0.2)
        yield MlflowServer("127.0.0.1", port, psutil.Process(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
