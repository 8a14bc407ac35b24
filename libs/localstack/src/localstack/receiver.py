"""The OTLP receiver of `otlp.py` as one of the stack's servers."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

from localstack.cache import Progress
from localstack.ports import LOOPBACK
from localstack.process import Child, spawn
from localstack.services import inherited


class OtlpReceiver:
    """One receiver with its database in `directory`. Methods block and are safe to repeat."""

    name = "otlp"

    def __init__(self, directory: Path, *, port: int, secret: str, mark: str, log: Path) -> None:
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self._secret = secret
        self._mark = mark
        self._log = log

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def prepare(self, progress: Progress) -> None:
        """Makes the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts the receiver. Returns before it is ready."""
        argv: list[str | Path] = [
            sys.executable,
            "-m",
            "localstack.otlp",
            "--port",
            str(self.port),
            "--database",
            self.directory / "spans.sqlite",
        ]
        env = {**inherited(), "HEADRACE_TRACES_SECRET": self._secret}
        self.child = spawn(self.name, argv, log=self._log, env=env, mark=self._mark, cwd=self.directory)

    def ready(self) -> str | None:
        """None when the receiver on our port takes our secret, else the reason."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=3)
        try:
            connection.request("GET", "/spans?trace_id=0", headers={"Authorization": f"Bearer {self._secret}"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"the receiver does not answer: {error}"
        finally:
            connection.close()
        return None if status == 200 else f"another server answers on port {self.port} ({status})"

    def stop(self) -> None:
        """Ends the receiver; what it stored stays."""
        if self.child is not None:
            self.child.stop(5)
