"""A real tracker in this process and real trainers as processes of their own, on a database, bucket and topics of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from contracts.registry.v1 import service_pb2_grpc as registry_pb2_grpc
from contracts.tracker.v1 import service_pb2 as tracker_pb2
from contracts.tracker.v1 import service_pb2_grpc as tracker_pb2_grpc
from contracts.trainer.v1 import service_pb2 as pb
from contracts.trainer.v1 import service_pb2_grpc
from pydantic import SecretStr
from servicekit import access, migrate, rpc
from servicekit.access import Caller
from servicekit.settings import ServiceSettings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from tracker import bootstrap as tracker_bootstrap
from tracker.settings import TrackerSettings
from trainer import bootstrap as trainer_bootstrap

ADA = Caller("gateway", "ada", frozenset({"editor"}))
ENDED = ("succeeded", "failed", "cancelled")


def packed(files: Mapping[str, str]) -> bytes:
    """A tar.gz of these files."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
    return raw.getvalue()


def _start(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "trainer"], env=dict(environment))


@dataclass
class TrainerProcess:
    """A `python -m trainer`."""

    process: subprocess.Popen[bytes]
    announced: Path

    async def port(self) -> int:
        async with asyncio.timeout(60):
            while not self.announced.exists():
                assert self.process.poll() is None, "the trainer ended while it started"
                await asyncio.sleep(0.05)
        return int(json.loads(self.announced.read_text())["grpc"])

    async def until_busy(self) -> None:
        """Waits until it has started something."""
        async with asyncio.timeout(60):
            while True:
                if self.descendants():
                    return
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, as when a machine's memory runs out."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def descendants(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)


@dataclass
class Stack:
    """What a test of the trainer talks to."""

    tracker: Any
    environment: dict[str, str]
    database: str
    state_dir: Path
    folder: Path
    channel_to: Callable[[int, str], Any]
    started: list[TrainerProcess] = field(default_factory=list)
    gateway: Any = None
    """The tracker as people reach it."""
    trainer: Any = None
    sections: Any = None

    async def start_trainer(self, **settings: str) -> TrainerProcess:
        """Starts a trainer and lets `trainer` and `sections` talk to it."""
        announced = self.folder / f"announced-{len(self.started)}"
        environment = {**self.environment, **settings, "HEADRACE_ANNOUNCE_FILE": str(announced)}
        one = TrainerProcess(_start(environment), announced)
        self.started.append(one)
        port = await one.port()
        self.trainer = service_pb2_grpc.TrainerServiceStub(self.channel_to(port, "gateway"))
        self.sections = registry_pb2_grpc.DeliverySectionServiceStub(self.channel_to(port, "registry"))
        return one

    async def upload(self, files: Mapping[str, str]) -> pb.Source:
        """Uploads a source folder; an empty lock is added when there is none."""
        data = packed({"requirements.lock": "", **files})
        with rpc.acting_for(ADA):
            digest = hashlib.sha256(data).hexdigest()
            ticket = await self.trainer.StartSourceUpload(pb.StartSourceUploadRequest(sha256=digest, size_bytes=len(data)))
        if ticket.url:
            async with httpx.AsyncClient(trust_env=False) as http:
                (await http.put(ticket.url, content=data)).raise_for_status()
        return pb.Source(upload_id=ticket.upload_id)

    async def submit(self, script: str, **request: Any) -> pb.Training:
        """Submits one script, train.py."""
        source = request.pop("source", None) or await self.upload({"train.py": script})
        request.setdefault("command", ["python", "train.py"])
        with rpc.acting_for(ADA):
            answer: pb.SubmitTrainingResponse = await self.trainer.SubmitTraining(pb.SubmitTrainingRequest(source=source, **request))
            return answer.training

    async def get(self, training_id: str) -> pb.Training:
        with rpc.acting_for(ADA):
            answer: pb.GetTrainingResponse = await self.trainer.GetTraining(pb.GetTrainingRequest(training_id=training_id))
            return answer.training

    async def cancel(self, training_id: str) -> pb.Training:
        with rpc.acting_for(ADA):
            answer: pb.CancelTrainingResponse = await self.trainer.CancelTraining(pb.CancelTrainingRequest(training_id=training_id))
            return answer.training

    async def until(self, training_id: str, wanted: Callable[[pb.Training], bool], within_s: float = 90) -> pb.Training:
        async with asyncio.timeout(within_s):
            while True:
                training = await self.get(training_id)
                if wanted(training):
                    return training
                await asyncio.sleep(0.05)

    async def ended(self, training_id: str, within_s: float = 90) -> pb.Training:
        return await self.until(training_id, lambda training: training.status in ENDED, within_s)

    async def log(self, training_id: str, offset: int = 0, follow: bool = False) -> str:
        data = b""
        with rpc.acting_for(ADA):
            async for part in self.trainer.StreamLog(pb.StreamLogRequest(training_id=training_id, offset=offset, follow=follow)):
                assert part.offset == offset + len(data)
                data += part.data
        return data.decode()

    async def until_logged(self, training_id: str, words: str) -> str:
        async with asyncio.timeout(60):
            while True:
                log = await self.log(training_id)
                if words in log:
                    return log
                await asyncio.sleep(0.05)

    async def run(self, run_id: str) -> tracker_pb2.Run:
        answer: tracker_pb2.GetRunResponse = await self.tracker.GetRun(tracker_pb2.GetRunRequest(run_id=run_id))
        return answer.run

    async def artifact(self, run_id: str, path: str) -> bytes:
        with rpc.acting_for(ADA):
            download = await self.gateway.GetDownload(tracker_pb2.GetDownloadRequest(run_id=run_id, path=path))
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(download.url)).content

    async def rows(self, statement: str, **values: Any) -> list[Any]:
        engine = create_async_engine(self.database)
        try:
            async with engine.begin() as conn:
                return list(await conn.execute(text(statement), values))
        finally:
            await engine.dispose()

    async def events(self, training_id: str) -> list[str]:
        """The types of the training's events in order; their sequence is checked."""
        rows = await self.rows("SELECT type, sequence FROM trainer.outbox WHERE key = :key ORDER BY id", key=training_id)
        assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
        return [row.type for row in rows]

    async def runs(self, training_id: str) -> list[tracker_pb2.Run]:
        """The runs of a training, oldest first."""
        with rpc.acting_for(ADA):
            listed = (await self.gateway.ListRuns(tracker_pb2.ListRunsRequest())).runs
        return [run for run in reversed(listed) if run.source.training_id == training_id]


@contextlib.asynccontextmanager
async def running_stack(database: str, stack_servers: Any, topic_prefix: str, folder: Path) -> AsyncIterator[Stack]:
    """A tracker that serves, and what is needed to start trainers."""
    tokens = {name: access.new_service_token(name) for name in ("gateway", "trainer", "registry", "tracker")}
    hashes = ",".join(f"{name}={digest}" for name, (_, digest) in tokens.items())
    s3 = stack_servers.s3
    shared = {
        "database_url": database,
        "kafka_bootstrap": stack_servers.kafka,
        "topic_prefix": topic_prefix,
        "service_token_hashes": hashes,
        "s3_endpoint": s3.endpoint,
        "s3_access_key": s3.access_key,
        "s3_secret_key": s3.secret_key,
        "s3_bucket": s3.bucket,
    }
    await migrate.upgrade(database, "tracker", tracker_bootstrap.MIGRATIONS)
    await migrate.upgrade(database, "trainer", trainer_bootstrap.MIGRATIONS)
    async with contextlib.AsyncExitStack() as exits:
        ports: dict[str, int] = {}
        tracker_settings = TrackerSettings(
            **shared,
            run_token_secret=SecretStr("a secret of the tests"),
            lease_check_s=0.2,
            lease_grace_s=0,
            state_dir=folder / "tracker",
        )
        for component in tracker_bootstrap.build(tracker_settings):
            await component.start()
            exits.push_async_callback(component.stop)
            ports.update(getattr(component, "listening", dict)())

        def channel_to(port: int, service: str) -> Any:
            channel = rpc.channel(f"127.0.0.1:{port}", ServiceSettings(service_token=SecretStr(tokens[service][0])))
            exits.push_async_callback(channel.close)
            return channel

        environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONDONTWRITEBYTECODE") if name in os.environ}
        environment |= {name: value for name, value in os.environ.items() if name.startswith(("UV_", "PIP_", "SSL_"))}
        environment |= {f"HEADRACE_{name.upper()}": value for name, value in shared.items()}
        environment |= {
            "HEADRACE_SERVICE_TOKEN": tokens["trainer"][0],
            "HEADRACE_TRACKER_ADDRESS": f"127.0.0.1:{ports['grpc']}",
            "HEADRACE_PUBLIC_URL": "http://127.0.0.1:1",
            "HEADRACE_STATE_DIR": str(folder / "state"),
            "HEADRACE_DEFAULT_TIMEOUT_S": "120",
            "HEADRACE_MAX_MEMORY_BYTES": str(8 * 2**30),
        }
        tracker = tracker_pb2_grpc.TrackerServiceStub(channel_to(ports["grpc"], "trainer"))
        made = Stack(tracker, environment, database, folder / "state", folder, channel_to)
        made.gateway = tracker_pb2_grpc.TrackerServiceStub(channel_to(ports["grpc"], "gateway"))
        try:
            yield made
        finally:
            for one in made.started:
                if one.process.poll() is None:
                    one.kill()


@pytest.fixture
async def stack(database: Any, stack_servers: Any, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """For tests that start and kill trainers of their own."""
    async with running_stack(database.sqlalchemy, stack_servers, topic_prefix, tmp_path) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(stack_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack with one trainer that all tests of a module share; their trainings run one after another."""
    name = f"shared_trainer_{secrets.token_hex(4)}"
    server = stack_servers.servers.postgres
    server.sql('CREATE DATABASE :"name"', variables={"name": name})
    dsn = f"{server.dsn.rsplit('/', 1)[0]}/{name}".replace("postgresql://", "postgresql+asyncpg://", 1)
    try:
        async with running_stack(dsn, stack_servers, f"t{secrets.token_hex(5)}.", tmp_path_factory.mktemp("shared")) as made:
            await made.start_trainer()
            yield made
    finally:
        server.sql('DROP DATABASE :"name" WITH (FORCE)', variables={"name": name})
