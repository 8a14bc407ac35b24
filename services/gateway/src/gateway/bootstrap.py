"""Puts the gateway together: the data path, what feeds it, and the control API, on one port."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import grpc
from contracts.deployer.v1 import service_pb2 as deployer_pb
from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from contracts.registry.v1 import service_pb2 as registry_pb
from contracts.tracker.v1 import service_pb2 as tracker_pb
from contracts.trainer.v1 import service_pb2 as trainer_pb
from eventing.besteffort import BestEffortProducer
from eventing.kafka import KafkaBroker
from eventing.snapshots import SnapshotReader
from eventing.topics import ACCESS, ROUTES
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from servicekit import rpc, runtoken
from servicekit.access import GATEWAY, Caller
from servicekit.clock import Clock, SystemClock, SystemIds
from servicekit.errors import Unauthenticated
from servicekit.lifecycle import Closing, Component, LoadedHeap
from servicekit.settings import split_address

from gateway import page
from gateway.access import AccessTable
from gateway.arms import ArmLimits
from gateway.browser import Hosts
from gateway.control.app import Authenticate, create_app
from gateway.control.peers import Peers, connect
from gateway.control.traces import HttpSpanSource
from gateway.feed import Feed
from gateway.listener import DataServer
from gateway.metrics import Metrics
from gateway.mlflow import DoorLimits, MlflowDoor
from gateway.plane import DataPlane, Limits
from gateway.processes import ParentWatch, Processes
from gateway.sessions import Sessions, derived_secret
from gateway.settings import GatewaySettings
from gateway.shadow import ShadowLimits
from gateway.state import StateFile
from gateway.tracing import Spans
from gateway.traffic import TrafficPublisher

_PEERS = {
    "tracker": tracker_pb.DESCRIPTOR,
    "trainer": trainer_pb.DESCRIPTOR,
    "evaluator": evaluator_pb.DESCRIPTOR,
    "registry": registry_pb.DESCRIPTOR,
    "deployer": deployer_pb.DESCRIPTOR,
}
_READS = ("Get", "List", "Explain")
"""How the names of methods begin that may be tried again without harm."""


def build(settings: GatewaySettings) -> Sequence[Component]:
    """The gateway's components in the order in which they start; for several processes, the component that keeps them."""
    if settings.gateway_processes > 1 and settings.gateway_index < 0:
        return [Processes(settings)]
    clock, ids = SystemClock(), SystemIds()
    process = max(settings.gateway_index, 0)
    broker = KafkaBroker(settings.kafka_bootstrap, f"{settings.service_name}-{process}")
    plane = _plane(settings)
    state = StateFile(Path(settings.state_dir), str(process))
    feed = Feed(plane, state, clock)
    feed.attach(
        SnapshotReader(broker, ROUTES, feed.on_route, settings.topic_prefix),
        SnapshotReader(broker, ACCESS, feed.on_key, settings.topic_prefix),
    )
    plane.not_ready = feed.ready
    producer = BestEffortProducer(broker, settings.topic_prefix, source="/headrace/gateway")
    traffic = TrafficPublisher(plane, producer, clock, f"{_instance(settings)}-{process}", ids.hex32(), Metrics(plane))
    peers, channels = _peers(settings)
    spans = HttpSpanSource(settings.traces_url, settings.traces_secret.get_secret_value()) if settings.traces_url else None
    authenticate = _authenticate(plane.access, settings, clock)
    door = _door(plane, settings, authenticate)
    plane.streamed_body = door.streamed_body
    app = door.before(create_app(peers, authenticate, spans))
    host, port = split_address(settings.gateway_address)
    server = DataServer(plane, app, host, port, grace_s=settings.shutdown_grace_s * 0.6, reuse_port=settings.gateway_processes > 1)
    closes = [door.close, *(channel.close for channel in channels), *([spans.close] if spans is not None else [])]
    components: list[Component] = [Closing(*closes, broker.close), feed, traffic, LoadedHeap(), server]
    if settings.gateway_index >= 0:
        components.append(ParentWatch())
    return components


def _plane(settings: GatewaySettings) -> DataPlane:
    provider = trace.get_tracer_provider()
    return DataPlane(
        settings.upstreams,
        Limits(
            max_body_bytes=settings.max_body_bytes,
            max_head_bytes=settings.max_head_bytes,
            max_connections=settings.max_connections,
            newcomers_share=settings.newcomers_share,
            head_timeout_s=settings.head_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            keep_alive_s=settings.keep_alive_s,
            arm=ArmLimits(in_flight=settings.arm_in_flight),
            shadow=ShadowLimits(in_flight=settings.shadow_in_flight, waiting=settings.shadow_waiting),
        ),
        Spans.of(provider) if isinstance(provider, TracerProvider) else Spans(),
        settings.trace_sample_ratio,
    )


def _door(plane: DataPlane, settings: GatewaySettings, authenticate: Authenticate) -> MlflowDoor:
    service_token = settings.service_token.get_secret_value()
    # Without any secret, sessions are this process's own and end with it.
    secret = settings.session_secret.get_secret_value().encode() or derived_secret(service_token) or secrets.token_bytes(32)
    return MlflowDoor(
        authenticate,
        Sessions(plane.access, secret, settings.session_ttl_s),
        Hosts(settings.public_urls),
        page.find(settings.mlflow_page),
        DoorLimits(upload_bytes=settings.max_upload_bytes, body_bytes=settings.max_body_bytes),
        tracker=settings.tracker_http,
        registry=settings.registry_http,
        service_token=service_token,
    )


def _instance(settings: GatewaySettings) -> str:
    """The place of this gateway: the same after a restart, unless it listens on any free port."""
    if settings.gateway_instance:
        return settings.gateway_instance
    _, port = split_address(settings.gateway_address)
    return f"{socket.gethostname()}:{port or os.getpid()}"


def _peers(settings: GatewaySettings) -> tuple[Peers, list[grpc.aio.Channel]]:
    channels = {}
    for name, descriptor in _PEERS.items():
        reads = [
            f"/{service.full_name}/{method.name}"
            for service in descriptor.services_by_name.values()
            for method in service.methods
            if method.name.startswith(_READS) and not method.server_streaming
        ]
        channels[name] = rpc.channel(getattr(settings, f"{name}_address"), settings, idempotent=reads)
    return connect(channels), list(channels.values())


def _authenticate(access: AccessTable, settings: GatewaySettings, clock: Clock) -> Authenticate:
    """Who a bearer token of the control API stands for: the owner of an API key, or one attempt of one run."""
    secret = settings.run_token_secret.get_secret_value()

    def authenticate(token: str) -> Caller:
        if token.startswith(runtoken.PREFIX) and secret:
            claims = runtoken.verify(secret, token, clock.now())
            return Caller(GATEWAY, f"run:{claims.run_id}", frozenset(), claims.run_id, claims.fencing_token)
        grant = access.identify(None, token.encode())
        if grant is None:
            raise Unauthenticated("this API key is not known, or has expired")
        return Caller(GATEWAY, grant.subject, grant.roles)

    return authenticate
