"""Puts the trainer together, the service and the process of an attempt: the only file that names its ports and its adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from artifacts import ArtifactStore
from artifacts.s3 import S3Store
from contracts.eventing.v1 import service_pb2_grpc as eventing_pb2_grpc
from contracts.registry.v1 import service_pb2_grpc as registry_pb2_grpc
from contracts.tracker.v1 import service_pb2_grpc as tracker_pb2_grpc
from contracts.trainer.v1 import service_pb2_grpc
from eventing import schema as eventing_schema
from eventing import topics
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.dlq_grpc import DeadLetterServicer
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.readthrough import ReadThrough
from eventing.relay import Relay
from eventing.snapshots import SnapshotReader
from jobs import JobQueue, Worker
from servicekit import db, rpc
from servicekit.clock import Clock, Ids, SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component
from servicekit.scratch import Scratch

from trainer.adapters.logs import LogFiles, log_file
from trainer.adapters.store import CONVERSION, KIND, SqlStore
from trainer.adapters.tables import SCHEMA
from trainer.adapters.tracker import IDEMPOTENT, GrpcTracker
from trainer.domain.training import Resources
from trainer.entrypoints.attempts import Attempts, Recovery, SandboxCheck, StateFolder
from trainer.entrypoints.conversions import NAME, TOPICS, ConversionJobs, RunEvents
from trainer.entrypoints.deliveries import DeliveryRecords
from trainer.entrypoints.grpc import ACCESS, DEAD_LETTERS, SECTION_SERVICE, SERVICE, SectionServicer, TrainerServicer
from trainer.entrypoints.schedules import Schedules
from trainer.entrypoints.translate import EventEncoder
from trainer.handlers import Trainer
from trainer.packaging.conversions import Conversions
from trainer.packaging.packager import Packager
from trainer.runner.attempt import Attempt, Options
from trainer.runner.egress import HTTP, HTTPS, Destination, destination, destination_of, destinations
from trainer.runner.keeper import Claim
from trainer.runner.log import Log
from trainer.runner.sandbox import Limits
from trainer.runner.source import SourceFetcher
from trainer.runner.venv import Venvs
from trainer.settings import TrainerSettings

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
_URL_TTL_S = 3_600

SDK_IMPORTS = ("httpx", "httpcore", "h11", "anyio", "idna", "certifi", "typing_extensions")
"""What the SDK's import of httpx needs: pure Python, all of it."""


def build(settings: TrainerSettings) -> Sequence[Component]:
    """The trainer's components in the order in which they start."""
    clock, ids = SystemClock(), SystemIds()
    engine = db.create_engine(settings.database_url)
    broker = KafkaBroker(settings.kafka_bootstrap, settings.service_name)
    queue = JobQueue(engine, SCHEMA, clock, ids)
    outbox = Outbox(eventing_schema.tables(SCHEMA))
    store = SqlStore(engine, queue, outbox, EventEncoder(clock, ids))
    objects = S3Store(settings.s3)
    trainer = _trainer(settings, store, objects, clock, ids)
    attempts = Attempts(trainer, store, _state_dir(settings))
    folder = StateFolder(_state_dir(settings))
    channel = rpc.channel(settings.tracker_address, settings, idempotent=IDEMPOTENT)
    venvs = _venvs(settings)
    scratch = Scratch(_state_dir(settings))
    limits = Limits(settings.conversion_memory_bytes, settings.conversion_disk_bytes, settings.conversion_timeout_s)
    conversions = Conversions(
        GrpcTracker(tracker_pb2_grpc.TrackerServiceStub(channel)), objects, Packager(venvs, limits), work_dir=scratch.path
    )
    read = ReadThrough(broker, topics.DELIVERIES, settings.topic_prefix)
    runs = RunEvents(conversions, read, store.on)
    consumer = Consumer(engine, SCHEMA, broker, NAME, TOPICS, runs.handlers(), settings.topic_prefix, outbox)
    converting = Worker(
        queue,
        {CONVERSION: ConversionJobs(conversions).convert},
        settings.conversion_slots,
        settings.job_lease_s,
        grace_s=0.0,
        name="conversions",
    )
    worker = Worker(
        queue,
        {KIND: attempts.handle},
        settings.training_slots,
        settings.job_lease_s,
        on_end=attempts.on_end,
        committed=attempts.committed,
        grace_s=0.0,
        name="trainings",
    )
    server = rpc.Server(settings.grpc_address, settings, ACCESS)
    server.add(service_pb2_grpc.add_TrainerServiceServicer_to_server, TrainerServicer(trainer), SERVICE)
    server.add(registry_pb2_grpc.add_DeliverySectionServiceServicer_to_server, SectionServicer(trainer), SECTION_SERVICE)
    letters = DeadLetterServicer(DeadLetters(engine, SCHEMA, [consumer]))
    server.add(eventing_pb2_grpc.add_DeadLetterServiceServicer_to_server, letters, DEAD_LETTERS)
    return [
        Closing(channel.close, broker.close, engine.dispose, objects.stop, _closing(venvs)),
        folder,
        scratch,
        SandboxCheck(),
        Relay(settings.database_url, SCHEMA, broker, "/headrace/trainer", settings.topic_prefix, outbox=outbox),
        SnapshotReader(broker, topics.DELIVERIES, DeliveryRecords(trainer), settings.topic_prefix, on_read=read.saw),
        consumer,
        Recovery(folder, queue, attempts),
        worker,
        converting,
        Schedules(trainer),
        server,
    ]


@asynccontextmanager
async def build_runner(settings: TrainerSettings, claim: Claim, folder: Path) -> AsyncIterator[tuple[Attempt, JobQueue]]:
    """The process of one attempt: its work, and the queue whose lease it keeps."""
    clock, ids = SystemClock(), SystemIds()
    async with AsyncExitStack() as stack:
        engine = db.create_engine(settings.database_url, pool_size=3)
        stack.push_async_callback(engine.dispose)
        queue = JobQueue(engine, SCHEMA, clock, ids)
        store = SqlStore(engine, queue, Outbox(eventing_schema.tables(SCHEMA)), EventEncoder(clock, ids))
        objects = S3Store(settings.s3)
        stack.push_async_callback(objects.stop)
        trainer = _trainer(settings, store, objects, clock, ids)
        channel = rpc.channel(settings.tracker_address, settings, idempotent=IDEMPOTENT)
        stack.push_async_callback(channel.close)
        log = Log(log_file(_state_dir(settings), claim.training_id), settings.max_log_bytes)
        stack.callback(log.close)
        venvs = _venvs(settings)
        stack.callback(venvs.close)
        yield (
            Attempt(
                claim.training_id,
                claim.attempt,
                claim.fencing_token,
                folder,
                log,
                trainer=trainer,
                tracker=GrpcTracker(tracker_pb2_grpc.TrackerServiceStub(channel)),
                sources=SourceFetcher(objects, settings.max_source_bytes, destinations(settings.git_hosts, HTTPS)),
                venvs=venvs,
                objects=objects,
                clock=clock,
                options=Options(
                    url=settings.public_url,
                    sdk=_package("headrace"),
                    packages=[_package(name) for name in SDK_IMPORTS],
                    run_lease_s=settings.run_lease_s,
                    visible=[Path(path) for path in settings.sandbox_visible.split(":") if path],
                    egress=_egress(settings),
                ),
            ),
            queue,
        )


def _trainer(settings: TrainerSettings, store: SqlStore, objects: ArtifactStore, clock: Clock, ids: Ids) -> Trainer:
    return Trainer(
        store,
        objects,
        LogFiles(_state_dir(settings)),
        clock,
        ids,
        defaults=Resources(1, settings.default_memory_bytes, settings.default_timeout_s, settings.default_disk_bytes),
        most=Resources(0, settings.max_memory_bytes, settings.max_timeout_s, settings.max_disk_bytes),
        max_attempts=settings.max_attempts,
        max_source_bytes=settings.max_source_bytes,
        url_ttl_s=_URL_TTL_S,
    )


def _egress(settings: TrainerSettings) -> frozenset[Destination]:
    """What trainings may reach: the gateway, the object store as presigned URLs name it, and what the operator allows."""
    store = destination(settings.s3_public_endpoint or settings.s3_endpoint, HTTPS if settings.s3_secure else HTTP)
    return destinations(settings.training_egress) | {destination_of(settings.public_url), store}


def _venvs(settings: TrainerSettings) -> Venvs:
    return Venvs(Path(settings.venv_dir) if settings.venv_dir else _state_dir(settings) / "venvs", settings.max_venv_bytes)


def _closing(venvs: Venvs) -> Callable[[], Awaitable[None]]:
    async def close() -> None:
        venvs.close()

    return close


def _state_dir(settings: TrainerSettings) -> Path:
    return settings.state_dir.absolute()


def _package(name: str) -> Path:
    """Where an installed package lies, without importing it: training scripts see it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the package {name} is not installed beside the trainer")
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin
