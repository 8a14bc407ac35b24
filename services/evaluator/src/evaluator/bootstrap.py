"""Puts the evaluator together: the only file that names its ports and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from artifacts.s3 import S3Store
from contracts.evaluator.v1 import service_pb2_grpc
from contracts.eventing.v1 import service_pb2_grpc as eventing_grpc
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from eventing import schema as eventing_schema
from eventing import topics
from eventing.broker import Broker
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.dlq_grpc import DeadLetterServicer
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.readthrough import ReadThrough
from eventing.relay import Relay
from eventing.snapshots import SnapshotReader
from jobs import Backoff, JobQueue, Worker
from servicekit import db, rpc
from servicekit.clock import SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component
from servicekit.scratch import Scratch

from evaluator.adapters.holdout import ParquetHoldout
from evaluator.adapters.report import Reports
from evaluator.adapters.sandbox import Limits, SandboxPredictor
from evaluator.adapters.store import EVALUATE, SqlStore
from evaluator.adapters.tables import SCHEMA
from evaluator.adapters.tracker import IDEMPOTENT, TrackerDatasets
from evaluator.domain.delivery import Deliveries
from evaluator.entrypoints.consumer import NAME, TOPICS, Events
from evaluator.entrypoints.grpc import ACCESS, DEAD_LETTERS, SECTIONS, SERVICE, EvaluatorServicer, SectionServicer
from evaluator.entrypoints.translate import EventEncoder
from evaluator.entrypoints.work import Jobs
from evaluator.handlers import Evaluations, Evaluator, Holdouts, Intake
from evaluator.settings import EvaluatorSettings

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def build(settings: EvaluatorSettings, broker: Broker | None = None, backoff: Backoff | None = None) -> Sequence[Component]:
    """The evaluator's components in the order in which they start. For tests: a `broker` in place of Kafka, a `backoff` of jobs."""
    clock, ids = SystemClock(), SystemIds()
    engine = db.create_engine(settings.database_url)
    broker = broker or KafkaBroker(settings.kafka_bootstrap, settings.service_name)
    channel = rpc.channel(settings.tracker_address, settings, idempotent=IDEMPOTENT)
    outbox = Outbox(eventing_schema.tables(SCHEMA))
    queue = JobQueue(engine, SCHEMA, clock, ids, backoff or Backoff(first_s=1, most_s=15))
    store = SqlStore(engine, outbox, queue, EventEncoder(clock, ids))
    objects = S3Store(settings.s3)
    scratch = Scratch(settings.state_dir)

    deliveries, read = Deliveries(), ReadThrough(broker, topics.DELIVERIES, settings.topic_prefix)
    events = Events(Intake(deliveries, clock, ids), deliveries, read, store.on)
    snapshots = SnapshotReader(broker, topics.DELIVERIES, events.on_delivery, settings.topic_prefix, on_read=read.saw)
    consumer = Consumer(engine, SCHEMA, broker, NAME, TOPICS, events.handlers(), settings.topic_prefix, outbox)

    limits = Limits(memory_bytes=settings.worker_memory_bytes, timeout_s=settings.worker_timeout_s)
    datasets = TrackerDatasets(channel)
    evaluator = Evaluator(
        store,
        objects,
        datasets,
        ParquetHoldout(),
        SandboxPredictor(limits, isolated=settings.sandbox == "namespaces", work_dir=scratch.path),
        Reports(),
        clock,
        work_dir=scratch.path,
        max_holdout_bytes=settings.max_holdout_bytes,
    )
    jobs = Jobs(evaluator, store.on, store.committed)
    worker = Worker(
        queue,
        {EVALUATE: jobs.evaluate},
        concurrency=settings.evaluations_at_once,
        lease_s=settings.job_lease_s,
        on_end=jobs.on_end,
        committed=store.committed,
        grace_s=settings.shutdown_grace_s / 2,
    )

    server = rpc.Server(settings.grpc_address, settings, ACCESS)
    evaluations = Evaluations(store, objects, url_ttl_s=settings.download_url_ttl_s)
    server.add(service_pb2_grpc.add_EvaluatorServiceServicer_to_server, EvaluatorServicer(evaluations), SERVICE)
    server.add(registry_grpc.add_DeliverySectionServiceServicer_to_server, SectionServicer(Holdouts(datasets)), SECTIONS)
    letters = DeadLetterServicer(DeadLetters(engine, SCHEMA, [consumer]))
    server.add(eventing_grpc.add_DeadLetterServiceServicer_to_server, letters, DEAD_LETTERS)
    return [
        Closing(channel.close, broker.close, objects.stop, engine.dispose),
        scratch,
        Relay(settings.database_url, SCHEMA, broker, "/headrace/evaluator", settings.topic_prefix, outbox=outbox),
        snapshots,
        consumer,
        worker,
        server,
    ]
