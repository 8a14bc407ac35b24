"""Puts the registry together: the only file that names its ports and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contracts.eventing.v1 import service_pb2_grpc as dlq_grpc_pb
from contracts.registry.v1 import service_pb2_grpc
from eventing import schema as eventing_schema
from eventing.broker import Broker
from eventing.consumer import Consumer
from eventing.dlq import DeadLetters
from eventing.dlq_grpc import DeadLetterServicer
from eventing.kafka import KafkaBroker
from eventing.outbox import Outbox
from eventing.relay import Relay
from servicekit import db
from servicekit.clock import SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component
from servicekit.rpc import Server, channel
from servicekit.settings import parse_token_hashes

from registry.adapters.sections import VALIDATE, GrpcSectionValidator
from registry.adapters.store import SqlStore
from registry.adapters.tables import SCHEMA
from registry.adapters.webhooks import WebhookPost, WebhookSender
from registry.entrypoints import translate
from registry.entrypoints.consumer import TOPICS, EventHandlers
from registry.entrypoints.grpc import ACCESS, ACCESS_SERVICE, DEAD_LETTERS, REGISTRY, AccessServicer, RegistryServicer
from registry.entrypoints.mlflow.api import MlflowApi
from registry.entrypoints.republisher import Republisher
from registry.handlers.access import Access
from registry.handlers.audit import AuditTrail
from registry.handlers.catalogue import Catalogue
from registry.handlers.deliveries import Deliveries
from registry.handlers.snapshots import Snapshots
from registry.handlers.versions import VersionEvents, Versions
from registry.settings import RegistrySettings

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


class _FirstKey:
    """Stores the first admin key before anybody is let in."""

    name = "first-key"

    def __init__(self, access: Access, text: str) -> None:
        self._access = access
        self._text = text

    async def start(self) -> None:
        if self._text:
            await self._access.bootstrap(self._text)

    async def stop(self) -> None:
        """Nothing to let go."""


def build(settings: RegistrySettings, broker: Broker | None = None) -> Sequence[Component]:
    """The registry's components in the order in which they start; `broker` in place of Kafka, for tests."""
    clock, ids = SystemClock(), SystemIds()
    engine = db.create_engine(settings.database_url)
    broker = broker or KafkaBroker(settings.kafka_bootstrap, settings.service_name)
    outbox = Outbox(eventing_schema.tables(SCHEMA))
    store = SqlStore(engine, outbox, translate.encode, clock, ids, webhooks=bool(settings.webhook_url))
    peers = {"train": settings.trainer_address, "evaluate": settings.evaluator_address, "serve": settings.deployer_address}
    channels = {section: channel(address, settings, idempotent=[VALIDATE]) for section, address in peers.items()}
    access = Access(store, clock, ids)

    events = EventHandlers(VersionEvents(ids), store.session, clock)
    consumer = Consumer(engine, SCHEMA, broker, SCHEMA, TOPICS, events.table(), settings.topic_prefix, outbox)

    versions = Versions(store, clock, ids)
    api = MlflowApi(Catalogue(store, clock, ids), versions, parse_token_hashes(settings.service_token_hashes))
    server = Server(settings.grpc_address, settings, ACCESS)
    validators = {section: GrpcSectionValidator(one) for section, one in channels.items()}
    registry = RegistryServicer(Deliveries(store, validators, clock), versions, AuditTrail(store))
    server.add(service_pb2_grpc.add_RegistryServiceServicer_to_server, registry, REGISTRY)
    server.add(service_pb2_grpc.add_AccessServiceServicer_to_server, AccessServicer(access), ACCESS_SERVICE)
    letters = DeadLetterServicer(DeadLetters(engine, SCHEMA, [consumer]))
    server.add(dlq_grpc_pb.add_DeadLetterServiceServicer_to_server, letters, DEAD_LETTERS)

    components: list[Component] = [
        Closing(*(one.close for one in channels.values()), broker.close, engine.dispose),
        _FirstKey(access, settings.bootstrap_admin_key_hash),
        Relay(settings.database_url, SCHEMA, broker, "/headrace/registry", settings.topic_prefix, outbox=outbox),
        consumer,
        Republisher(Snapshots(store)),
        api,
    ]
    if settings.webhook_url:
        secret = settings.webhook_secret.get_secret_value()
        sender = WebhookSender(engine, clock, WebhookPost(clock, settings.webhook_url, secret, settings.webhook_allow_private))
        outbox.on_committed(sender.wake)
        components.append(sender)
    return [*components, server]
