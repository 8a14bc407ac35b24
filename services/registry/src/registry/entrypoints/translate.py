"""Protobuf <-> domain: the only file of the registry that knows both."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.registry.v1 import events_pb2, service_pb2
from contracts.tracker.v1 import model_pb2
from eventing import topics
from eventing.consumer import UnknownValue
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from servicekit.errors import Invalid, Violation
from servicekit.moments import moment

from registry.domain.access import ApiKey
from registry.domain.approvals import Approval
from registry.domain.deliveries import Revision
from registry.domain.events import (
    AccessChanged,
    DeliveryApplied,
    DomainEvent,
    ModelApprovalRequested,
    ModelArchived,
    ModelPromoted,
    ModelReevaluationRequested,
    ModelRegistered,
    VersionRef,
)
from registry.domain.versions import Deliverable, Evidence, Journey, Judgement
from registry.handlers.deliveries import Applied
from registry.ports import AuditRow, Encoded, ModelSummary, VersionView

# Events that are sent


def encode(event: DomainEvent) -> Encoded:
    """A domain event as it goes out: its type, topic, subject and message."""
    match event:
        case DeliveryApplied(revision):
            return _encoded("delivery.applied", topics.DELIVERIES, revision.name, _applied_event(revision))
        case AccessChanged(key):
            return _encoded("access.changed", topics.ACCESS, key.key_id, _access_event(key))
        case ModelRegistered():
            registered = events_pb2.ModelRegistered(
                version=_ref(event.version),
                journey=journey(event.journey),
                blob=_deliverable(event.deliverable).blob,
                evaluation_id=event.evaluation_id,
            )
            return _encoded("model.registered", topics.MODELS, _name(event.version), registered)
        case ModelApprovalRequested():
            requested = events_pb2.ModelApprovalRequested(
                version=_ref(event.version),
                journey=journey(event.journey),
                approval_id=str(event.approval_id),
                evaluation_id=event.evaluation_id,
                needed=event.needed,
            )
            return _encoded("model.approval_requested", topics.MODELS, _name(event.version), requested)
        case ModelPromoted():
            promoted = events_pb2.ModelPromoted(
                version=_ref(event.version),
                journey=journey(event.journey),
                endpoint=event.endpoint,
                model=_deliverable(event.deliverable),
                evaluation_id=event.evaluation_id,
                promoted_by=event.promoted_by,
                champion_version=event.champion_version,
                override=event.override,
            )
            return _encoded("model.promoted", topics.MODELS, _name(event.version), promoted)
        case ModelArchived():
            archived = events_pb2.ModelArchived(version=_ref(event.version), journey=journey(event.journey), reason=event.reason)
            return _encoded("model.archived", topics.MODELS, _name(event.version), archived)
        case ModelReevaluationRequested():
            again = events_pb2.ModelReevaluationRequested(
                model_id=str(event.model_id),
                journey=journey(event.journey),
                evaluation_id=event.evaluation_id,
                champion_version=event.champion_version,
                reason=event.reason,
            )
            return _encoded("model.reevaluation_requested", topics.MODELS, event.journey.run_id, again)


def _encoded(kind: str, topic: str, subject: str, message: Message) -> Encoded:
    return Encoded(kind, topic, subject, message.SerializeToString())


def _name(version: VersionRef) -> str:
    return f"{version.model}/{version.version}"


def _applied_event(revision: Revision) -> events_pb2.DeliveryApplied:
    # A deletion carries no section: nobody is to act on one that is gone.
    sections = {} if revision.deleted else {f"{name}_json": text for name, text in revision.sections.items()}
    return events_pb2.DeliveryApplied(
        name=revision.name,
        revision=revision.revision,
        deleted=revision.deleted,
        experiment=revision.experiment,
        model=revision.model,
        endpoint=revision.endpoint,
        applied_by=revision.applied_by,
        applied_at=moment(revision.applied_at),
        **sections,
    )


def _access_event(key: ApiKey) -> events_pb2.AccessChanged:
    return events_pb2.AccessChanged(
        key_id=key.key_id,
        revision=key.revision,
        hash=key.hash,
        subject=key.subject,
        roles=key.roles,
        inference_endpoints=key.inference_endpoints,
        expires_at=moment(key.expires_at) if key.expires_at else None,
        revoked=key.revoked,
    )


# Events that arrive


def judgement(message: evaluator_pb.Judgement) -> Judgement:
    """What an evaluation says. Raises Invalid when it does not say what a version cannot do without."""
    missing = [
        name
        for name, value in (
            ("evaluation_id", message.evaluation_id),
            ("journey.run_id", message.journey.run_id),
            ("journey.delivery", message.journey.delivery),
            ("model", message.model),
            ("candidate.blob.sha256", message.candidate.blob.sha256),
        )
        if not value
    ]
    if missing:
        raise Invalid(f"the judgement does not say {', '.join(missing)}")
    evidence = Evidence(message.evaluation_id, message.champion_version, message.champion_sha256, message.report_html.key)
    return Judgement(
        model=message.model,
        journey=_journey_of(message.journey),
        candidate=deliverable(message.candidate),
        evidence=evidence,
        author=message.author,
        provenance=_provenance(message),
    )


def deliverable(message: model_pb2.DeliverableModel) -> Deliverable:
    """A model that can be delivered, as the evaluator sent it."""
    blob = message.blob
    return Deliverable(
        message.name, message.format, blob.sha256, blob.size_bytes, blob.key, message.SerializeToString(), message.logged_model_id
    )


def _journey_of(message: events_pb2.Journey) -> Journey:
    return Journey(message.journey_id, message.delivery, message.delivery_revision, message.run_id)


def _provenance(message: evaluator_pb.Judgement) -> dict[str, Any]:
    """What the version was made from and how it was judged: run, code, data, hashes, evaluation."""
    candidate = message.candidate
    return {
        "run": message.journey.run_id,
        "journey": message.journey.journey_id,
        "delivery": {"name": message.journey.delivery, "revision": message.journey.delivery_revision},
        "author": message.author,
        "source": {
            "commit": message.source.commit,
            "dirty": message.source.dirty,
            "diff": message.source.diff_key,
            "command": message.source.command,
            "training": message.source.training_id,
        },
        "data": [_dataset(one) for one in message.training_data],
        "model": {
            "name": candidate.name,
            "format": candidate.format,
            "sha256": candidate.blob.sha256,
            "size_bytes": candidate.blob.size_bytes,
        },
        "samples": candidate.samples.sha256,
        "evaluation": {
            "id": message.evaluation_id,
            "champion": {"version": message.champion_version, "sha256": message.champion_sha256},
            "holdout": _dataset(message.holdout),
            "comparison": MessageToDict(message.comparison, preserving_proto_field_name=True),
            "gates": [MessageToDict(gate, preserving_proto_field_name=True) for gate in message.gates],
            "report_json": message.report_json.key,
            "report_html": message.report_html.key,
        },
    }


def _dataset(one: Any) -> dict[str, Any]:
    return {"name": one.name, "version": one.version, "sha256": one.sha256}


def model_id(text: str) -> UUID:
    """The id of a model in an event. Raises Invalid."""
    try:
        return UUID(text)
    except ValueError:
        raise Invalid(f"{text!r} is no id of a model") from None


HARM = deployer_pb.END_CAUSE_HARM
_CAUSES = {
    deployer_pb.END_CAUSE_HARM: "worse than the version in production",
    deployer_pb.END_CAUSE_DEADLINE: "deadline",
    deployer_pb.END_CAUSE_RUNTIME: "runtime",
    deployer_pb.END_CAUSE_OPERATOR: "stopped by an operator",
    deployer_pb.END_CAUSE_INTERFERENCE: "interference: the version in production suffered too",
    deployer_pb.END_CAUSE_ARTIFACT: "artifact",
    deployer_pb.END_CAUSE_SUPERSEDED: "superseded",
    deployer_pb.END_CAUSE_BREACH: "the endpoint as a whole was bad more often than a guard allows",
}


def cause(message: deployer_pb.DeployRolledBack) -> tuple[bool, str]:
    """Whether a rollout ended for harm, and why in words.

    Raises Invalid without a cause, and UnknownValue for one that this code does not know: a newer one may.
    """
    if message.cause == deployer_pb.END_CAUSE_UNSPECIFIED:
        raise Invalid("the event says no cause")
    if message.cause not in _CAUSES:
        raise UnknownValue(f"cause {message.cause} of the end of a rollout")
    words = f"rolled back: {_CAUSES[message.cause]}"
    return message.cause == HARM, f"{words} ({message.reason})" if message.reason else words


# Requests


def identifier(text: str, field: str) -> UUID:
    """A UUID in a request. Raises Invalid naming the field."""
    try:
        return UUID(text)
    except ValueError:
        raise Invalid("not an id", [Violation(field, "must be a UUID")]) from None


def place(token: str) -> int:
    """Where a page begins; 0 for the first. Raises Invalid for a token that we did not make."""
    if token and not (token.isascii() and token.isdecimal() and len(token) <= 18):
        raise Invalid("not a page token", [Violation("page_token", "must be one that was answered")])
    return int(token or 0)


def time_of(message: Any, field: str) -> datetime | None:
    """A time that may be absent. Raises Invalid."""
    if not message.HasField(field):
        return None
    try:
        return getattr(message, field).ToDatetime(tzinfo=UTC)  # type: ignore[no-any-return]  # generated code publishes Any here
    except (ValueError, OverflowError):
        raise Invalid("not a time", [Violation(field, "is out of range")]) from None


# Answers


def _ref(version: VersionRef) -> events_pb2.VersionRef:
    return events_pb2.VersionRef(model_id=str(version.model_id), model=version.model, version=version.version)


def journey(one: Journey) -> events_pb2.Journey:
    """A journey."""
    return events_pb2.Journey(journey_id=one.journey_id, delivery=one.delivery, delivery_revision=one.delivery_revision, run_id=one.run_id)


def _deliverable(one: Deliverable) -> model_pb2.DeliverableModel:
    return model_pb2.DeliverableModel.FromString(one.encoded)


def delivery(one: Revision) -> service_pb2.Delivery:
    """A revision of a delivery."""
    return service_pb2.Delivery(
        name=one.name,
        revision=one.revision,
        yaml=one.yaml,
        experiment=one.experiment,
        model=one.model,
        endpoint=one.endpoint,
        applied_by=one.applied_by,
        applied_at=moment(one.applied_at),
        deleted=one.deleted,
        train_json=one.sections.get("train", ""),
    )


def applied(one: Applied) -> service_pb2.ApplyDeliveryResponse:
    """How applying a file ended."""
    return service_pb2.ApplyDeliveryResponse(delivery=delivery(one.revision), outcome=one.outcome, diff=one.diff, loosened=one.loosened)


def model(one: ModelSummary) -> service_pb2.Model:
    """A model in a list."""
    return service_pb2.Model(
        model_id=str(one.model_id),
        name=one.name,
        latest_version=one.latest,
        champion_version=one.champion,
        created_at=moment(one.created_at),
    )


def version(view: VersionView) -> service_pb2.ModelVersion:
    """A version with all that is known of it."""
    one = view.version
    return service_pb2.ModelVersion(
        ref=_ref(VersionRef(view.model_id, view.model, one.number)),
        stage=str(one.stage),
        aliases=view.aliases,
        journey=journey(one.journey),
        model=_deliverable(one.deliverable),
        evaluation_id=one.evidence.evaluation_id,
        reason=one.reason,
        created_at=moment(one.created_at),
        report_key=one.evidence.report_key,
        author=one.author,
        provenance_json=json.dumps(one.provenance, ensure_ascii=False),
    )


def approval(one: Approval) -> service_pb2.Approval:
    """A request for approval with its votes."""
    votes = [service_pb2.Vote(subject=v.subject, approve=v.approve, comment=v.comment, at=moment(v.at)) for v in one.votes]
    return service_pb2.Approval(
        approval_id=str(one.approval_id),
        version=_ref(VersionRef(one.model_id, one.model, one.version)),
        evaluation_id=one.evaluation_id,
        delivery_revision=one.delivery_revision,
        status=str(one.status),
        needed=one.needed,
        votes=votes,
        requested_at=moment(one.requested_at),
    )


def audit(row: AuditRow) -> service_pb2.AuditEntry:
    """A row of the audit log."""
    entry = row.entry
    return service_pb2.AuditEntry(
        id=row.id,
        at=moment(entry.at),
        actor=entry.actor,
        action=entry.action,
        target=entry.target,
        before_json=json.dumps(entry.before, ensure_ascii=False),
        after_json=json.dumps(entry.after, ensure_ascii=False),
        reason=entry.reason,
    )


def api_key(one: ApiKey) -> service_pb2.ApiKey:
    """An API key, without its hash."""
    return service_pb2.ApiKey(
        key_id=one.key_id,
        subject=one.subject,
        roles=one.roles,
        inference_endpoints=one.inference_endpoints,
        created_at=moment(one.created_at),
        expires_at=moment(one.expires_at) if one.expires_at else None,
        revoked=one.revoked,
    )
