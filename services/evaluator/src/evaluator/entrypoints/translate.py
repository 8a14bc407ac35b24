"""Protobuf <-> domain: the only file of the evaluator that knows both."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from datetime import UTC
from typing import TypeVar

from artifacts import check_sha256
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.evaluator.v1 import service_pb2
from contracts.registry.v1 import events_pb2 as registry_pb
from contracts.registry.v1 import service_pb2 as registry_service_pb
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from eventing import topics
from eventing.envelope import Event as Envelope
from google.protobuf.message import DecodeError, Message
from servicekit.clock import Clock, Ids
from servicekit.errors import Invalid, Violation
from servicekit.moments import moment

from evaluator.domain import policy
from evaluator.domain.candidate import Blob, Candidate, DataVersion, FinishedRun, Model, Source, Tensor
from evaluator.domain.delivery import Snapshot
from evaluator.domain.evaluation import (
    Champion,
    Comparison,
    Evaluation,
    EvaluationFailed,
    EvaluationPassed,
    Event,
    Gate,
    Journey,
    Judgement,
    RunSkipped,
)
from evaluator.handlers import Reevaluation

_M = TypeVar("_M", bound=Message)

# -- events that come in


def _parse(kind: type[_M], payload: bytes) -> _M:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise Invalid(f"not a {kind.DESCRIPTOR.full_name}: {error}") from error


def delivery_applied(payload: bytes) -> Snapshot:
    """Raises Invalid, as all of these do."""
    message = _parse(registry_pb.DeliveryApplied, payload)
    return Snapshot(
        name=message.name,
        revision=message.revision,
        deleted=message.deleted,
        experiment=message.experiment,
        model=message.model,
        evaluate_json=message.evaluate_json,
        applied_at=message.applied_at.ToDatetime(UTC),
    )


def run_finished(payload: bytes) -> FinishedRun:
    message = _parse(tracker_pb.RunFinished, payload)
    if not message.run_id:
        raise Invalid("a run.finished without a run id")
    source = message.source
    return FinishedRun(
        run_id=message.run_id,
        experiment=message.experiment_name,
        user=message.user,
        parent_run_id=message.parent_run_id,
        models=tuple(_model_in(one) for one in message.models),
        tags=dict(message.tags),
        inputs=tuple(_data_in(one) for one in message.inputs),
        source=Source(source.commit, source.dirty, source.diff_key, source.command, source.training_id),
        converting=message.HasField("conversion"),
    )


def champion_changed(kind: str, payload: bytes) -> tuple[str, Champion | None]:
    """The model, and its champion after deploy.completed or deploy.reverted."""
    if kind == "deploy.completed":
        completed = _parse(deployer_pb.DeployCompleted, payload)
        return _model_of(completed.rollout), Champion(completed.rollout.version.version, _named(_blob_in(completed.blob)))
    reverted = _parse(deployer_pb.DeployReverted, payload)
    champion = Champion(reverted.to_version, _named(_blob_in(reverted.to_blob))) if reverted.to_version else None
    return _model_of(reverted.rollout), champion


def reevaluation_requested(payload: bytes) -> Reevaluation:
    message = _parse(registry_pb.ModelReevaluationRequested, payload)
    return Reevaluation(message.evaluation_id, message.champion_version, message.reason)


def _model_of(rollout: deployer_pb.RolloutRef) -> str:
    if not rollout.version.model:
        raise Invalid(f"rollout {rollout.rollout_id} names no model")
    return rollout.version.model


def _named(blob: Blob) -> Blob:
    check_sha256(blob.sha256)
    return blob


def _blob_in(message: model_pb2.BlobRef) -> Blob:
    return Blob(message.sha256, message.size_bytes, message.key)


def _data_in(message: model_pb2.DatasetRef) -> DataVersion:
    return DataVersion(message.name, message.version, message.sha256)


def _tensor_in(message: model_pb2.TensorSpec) -> Tensor:
    return Tensor(message.name, message.datatype, tuple(message.shape))


def _model_in(message: model_pb2.DeliverableModel) -> Model:
    return Model(
        name=message.name,
        format=message.format,
        blob=_blob_in(message.blob),
        inputs=tuple(_tensor_in(one) for one in message.signature.inputs),
        outputs=tuple(_tensor_in(one) for one in message.signature.outputs),
        samples=_blob_in(message.samples) if message.samples.sha256 else None,
    )


# -- events that go out


class EventEncoder:
    """Writes the domain's events for topic headrace.evals: the key is the model's name, the subject the run."""

    def __init__(self, clock: Clock, ids: Ids) -> None:
        self._clock = clock
        self._ids = ids

    def __call__(self, event: Event, sequence: int) -> Envelope:
        message: Message
        if isinstance(event, EvaluationPassed):
            kind, message = "eval.passed", evaluator_pb.EvalPassed(judgement=judgement(event.judgement))
        elif isinstance(event, EvaluationFailed):
            kind, message = "eval.failed", evaluator_pb.EvalFailed(judgement=judgement(event.judgement), reason=event.reason)
        else:
            told = evaluator_pb.EvalSkipped(journey=_journey(event.journey), model=event.model, reason=event.reason)
            kind, message = "eval.skipped", told
        of_run = event.journey if isinstance(event, RunSkipped) else event.judgement.journey
        return Envelope(
            type=kind,
            topic=topics.EVALS,
            key=event.model if isinstance(event, RunSkipped) else event.judgement.model,
            sequence=sequence,
            payload=message.SerializeToString(),
            id=self._ids.uuid7(),
            time=self._clock.now(),
            subject=of_run.run_id,
        )


def judgement(one: Judgement) -> evaluator_pb.Judgement:
    message = evaluator_pb.Judgement(
        evaluation_id=one.evaluation_id,
        journey=_journey(one.journey),
        model=one.model,
        candidate=_model(one.candidate.model),
        gates=[_gate(gate) for gate in one.gates],
        author=one.candidate.author,
        source=_source(one.candidate),
        training_data=[_data(data) for data in one.candidate.training_data],
    )
    if one.champion is not None:
        message.champion_version = one.champion.version
        message.champion_sha256 = one.champion.blob.sha256
    if one.holdout is not None:
        message.holdout.CopyFrom(_data(one.holdout))
    if one.comparison is not None:
        message.comparison.CopyFrom(_comparison(one.comparison))
    if one.report_json is not None:
        message.report_json.CopyFrom(_blob(one.report_json))
    if one.report_html is not None:
        message.report_html.CopyFrom(_blob(one.report_html))
    return message


def _journey(one: Journey) -> registry_pb.Journey:
    return registry_pb.Journey(journey_id=one.journey_id, delivery=one.delivery, delivery_revision=one.delivery_revision, run_id=one.run_id)


def _gate(one: Gate) -> evaluator_pb.Gate:
    return evaluator_pb.Gate(name=one.name, passed=one.passed, value=one.value, limit=one.limit, detail=one.detail)


def _comparison(one: Comparison) -> evaluator_pb.Comparison:
    return evaluator_pb.Comparison(
        metric=one.metric,
        challenger=one.challenger,
        champion=one.champion,
        difference=one.difference,
        difference_low=one.difference_low,
        difference_high=one.difference_high,
        confidence=one.confidence,
        resamples=one.resamples,
        rows=one.rows,
    )


def _source(candidate: Candidate) -> tracker_pb.RunSource:
    one = candidate.source
    return tracker_pb.RunSource(commit=one.commit, dirty=one.dirty, diff_key=one.diff_key, command=one.command, training_id=one.training_id)


def _blob(one: Blob) -> model_pb2.BlobRef:
    return model_pb2.BlobRef(sha256=one.sha256, size_bytes=one.size_bytes, key=one.key)


def _data(one: DataVersion) -> model_pb2.DatasetRef:
    return model_pb2.DatasetRef(name=one.name, version=one.version, sha256=one.sha256)


def _tensor(one: Tensor) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(name=one.name, datatype=one.datatype, shape=one.shape)


def _model(one: Model) -> model_pb2.DeliverableModel:
    return model_pb2.DeliverableModel(
        name=one.name,
        format=one.format,
        blob=_blob(one.blob),
        signature=model_pb2.ModelSignature(
            inputs=[_tensor(tensor) for tensor in one.inputs], outputs=[_tensor(tensor) for tensor in one.outputs]
        ),
        samples=None if one.samples is None else _blob(one.samples),
    )


# -- answers


def evaluation(one: Evaluation) -> service_pb2.Evaluation:
    """An evaluation that is not decided, or was skipped, shows what is known: its journey, its model, its candidate."""
    if one.judgement is not None:
        told = judgement(one.judgement)
    elif one.candidate is not None:
        told = judgement(one.blank_judgement())
    else:
        told = evaluator_pb.Judgement(evaluation_id=one.evaluation_id, journey=_journey(one.journey), model=one.model)
    return service_pb2.Evaluation(
        evaluation_id=one.evaluation_id,
        status=one.status.value,
        judgement=told,
        reason=one.reason,
        created_at=moment(one.created_at),
        finished_at=None if one.finished_at is None else moment(one.finished_at),
    )


def validated(request: registry_service_pb.ValidateSectionRequest) -> registry_service_pb.ValidateSectionResponse:
    """What is wrong with a section of a delivery, and what is looser in it than before. Raises Invalid for another service's section."""
    if request.section != "evaluate":
        raise Invalid(f"the evaluator does not know the section {request.section!r}", [Violation("section", "must be evaluate")])
    section = _section(request.section_json)
    if answer := refused(policy.violations(section)):
        return answer
    if not request.previous_json:
        return registry_service_pb.ValidateSectionResponse()
    previous = _section(request.previous_json)
    if policy.violations(previous):  # nothing can be said to be looser than what could not be read
        return registry_service_pb.ValidateSectionResponse()
    return registry_service_pb.ValidateSectionResponse(loosened=policy.loosened(policy.parse(previous), policy.parse(section)))


def refused(found: Sequence[Violation]) -> registry_service_pb.ValidateSectionResponse | None:
    """The answer that lists what is wrong; None when nothing is."""
    if not found:
        return None
    violations = [registry_service_pb.FieldViolation(field=one.field, message=one.message) for one in found]
    return registry_service_pb.ValidateSectionResponse(violations=violations)


def holdout_of(request: registry_service_pb.ValidateSectionRequest) -> policy.Holdout:
    """The holdout that a valid section names."""
    return policy.parse(_section(request.section_json)).holdout


def _section(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Invalid(f"the section is not JSON: {error}", [Violation("section_json", "must be JSON")]) from error


def page_token(evaluation_id: str) -> str:
    """Where the next page begins."""
    return base64.urlsafe_b64encode(evaluation_id.encode()).decode()


def page_place(token: str) -> str:
    """The evaluation that the page before ended with; raises Invalid for a token that is not ours."""
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise Invalid("not a page token", [Violation("page_token", "must be one that was answered")]) from error
