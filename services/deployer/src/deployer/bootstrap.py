"""Puts the deployer together: the only file that names its ports and its adapters."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts import ArtifactStore
from artifacts.s3 import S3Store
from contracts.deployer.v1 import service_pb2_grpc
from contracts.eventing.v1 import service_pb2_grpc as dead_letters_grpc
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from eventing import schema as eventing_schema
from eventing import topics
from eventing.besteffort import BestEffortConsumer
from eventing.broker import Broker
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.dlq_grpc import DeadLetterServicer
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from eventing.snapshots import SnapshotReader
from jobs import Ended, Job, JobContext, JobQueue, State, Worker
from servicekit import db
from servicekit.clock import Clock, Ids, SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component
from servicekit.rpc import Server
from sqlalchemy.ext.asyncio import AsyncConnection

from deployer.adapters import leadership
from deployer.adapters.store import LOAD, SqlStore
from deployer.adapters.tables import SCHEMA
from deployer.adapters.triton import TritonRuntime
from deployer.domain.inputs import LoadFailed
from deployer.domain.rollout import Cause
from deployer.entrypoints.consumer import Deliveries, Traffic, handlers
from deployer.entrypoints.grpc import ACCESS, DEAD_LETTERS, SECTIONS, SERVICE, DeployerServicer, SectionServicer
from deployer.entrypoints.translate import EventEncoder
from deployer.handlers import Deployer
from deployer.judging import Judge
from deployer.leading import Leader
from deployer.loading import Loader
from deployer.ports import Runtime
from deployer.settings import DeployerSettings

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"

LEASE_S = 6.0
"""A load whose process died is taken up by another one after this time."""


@dataclass(frozen=True)
class World:
    """What the deployer meets outside. Tests put fakes here."""

    broker: Broker
    artifacts: ArtifactStore
    runtime: Runtime
    clock: Clock
    ids: Ids


def build(settings: DeployerSettings) -> Sequence[Component]:
    """The deployer's components in the order in which they start."""
    clock, ids = SystemClock(), SystemIds()
    artifacts = S3Store(settings.s3)
    runtime = TritonRuntime(
        settings.triton_grpc,
        settings.triton_http,
        settings.triton_secret.get_secret_value(),
        clock,
        backend=settings.triton_backend,
        load_timeout_s=settings.load_timeout_s,
    )
    broker = KafkaBroker(settings.kafka_bootstrap, settings.service_name)
    # First, so that it is stopped last, when no load reads from it any more.
    return [artifacts, *assemble(settings, World(broker, artifacts, runtime, clock, ids))]


def assemble(settings: DeployerSettings, world: World) -> Sequence[Component]:
    """As `build`, in a given world."""
    prefix, broker, clock, ids = settings.topic_prefix, world.broker, world.clock, world.ids
    engine = db.create_engine(settings.database_url)
    woken = asyncio.Event()
    outbox = Outbox(eventing_schema.tables(SCHEMA))
    outbox.on_committed(woken.set)
    queue = JobQueue(engine, SCHEMA, clock, ids)
    encoder = EventEncoder(clock, ids)
    store = SqlStore(engine, outbox, queue, encoder.event, encoder.route)
    runtimes = {world.runtime.name: world.runtime}
    deployer = Deployer(store, ids, {name: runtime.upstream for name, runtime in runtimes.items()}, woken.set)
    loader = Loader(store, deployer, world.artifacts, runtimes, clock, settings.max_model_bytes)
    judge = Judge(store, deployer, clock)

    async def load(job: Job, context: JobContext) -> None:
        await loader.load(job.payload["rollout_id"])

    async def load_ended(conn: AsyncConnection, job: Job, ended: Ended) -> None:
        if ended.state is State.FAILED:
            await deployer.tell_within(store.on(conn), job.payload["rollout_id"], LoadFailed(Cause.RUNTIME, ended.cause))

    holder = f"{socket.gethostname()}:{os.getpid()}"
    leader = Leader(
        lambda: leadership.session(settings.database_url, holder), store, deployer, judge, loader, clock, woken, settings.reconcile_s
    )
    consumer = Consumer(
        engine, SCHEMA, broker, "deployer", [topics.MODELS], handlers(deployer, store), prefix, outbox, clock=clock, ids=ids
    )
    server = Server(settings.grpc_address, settings, ACCESS)
    server.add(service_pb2_grpc.add_DeployerServiceServicer_to_server, DeployerServicer(deployer), SERVICE)
    server.add(registry_grpc.add_DeliverySectionServiceServicer_to_server, SectionServicer(deployer), SECTIONS)
    letters = DeadLetterServicer(DeadLetters(engine, SCHEMA, [consumer]))
    server.add(dead_letters_grpc.add_DeadLetterServiceServicer_to_server, letters, DEAD_LETTERS)
    return [
        Closing(world.runtime.close, broker.close, engine.dispose),
        Relay(settings.database_url, SCHEMA, broker, "/headrace/deployer", prefix, outbox=outbox, clock=clock),
        BestEffortConsumer(broker, topics.TRAFFIC, Traffic(judge), prefix),
        SnapshotReader(broker, topics.DELIVERIES, Deliveries(deployer), prefix, clock=clock),
        consumer,
        Worker(queue, {LOAD: load}, settings.load_concurrency, LEASE_S, on_end=load_ended, committed=outbox.committed),
        leader,
        server,
    ]
