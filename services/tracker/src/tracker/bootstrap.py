"""Puts the tracker together: the only file that names its ports and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from artifacts.s3 import S3Store
from contracts.tracker.v1 import service_pb2_grpc
from eventing import schema as eventing_schema
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from servicekit import db
from servicekit.clock import SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component, LoadedHeap
from servicekit.rpc import Server
from servicekit.scratch import Scratch
from servicekit.settings import parse_token_hashes

from tracker.adapters.history import SqlHistories
from tracker.adapters.search import SqlSearches
from tracker.adapters.store import SqlStore
from tracker.adapters.tables import SCHEMA
from tracker.adoption import Adoption
from tracker.amendments import Amendments
from tracker.artifacts import Artifacts
from tracker.conversions import Conversions
from tracker.deliverables import Deliverables
from tracker.entrypoints.grpc import ACCESS, SERVICE, TrackerServicer
from tracker.entrypoints.leases import LeaseWatch
from tracker.entrypoints.mlflow.api import MlflowApi
from tracker.entrypoints.translate import EventEncoder
from tracker.experiments import Experiments
from tracker.handlers import Tracker
from tracker.histories import Histories
from tracker.logged_models import LoggedModels
from tracker.searches import Searches
from tracker.settings import TrackerSettings

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def build(settings: TrackerSettings) -> Sequence[Component]:
    """The tracker's components in the order in which they start."""
    clock, ids = SystemClock(), SystemIds()
    engine = db.create_engine(settings.database_url)
    broker = KafkaBroker(settings.kafka_bootstrap, settings.service_name)
    outbox = Outbox(eventing_schema.tables(SCHEMA))
    points = db.create_engine(settings.database_url, pre_ping=False)
    store = SqlStore(engine, outbox, EventEncoder(clock, ids), points)
    objects = S3Store(settings.s3)
    scratch = Scratch(settings.state_dir)
    experiments = Experiments(store, clock)
    adoption = Adoption(store, objects, clock, work_dir=scratch.path)
    tracker = Tracker(
        store,
        clock,
        ids,
        before_end=adoption.of_run,
        token_secret=settings.run_token_secret.get_secret_value(),
        token_ttl=timedelta(seconds=settings.run_token_ttl_s),
    )
    deliverables = Deliverables(store, objects, clock, ids, url_ttl_s=settings.download_url_ttl_s, work_dir=scratch.path)
    conversions = Conversions(store, objects, work_dir=scratch.path)
    artifacts = Artifacts(store, objects, deliverables, ids, url_ttl_s=settings.download_url_ttl_s)
    server = Server(settings.grpc_address, settings, ACCESS)
    servicer = TrackerServicer(experiments, tracker, deliverables, conversions)
    server.add(service_pb2_grpc.add_TrackerServiceServicer_to_server, servicer, SERVICE)
    searches = Searches(SqlSearches(engine, settings.search_timeout_s), extended=settings.extended_filters)
    api = MlflowApi(
        experiments,
        tracker,
        Amendments(store, clock, adoption.of_run),
        searches,
        Histories(SqlHistories(engine)),
        artifacts,
        LoggedModels(store, adoption, clock, ids),
        parse_token_hashes(settings.service_token_hashes),
    )
    return [
        Closing(deliverables.close, broker.close, objects.stop, points.dispose, engine.dispose),
        scratch,
        Relay(settings.database_url, SCHEMA, broker, "/headrace/tracker", settings.topic_prefix, outbox=outbox),
        LeaseWatch(tracker, settings.lease_check_s, settings.lease_grace_s),
        LoadedHeap(),
        api,
        server,
    ]
