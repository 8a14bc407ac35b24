"""The gRPC stubs of the services behind the control-plane API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from contracts.deployer.v1 import service_pb2_grpc as deployer_grpc
from contracts.evaluator.v1 import service_pb2_grpc as evaluator_grpc
from contracts.eventing.v1 import service_pb2_grpc as eventing_grpc
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from contracts.tracker.v1 import service_pb2_grpc as tracker_grpc
from contracts.trainer.v1 import service_pb2_grpc as trainer_grpc

if TYPE_CHECKING:
    from collections.abc import Mapping


CONSUMERS = ("trainer", "evaluator", "registry", "deployer")
"""The services that consume events."""


@dataclass(frozen=True)
class Peers:
    """One stub per service; `dead_letters` by the name of each service that consumes events."""

    tracker: tracker_grpc.TrackerServiceAsyncStub
    trainer: trainer_grpc.TrainerServiceAsyncStub
    evaluator: evaluator_grpc.EvaluatorServiceAsyncStub
    registry: registry_grpc.RegistryServiceAsyncStub
    access: registry_grpc.AccessServiceAsyncStub
    deployer: deployer_grpc.DeployerServiceAsyncStub
    dead_letters: Mapping[str, eventing_grpc.DeadLetterServiceAsyncStub]


def connect(channels: Mapping[str, grpc.aio.Channel]) -> Peers:
    """Stubs over channels by service name: tracker, trainer, evaluator, registry, deployer. Opens no connection yet."""
    return Peers(
        tracker=tracker_grpc.TrackerServiceStub(channels["tracker"]),
        trainer=trainer_grpc.TrainerServiceStub(channels["trainer"]),
        evaluator=evaluator_grpc.EvaluatorServiceStub(channels["evaluator"]),
        registry=registry_grpc.RegistryServiceStub(channels["registry"]),
        access=registry_grpc.AccessServiceStub(channels["registry"]),
        deployer=deployer_grpc.DeployerServiceStub(channels["deployer"]),
        dead_letters={name: eventing_grpc.DeadLetterServiceStub(channels[name]) for name in CONSUMERS},
    )
