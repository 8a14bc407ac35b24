"""The events that the registry acts on, each handed to its use case within the consumer's transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from eventing import topics
from eventing.consumer import Handler
from eventing.envelope import Received
from servicekit import telemetry
from servicekit.clock import Clock
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.domain.models import By
from registry.entrypoints import translate
from registry.handlers.versions import VersionEvents
from registry.ports import Session

TOPICS = (topics.EVALS, topics.DEPLOYS)


class EventHandlers:
    """Makes sessions of the consumer's connections; `session` is the store's."""

    def __init__(self, versions: VersionEvents, session: Callable[[AsyncConnection], Session], clock: Clock) -> None:
        self._versions = versions
        self._session = session
        self._clock = clock

    def table(self) -> Mapping[str, Handler]:
        """By event type."""
        return {
            "eval.passed": self.passed,
            "eval.failed": self.failed,
            "eval.skipped": self.skipped,
            "deploy.canary": self.canary,
            "deploy.advanced": self.advanced,
            "deploy.completed": self.completed,
            "deploy.rolled_back": self.rolled_back,
            "deploy.superseded": self.superseded,
            "deploy.reverted": self.reverted,
            "deploy.alarmed": self.alarmed,
        }

    async def passed(self, conn: AsyncConnection, event: Received) -> None:
        judgement = translate.judgement(evaluator_pb.EvalPassed.FromString(event.payload).judgement)
        traceparent = telemetry.current_traceparent() or event.traceparent
        await self._versions.passed(self._session(conn), judgement, self._by(event), traceparent)

    async def failed(self, conn: AsyncConnection, event: Received) -> None:
        message = evaluator_pb.EvalFailed.FromString(event.payload)
        said, why = message.judgement, f"evaluated again and failed: {message.reason}"
        await self._versions.failed(
            self._session(conn),
            said.model,
            said.journey.run_id,
            translate.deliverable(said.candidate) if said.candidate.blob.sha256 else None,
            said.evaluation_id,
            why,
            self._by(event),
        )

    async def skipped(self, conn: AsyncConnection, event: Received) -> None:
        message = evaluator_pb.EvalSkipped.FromString(event.payload)
        why = f"not evaluated again: {message.reason}"
        await self._versions.failed(self._session(conn), message.model, message.journey.run_id, None, "", why, self._by(event))

    async def canary(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployCanary.FromString(event.payload)
        await self._progressed(conn, event, message.rollout, f"canary with {_percent(message.weight_bps)} of the traffic")

    async def advanced(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployAdvanced.FromString(event.payload)
        await self._progressed(conn, event, message.rollout, f"step {message.step + 1} with {_percent(message.weight_bps)} of the traffic")

    async def completed(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployCompleted.FromString(event.payload)
        model_id, version = _version(message.rollout)
        how = "in production: the first version" if message.first else "in production: the rollout completed"
        await self._versions.completed(self._session(conn), model_id, version, how, self._by(event, message.reason))

    async def rolled_back(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployRolledBack.FromString(event.payload)
        model_id, version = _version(message.rollout)
        harm, why = translate.cause(message)
        await self._versions.rolled_back(self._session(conn), model_id, version, harm, why, self._by(event))

    async def superseded(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeploySuperseded.FromString(event.payload)
        model_id, version = _version(message.rollout)
        await self._versions.superseded(self._session(conn), model_id, version, message.by_version, self._by(event))

    async def reverted(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployReverted.FromString(event.payload)
        model_id, version = _version(message.rollout)
        by = self._by(event, message.reason)
        await self._versions.reverted(self._session(conn), model_id, version, message.to_version, message.reason, by)

    async def alarmed(self, conn: AsyncConnection, event: Received) -> None:
        message = deployer_pb.DeployAlarmed.FromString(event.payload)
        model_id, version = _version(message.rollout)
        await self._versions.alarmed(self._session(conn), model_id, version, message.reason, self._by(event))

    async def _progressed(self, conn: AsyncConnection, event: Received, rollout: deployer_pb.RolloutRef, how: str) -> None:
        model_id, version = _version(rollout)
        await self._versions.progressed(self._session(conn), model_id, version, how, self._by(event))

    def _by(self, event: Received, reason: str = "") -> By:
        return By(f"event:{event.type}:{event.id}", self._clock.now(), reason)


def _version(rollout: deployer_pb.RolloutRef) -> tuple[UUID, int]:
    return translate.model_id(rollout.version.model_id), rollout.version.version


def _percent(bps: int) -> str:
    return f"{bps / 100:g} %"
