"""Real servers for one test run: each started on first use, on ports of its own, in a folder that is removed at the end."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from localstack import api, layout, process, seaweed, server, triton
from localstack.cache import Progress, Silent
from localstack.errors import NotReady, StackError
from localstack.kafka import Kafka
from localstack.layout import Stack
from localstack.minio import Minio
from localstack.ports import Ports
from localstack.postgres import Postgres
from localstack.s3_probe import S3Access
from localstack.seaweed import PORTS as SEAWEED_PORTS
from localstack.seaweed import Seaweed, usable
from localstack.server import Server
from localstack.triton import Triton

_ATTEMPTS = 4
S = TypeVar("S", bound=Server)


class ThrowawayServers:
    """The servers of one test run under `parent/run-<pid>-<start time>/`. Properties block while they start a server. Not thread-safe."""

    def __init__(self, parent: Path, progress: Progress | None = None, *, join: Path | None = None) -> None:
        """`join`: the folder of a running stack, whose servers are the shared ones instead; servers of a test's own are started still."""
        self.progress: Progress = progress or Silent()
        me = process.identify(os.getpid())
        if me is None:
            raise RuntimeError("no /proc: the local stack runs on Linux")
        self.directory = parent / f"run-{me.pid}-{me.started}"
        self.mark = secrets.token_hex(8)
        _remove_abandoned(parent)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "mark").write_text(self.mark + "\n")
        self._servers: list[Server] = []
        self._postgres: Postgres | None = None
        self._kafka: Kafka | None = None
        self._seaweed: Seaweed | None = None
        self._triton: Triton | None = None
        self._minio: Minio | None = None
        self._system: Stack | None = None
        self._started_systems: list[Path] = []
        if join is not None:
            self._join(join)

    @property
    def postgres(self) -> Postgres:
        """The shared PostgreSQL."""
        if self._postgres is None:
            self._postgres = self.new_postgres("postgres")
        return self._postgres

    @property
    def kafka(self) -> Kafka:
        """The shared broker."""
        if self._kafka is None:
            self._kafka = self.new_kafka("kafka")
        return self._kafka

    @property
    def kafka_in_use(self) -> bool:
        """Whether the shared broker was started, without starting it."""
        return self._kafka is not None

    @property
    def seaweed(self) -> Seaweed:
        """The shared S3 server."""
        if self._seaweed is None:
            self._seaweed = self.new_seaweed("s3")
        return self._seaweed

    @property
    def s3(self) -> S3Access:
        """Where the shared S3 server is, with its keys."""
        return self.seaweed.access

    @property
    def triton(self) -> Triton:
        """The shared Triton."""
        if self._triton is None:
            self._triton = self.new_triton("triton")
        return self._triton

    @property
    def minio(self) -> Minio:
        """The shared MinIO. The first time on a machine it may have to be built, which takes minutes."""
        if self._minio is None:
            self._minio = self.new_minio("minio")
        return self._minio

    @property
    def system(self) -> Stack:
        """The shared system: servers of its own and the six services. Takes some ten seconds to start."""
        if self._system is None:
            self._system = self.new_system("system")
        return self._system

    def new_system(self, name: str) -> Stack:
        """Another whole system, started, for a test that breaks it; `localstack.api` works on its `paths.state`."""
        state = self.directory / name / ".headrace"
        layout.make(state, random_ports=True)
        self._started_systems.append(state)
        api.up(state, self.progress, die_with_us=True)
        return layout.make(state, running=True)

    def new_postgres(self, name: str) -> Postgres:
        """Another PostgreSQL, started, for a test that breaks it."""
        password = secrets.token_urlsafe(12)

        def make(ports: Ports, folder: Path) -> Postgres:
            return Postgres(folder, port=ports.claim(name, 0), password=password, mark=self.mark, log=folder.with_suffix(".log"))

        return self._start(name, make)

    def new_kafka(self, name: str) -> Kafka:
        """Another broker, started, for a test that breaks it."""

        def make(ports: Ports, folder: Path) -> Kafka:
            return Kafka(
                folder,
                port=ports.claim(name, 0),
                controller_port=ports.claim(f"{name}-controller", 0),
                mark=self.mark,
                log=folder.with_suffix(".log"),
            )

        return self._start(name, make)

    def new_seaweed(self, name: str) -> Seaweed:
        """Another S3 server, started."""
        access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)

        def make(ports: Ports, folder: Path) -> Seaweed:
            port = ports.claim(name, 0, SEAWEED_PORTS, usable)
            return Seaweed(
                folder,
                port=port,
                access_key=access_key,
                secret_key=secret_key,
                bucket="headrace",
                mark=self.mark,
                log=folder.with_suffix(".log"),
            )

        return self._start(name, make)

    def new_minio(self, name: str) -> Minio:
        """A MinIO server, started."""
        access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)

        def make(ports: Ports, folder: Path) -> Minio:
            return Minio(
                folder,
                port=ports.claim(name, 0),
                access_key=access_key,
                secret_key=secret_key,
                bucket="headrace",
                mark=self.mark,
                log=folder.with_suffix(".log"),
            )

        return self._start(name, make)

    def new_triton(self, name: str) -> Triton:
        """Another Triton, started."""
        secret = secrets.token_urlsafe(16)

        def make(ports: Ports, folder: Path) -> Triton:
            return Triton(
                folder,
                http_port=ports.claim(name, 0),
                grpc_port=ports.claim(f"{name}-grpc", 0),
                metrics_port=ports.claim(f"{name}-metrics", 0),
                secret=secret,
                mark=self.mark,
                log=folder.with_suffix(".log"),
            )

        return self._start(name, make)

    def _join(self, state: Path) -> None:
        if layout.Paths(state).supervisor() is None:
            raise StackError(f"no stack runs in {state}: start one with `headrace up`")
        stack = self._system = layout.make(state, running=True)
        self._postgres, self._kafka, self._seaweed, self._triton = stack.postgres, stack.kafka, stack.seaweed, stack.triton

    def release(self, one: Server) -> None:
        """Stops a server and forgets it."""
        one.stop()
        self._servers.remove(one)

    def close(self) -> None:
        """Stops everything at once and removes the folder. May be repeated."""
        for one in self._servers:
            # Nobody needs the data: only those that leave something outside the folder are stopped in good order.
            if not isinstance(one, (Postgres, Triton)):
                server.crash(one)
        for one in self._servers:
            one.stop()
        self._servers.clear()
        for state in self._started_systems:
            api.down(state)
        self._started_systems.clear()
        process.sweep(self.mark)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, name: str, make: Callable[[Ports, Path], S]) -> S:
        folder = self.directory / name
        for attempt in range(1, _ATTEMPTS + 1):
            ports = Ports(self.directory / "ports.json", random_only=True)
            one = make(ports, folder)
            self._servers.append(one)
            try:
                server.run(one, self.progress)
            except NotReady:
                self.release(one)
                if attempt == _ATTEMPTS:
                    raise
                # Another test run may have taken the port between our look and the server's bind.
                (self.directory / "ports.json").unlink()
                shutil.rmtree(folder, ignore_errors=True)
            else:
                return one
        raise AssertionError("unreachable")


def _remove_abandoned(parent: Path) -> None:
    """Folders of test runs that were killed: their servers died with them, what those had forked perhaps not."""
    for folder in parent.glob("run-*-*"):
        _, pid, started = folder.name.split("-")
        if not process.ProcessId(int(pid), int(started)).alive():
            for mark in (*folder.glob("mark"), *folder.glob("*/.headrace/stack-id")):
                process.sweep(mark.read_text().strip())
            for links in (*folder.glob("*/links"), *folder.glob("*/.headrace/triton/links")):
                triton.sweep(links.parent)
            for ports in (*folder.glob("ports.json"), *folder.glob("*/.headrace/ports.json")):
                for span in Ports(ports).spans():
                    if len(span) == SEAWEED_PORTS:
                        seaweed.sweep(span.start)
            shutil.rmtree(folder, ignore_errors=True)
