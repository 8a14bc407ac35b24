"""Protobuf <-> domain: the only file of the trainer that knows both."""

from __future__ import annotations

from contracts.registry.v1 import events_pb2 as registry_events_pb2
from contracts.registry.v1 import service_pb2 as registry_pb2
from contracts.tracker.v1 import events_pb2 as tracker_events_pb2
from contracts.trainer.v1 import events_pb2, service_pb2
from eventing import topics
from eventing.envelope import Event as Envelope
from google.protobuf.message import Message
from servicekit.clock import Clock, Ids
from servicekit.moments import moment

from trainer.domain.conversion import Conversion
from trainer.domain.errors import Problem
from trainer.domain.training import (
    Event,
    JobCancelled,
    JobFailed,
    JobStarted,
    JobSubmitted,
    Request,
    Resources,
    Source,
    Training,
)
from trainer.ports import AppliedDelivery

# -- events


class EventEncoder:
    """Writes the domain's events for topic headrace.jobs: key and subject are the training's id."""

    def __init__(self, clock: Clock, ids: Ids) -> None:
        self._clock = clock
        self._ids = ids

    def __call__(self, event: Event) -> Envelope:
        kind, message = _message(event)
        training = event.training
        return Envelope(
            type=kind,
            topic=topics.JOBS,
            key=training.training_id,
            sequence=training.event_sequence,
            payload=message.SerializeToString(),
            id=self._ids.uuid7(),
            time=self._clock.now(),
            subject=training.training_id,
        )


def _message(event: Event) -> tuple[str, Message]:
    one = event.training
    if isinstance(event, JobSubmitted):
        return "job.submitted", events_pb2.JobSubmitted(
            training_id=one.training_id, delivery=one.delivery, experiment=one.experiment, submitted_by=one.submitted_by
        )
    if isinstance(event, JobCancelled):
        return "job.cancelled", events_pb2.JobCancelled(training_id=one.training_id, cancelled_by=one.cancelled_by)
    if isinstance(event, JobStarted):
        return "job.started", events_pb2.JobStarted(training_id=one.training_id, attempt=one.attempt, run_id=one.run_id)
    if isinstance(event, JobFailed):
        return "job.failed", events_pb2.JobFailed(training_id=one.training_id, attempt=one.attempt, run_id=one.run_id, reason=one.reason)
    return "job.succeeded", events_pb2.JobSucceeded(training_id=one.training_id, attempt=one.attempt, run_id=one.run_id)


def applied_delivery(message: registry_events_pb2.DeliveryApplied) -> AppliedDelivery:
    return AppliedDelivery(message.name, message.revision, message.deleted, message.experiment, message.train_json, message.applied_by)


def conversion_of(message: tracker_events_pb2.RunFinished) -> Conversion:
    one = message.conversion
    return Conversion(message.run_id, message.experiment_name, one.owner, one.folder, one.name, tuple(one.flavors))


# -- answers


def training(one: Training) -> service_pb2.Training:
    """The diff is left out: it can be large, and the run has it."""
    source, resources = one.source, one.resources
    return service_pb2.Training(
        training_id=one.training_id,
        status=one.status.value,
        delivery=one.delivery,
        experiment=one.experiment,
        source=service_pb2.Source(
            upload_id=source.upload_id, git_url=source.git_url, git_ref=source.git_ref, commit=source.commit, dirty=source.dirty
        ),
        command=one.command,
        resources=service_pb2.Resources(
            processes=resources.processes,
            memory_bytes=resources.memory_bytes,
            timeout_seconds=resources.timeout_seconds,
            disk_bytes=resources.disk_bytes,
        ),
        seed=one.seed,
        submitted_by=one.submitted_by,
        run_id=one.run_id,
        attempt=one.attempt,
        reason=one.reason,
        created_at=moment(one.created_at),
        finished_at=None if one.finished_at is None else moment(one.finished_at),
    )


def violation(problem: Problem) -> registry_pb2.FieldViolation:
    return registry_pb2.FieldViolation(field=problem.field, message=problem.message)


# -- requests


def request_of(message: service_pb2.SubmitTrainingRequest) -> Request:
    source, resources = message.source, message.resources
    return Request(
        delivery=message.delivery,
        experiment=message.experiment,
        source=Source(source.upload_id, source.git_url, source.git_ref, source.commit, source.dirty, source.diff),
        command=tuple(message.command),
        environment=dict(message.environment),
        resources=Resources(resources.processes, resources.memory_bytes, resources.timeout_seconds, resources.disk_bytes),
        seed=message.seed,
        run_name=message.run_name,
        max_attempts=message.max_attempts,
    )
