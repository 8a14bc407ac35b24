"""Between protobuf and the domain: the only file of the deployer that knows both."""

from __future__ import annotations

import json

from contracts.deployer.v1 import events_pb2 as events
from contracts.deployer.v1 import service_pb2 as pb
from contracts.gateway.v1 import events_pb2 as gateway
from contracts.registry.v1 import events_pb2 as registry
from contracts.tracker.v1 import model_pb2 as tracker
from eventing import topics
from eventing.envelope import Event as Envelope
from google.protobuf.message import DecodeError, Message
from servicekit.clock import Clock, Ids
from servicekit.errors import Invalid
from servicekit.moments import moment

from deployer.domain import events as ev
from deployer.domain.judge import GuardEvidence
from deployer.domain.policy import Assign, Guard, GuardKind
from deployer.domain.progress import missing
from deployer.domain.rollout import JUDGED, Cause, Hold, Rollout, State
from deployer.domain.route import Role, Route, RoutedArm, ShadowRoute
from deployer.domain.signature import Signature, Tensor
from deployer.domain.version import Blob, Journey, Version
from deployer.domain.windows import Counts, ShadowCounts
from deployer.handlers import Promotion
from deployer.judging import ArmReport, EndpointReport, Report
from deployer.ports import Announcement, Decision, Delivery, EndpointRecord, RolloutRecord

CAUSES: dict[Cause, events.EndCause.ValueType] = {
    Cause.HARM: events.END_CAUSE_HARM,
    Cause.BREACH: events.END_CAUSE_BREACH,
    Cause.INTERFERENCE: events.END_CAUSE_INTERFERENCE,
    Cause.DEADLINE: events.END_CAUSE_DEADLINE,
    Cause.RUNTIME: events.END_CAUSE_RUNTIME,
    Cause.ARTIFACT: events.END_CAUSE_ARTIFACT,
    Cause.OPERATOR: events.END_CAUSE_OPERATOR,
    Cause.SUPERSEDED: events.END_CAUSE_SUPERSEDED,
}
ROLES: dict[Role, events.ArmRole.ValueType] = {
    Role.BASELINE: events.ARM_ROLE_BASELINE,
    Role.CANARY: events.ARM_ROLE_CANARY,
    Role.SHADOW: events.ARM_ROLE_SHADOW,
}
GUARD_KINDS: dict[GuardKind, events.GuardKind.ValueType] = {
    GuardKind.ERROR: events.GUARD_KIND_ERROR,
    GuardKind.LATENCY: events.GUARD_KIND_LATENCY,
    GuardKind.SHADOW_DIFFERENCE: events.GUARD_KIND_SHADOW_DIFFERENCE,
}
ASSIGNS: dict[Assign, events.Assign.ValueType] = {
    Assign.REQUEST: events.ASSIGN_REQUEST,
    Assign.CALLER: events.ASSIGN_CALLER,
}


# What comes in.


def promotion(payload: bytes) -> Promotion:
    """Read model.promoted. Raises Invalid."""
    message = registry.ModelPromoted()
    _parse(message, payload)
    ref, journey, model = message.version, message.journey, message.model
    if not ref.model_id or ref.version < 1:
        raise Invalid("model.promoted names no version")
    version = Version(
        model_id=ref.model_id,
        model=ref.model,
        version=ref.version,
        journey=Journey(journey.journey_id, journey.delivery, journey.delivery_revision, journey.run_id),
        format=model.format,
        blob=_blob(model.blob),
        signature=_signature(model.signature),
        samples=_blob(model.samples) if model.HasField("samples") and model.samples.sha256 else None,
    )
    return Promotion(message.endpoint, version, message.evaluation_id, None if message.override else message.champion_version)


def delivery(payload: bytes) -> Delivery:
    """Read delivery.applied. Raises Invalid."""
    message = registry.DeliveryApplied()
    _parse(message, payload)
    try:
        section = json.loads(message.serve_json) if message.serve_json else None
    except ValueError as error:
        raise Invalid(f"the serve section of delivery {message.name!r} is no JSON: {error}") from error
    if section is not None and not isinstance(section, dict):
        raise Invalid(f"the serve section of delivery {message.name!r} has no fields")
    return Delivery(message.name, message.revision, message.endpoint, section, message.deleted)


def report(payload: bytes) -> Report:
    """Read traffic.window. Raises Invalid."""
    message = gateway.TrafficWindow()
    _parse(message, payload)
    endpoints = tuple(
        EndpointReport(
            endpoint=entry.endpoint,
            revision=entry.route_revision,
            rollout_id=entry.rollout_id,
            arms={
                arm.arm: ArmReport(
                    Counts(arm.requests, dict(arm.bad)),
                    ShadowCounts(arm.shadow_compared, arm.shadow_different, arm.shadow_errors, arm.shadow_shed),
                )
                for arm in entry.arms
            },
            unjudged=entry.unjudged,
        )
        for entry in message.endpoints
    )
    return Report(message.instance, message.boot_id, message.sequence, message.duration_ms / 1000, endpoints, message.leaving)


def _parse(message: Message, payload: bytes) -> None:
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise Invalid(f"not a {message.DESCRIPTOR.name}: {error}") from error


def _blob(blob: tracker.BlobRef) -> Blob:
    return Blob(blob.sha256, blob.size_bytes, blob.key)


def _signature(signature: tracker.ModelSignature) -> Signature:
    return Signature(tuple(_tensor(spec) for spec in signature.inputs), tuple(_tensor(spec) for spec in signature.outputs))


def _tensor(spec: tracker.TensorSpec) -> Tensor:
    return Tensor(spec.name, spec.datatype, tuple(spec.shape))


# What goes out as events.


class EventEncoder:
    """Writes domain events for the outbox."""

    def __init__(self, clock: Clock, ids: Ids) -> None:
        self._clock = clock
        self._ids = ids

    def event(self, announcement: Announcement, sequence: int) -> Envelope:
        """An event of headrace.deploys."""
        kind, message = _event(announcement)
        return self._envelope(kind, topics.DEPLOYS, announcement.record.rollout.endpoint, sequence, message)

    def route(self, route: Route, publication: int, sequence: int) -> Envelope:
        """A snapshot for headrace.routes."""
        return self._envelope("route.changed", topics.ROUTES, route.endpoint, sequence, route_changed(route, publication))

    def _envelope(self, kind: str, topic: str, key: str, sequence: int, message: Message) -> Envelope:
        return Envelope(
            type=kind,
            topic=topic,
            key=key,
            sequence=sequence,
            payload=message.SerializeToString(),
            id=self._ids.uuid7(),
            time=self._clock.now(),
            subject=key,
        )


def _event(announcement: Announcement) -> tuple[str, Message]:
    ref, revision = rollout_ref(announcement.record), announcement.revision
    match announcement.event:
        case ev.CanaryStarted(weight=weight):
            return "deploy.canary", events.DeployCanary(rollout=ref, weight_bps=weight, route_revision=revision)
        case ev.Advanced(step=step, weight=weight, reason=reason):
            advanced = events.DeployAdvanced(rollout=ref, step=step, weight_bps=weight, route_revision=revision, reason=reason)
            return "deploy.advanced", advanced
        case ev.Completed(first=first, reason=reason):
            blob = _blob_ref(announcement.record.version.blob)
            completed = events.DeployCompleted(rollout=ref, first=first, route_revision=revision, blob=blob, reason=reason)
            return "deploy.completed", completed
        case ev.RolledBack(cause=cause, reason=reason):
            rolled_back = events.DeployRolledBack(rollout=ref, cause=CAUSES[cause], reason=reason, route_revision=revision)
            return "deploy.rolled_back", rolled_back
        case ev.Superseded(by_version=by_version):
            return "deploy.superseded", events.DeploySuperseded(rollout=ref, by_version=by_version)
        case ev.Reverted(reason=reason):
            reverted = events.DeployReverted(rollout=ref, reason=reason, route_revision=revision)
            if announcement.baseline is not None:
                reverted.to_version = announcement.baseline.version
                reverted.to_blob.CopyFrom(_blob_ref(announcement.baseline.blob))
            return "deploy.reverted", reverted
        case ev.Alarmed(reason=reason):
            revertible = announcement.record.rollout.revertible
            return "deploy.alarmed", events.DeployAlarmed(rollout=ref, reason=reason, route_revision=revision, revertible=revertible)
        case other:
            raise TypeError(f"{type(other).__name__} is nobody else's business")


def rollout_ref(record: RolloutRecord) -> events.RolloutRef:
    """Which rollout, of what, where."""
    version, journey = record.version, record.version.journey
    return events.RolloutRef(
        rollout_id=record.rollout.id,
        endpoint=record.rollout.endpoint,
        version=registry.VersionRef(model_id=version.model_id, model=version.model, version=version.version),
        journey=registry.Journey(
            journey_id=journey.id, delivery=journey.delivery, delivery_revision=journey.revision, run_id=journey.run_id
        ),
        baseline_version=record.baseline_version,
    )


def route_changed(route: Route, publication: int) -> events.RouteChanged:
    """A route's snapshot."""
    message = events.RouteChanged(
        endpoint=route.endpoint,
        revision=route.revision,
        deleted=route.deleted,
        arms=[_arm(arm) for arm in route.arms],
        assign=ASSIGNS[route.assign],
        guards=[_guard(guard) for guard in route.guards],
        rollout_id=route.rollout_id,
        in_rollout=route.watched,
        window_ms=route.window_ms,
        upstream_timeout_ms=route.timeout_ms,
        publication=publication,
        delivery=route.delivery,
    )
    if route.shadow is not None:
        message.shadow.CopyFrom(_shadow(route.shadow))
    if route.signature is not None:
        message.signature.CopyFrom(
            tracker.ModelSignature(
                inputs=[_tensor_spec(tensor) for tensor in route.signature.inputs],
                outputs=[_tensor_spec(tensor) for tensor in route.signature.outputs],
            )
        )
    return message


def _arm(arm: RoutedArm) -> events.Arm:
    return events.Arm(
        arm=arm.arm,
        role=ROLES[arm.role],
        runtime=arm.runtime,
        upstream=arm.upstream,
        runtime_model=arm.runtime_model,
        model=arm.model,
        version=arm.version,
        weight_bps=arm.weight,
        fallback_weight_bps=arm.fallback,
    )


def _shadow(shadow: ShadowRoute) -> events.Shadow:
    return events.Shadow(
        arm=shadow.arm,
        share_bps=shadow.share,
        only_input=shadow.only_input,
        only_values=shadow.only_values,
        tolerance=shadow.tolerance,
        deadline_ms=shadow.deadline_ms,
    )


def _guard(guard: Guard) -> events.Guard:
    return events.Guard(id=guard.id, kind=GUARD_KINDS[guard.kind], limit_ms=guard.limit_ms)


def _blob_ref(blob: Blob) -> tracker.BlobRef:
    return tracker.BlobRef(sha256=blob.sha256, size_bytes=blob.size, key=blob.key)


def _tensor_spec(tensor: Tensor) -> tracker.TensorSpec:
    return tracker.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


# What is answered to calls.


def endpoint(record: EndpointRecord) -> pb.Endpoint:
    """An endpoint with its route."""
    found = record.endpoint
    live = next((arm.version for arm in record.route.arms if arm.arm == found.serving), 0) if record.route else 0
    answer = pb.Endpoint(name=found.name, delivery=record.delivery, rollout_id=found.live or "", live_version=live)
    if record.route is not None:
        answer.route.CopyFrom(route_changed(record.route, 0))
    return answer


def rollout(record: RolloutRecord) -> pb.Rollout:
    """A rollout with the evidence of its guards."""
    found = record.rollout
    answer = pb.Rollout(
        ref=rollout_ref(record),
        state=found.state.value,
        step=found.step,
        weight_bps=found.weight,
        paused=found.hold is Hold.PAUSED,
        held=found.hold is not None and found.hold is not Hold.PAUSED,
        reason=_reason(found),
        guards=[_evidence(guard, found) for guard in found.policy.guards],
        route_revision=found.revision,
        shadow_compared=found.evidence.shadow.compared,
        shadow_different=found.evidence.shadow.different,
        watched=found.judged and found.state is State.COMPLETED,
        alarm=found.alarm,
        stale=found.stale,
        evaluation_id=found.evaluation,
    )
    if found.cause is not None:
        answer.cause = CAUSES[found.cause]
    if record.created_at is not None:
        answer.created_at.CopyFrom(moment(record.created_at))
    if record.finished_at is not None:
        answer.finished_at.CopyFrom(moment(record.finished_at))
    return answer


def _reason(rollout: Rollout) -> str:
    """Why it stands where it does; while traffic decides, also what it still waits for. A hold says so itself."""
    waits_for = missing(rollout) if rollout.state in JUDGED and rollout.hold is None else ""
    return "; ".join(part for part in (rollout.reason, waits_for) if part)


def _evidence(guard: Guard, rollout: Rollout) -> pb.GuardEvidence:
    seen: GuardEvidence = rollout.evidence.of(guard.id)
    return pb.GuardEvidence(
        id=guard.id,
        canary_bad_rate=seen.canary.value,
        baseline_bad_rate=seen.baseline.value,
        harm_wealth=seen.harm.value,
        no_harm_wealth=seen.no_harm.value,
        canary_requests=seen.canary.units,
        baseline_requests=seen.baseline.units,
    )


def decision(row: Decision) -> pb.Decision:
    """One row of the decision log."""
    return pb.Decision(
        sequence=row.sequence,
        at=moment(row.at),
        from_state=row.source,
        to_state=row.target,
        reason=row.reason,
        evidence_json=json.dumps(row.evidence) if row.evidence else "",
    )
