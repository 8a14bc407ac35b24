"""Protobuf <-> domain: the only file of the tracker that knows both."""

from __future__ import annotations

import base64
import json
from typing import Any

from artifacts import check_sha256
from contracts.tracker.v1 import events_pb2, model_pb2, service_pb2
from eventing import topics
from eventing.envelope import Event as Envelope
from google.protobuf.timestamp_pb2 import Timestamp
from servicekit.clock import Clock, Ids
from servicekit.errors import Invalid, Violation

from tracker.conversions import Converted
from tracker.deliverables import Download, Ticket
from tracker.domain.artifact import Artifact, Dataset
from tracker.domain.conversion import Conversion
from tracker.domain.model import BlobRef, DeliverableModel, Signature, TensorSpec
from tracker.domain.run import DatasetRef, Event, Experiment, Metric, RunFinished, RunSource, RunStarted
from tracker.handlers import NewRun, RunView

# -- events


class EventEncoder:
    """Writes the domain's events for topic headrace.runs: key and subject are the run's id."""

    def __init__(self, clock: Clock, ids: Ids) -> None:
        self._clock = clock
        self._ids = ids

    def __call__(self, event: Event) -> Envelope:
        kind, message = _message(event)
        run = event.run
        return Envelope(
            type=kind,
            topic=topics.RUNS,
            key=run.run_id,
            sequence=run.event_sequence,
            payload=message.SerializeToString(),
            id=self._ids.uuid7(),
            time=self._clock.now(),
            subject=run.run_id,
        )


def _message(event: Event) -> tuple[str, events_pb2.RunStarted | events_pb2.RunFinished | events_pb2.RunFailed]:
    run = event.run
    if isinstance(event, RunStarted):
        return "run.started", events_pb2.RunStarted(
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            experiment_name=event.experiment,
            run_name=run.name,
            user=run.user,
            started_at=timestamp(run.started_ms),
            parent_run_id=run.parent_run_id,
        )
    if isinstance(event, RunFinished):
        facts = event.facts
        return "run.finished", events_pb2.RunFinished(
            run_id=run.run_id,
            experiment_id=run.experiment_id,
            experiment_name=event.experiment,
            run_name=run.name,
            user=run.user,
            started_at=timestamp(run.started_ms),
            finished_at=timestamp(run.finished_ms),
            parent_run_id=run.parent_run_id,
            models=[model(one) for one in facts.models],
            metrics=facts.metrics,
            params=facts.params,
            tags=facts.tags,
            inputs=[dataset_ref(ref) for ref in facts.inputs],
            source=source(run.source),
            truncated=event.truncated,
            conversion=_conversion(event.conversion) if event.conversion else None,
        )
    return "run.failed", events_pb2.RunFailed(
        run_id=run.run_id,
        experiment_id=run.experiment_id,
        experiment_name=event.experiment,
        finished_at=timestamp(run.finished_ms),
        status=run.status.value,
        reason=run.reason,
    )


def _conversion(one: Conversion) -> events_pb2.Conversion:
    return events_pb2.Conversion(owner=one.owner, folder=one.folder, name=one.name, flavors=one.flavors)


# -- answers


def timestamp(milliseconds: int) -> Timestamp:
    return Timestamp(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)


def experiment(one: Experiment) -> service_pb2.Experiment:
    return service_pb2.Experiment(id=one.id, name=one.name, lifecycle_stage=one.lifecycle_stage, created_ms=one.created_ms)


def run(view: RunView) -> service_pb2.Run:
    one, facts = view.run, view.facts
    return service_pb2.Run(
        run_id=one.run_id,
        experiment_id=one.experiment_id,
        name=one.name,
        user=one.user,
        status=one.status.value,
        lifecycle_stage=one.lifecycle_stage,
        started_ms=one.started_ms,
        finished_ms=one.finished_ms,
        params=facts.params,
        metrics=facts.metrics,
        tags=facts.tags,
        models=[model(logged) for logged in facts.models],
        inputs=[dataset_ref(ref) for ref in facts.inputs],
        source=source(one.source),
        reason=one.reason,
        parent_run_id=one.parent_run_id,
    )


def metric(one: Metric) -> service_pb2.Metric:
    return service_pb2.Metric(key=one.key, value=one.value, timestamp_ms=one.timestamp_ms, step=one.step)


def source(one: RunSource) -> events_pb2.RunSource:
    return events_pb2.RunSource(commit=one.commit, dirty=one.dirty, diff_key=one.diff_key, command=one.command, training_id=one.training_id)


def blob(one: BlobRef) -> model_pb2.BlobRef:
    return model_pb2.BlobRef(sha256=one.sha256, size_bytes=one.size_bytes, key=one.key)


def model(one: DeliverableModel) -> model_pb2.DeliverableModel:
    return model_pb2.DeliverableModel(
        name=one.name,
        format=one.format,
        blob=blob(one.blob),
        signature=model_pb2.ModelSignature(
            inputs=[_tensor(spec) for spec in one.signature.inputs], outputs=[_tensor(spec) for spec in one.signature.outputs]
        ),
        samples=blob(one.samples) if one.samples else None,
        logged_model_id=one.logged_model_id,
    )


def _tensor(spec: TensorSpec) -> model_pb2.TensorSpec:
    return model_pb2.TensorSpec(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def dataset_ref(one: DatasetRef) -> model_pb2.DatasetRef:
    return model_pb2.DatasetRef(name=one.name, version=one.version, sha256=one.sha256)


def dataset(one: Dataset) -> service_pb2.Dataset:
    ref = model_pb2.DatasetRef(name=one.name, version=one.version, sha256=one.blob.sha256)
    return service_pb2.Dataset(ref=ref, blob=blob(one.blob), schema_json=one.schema_json, created_ms=one.created_ms, holdout=one.holdout)


def artifact(one: Artifact) -> service_pb2.Artifact:
    return service_pb2.Artifact(path=one.path, size_bytes=one.object.size_bytes, sha256=one.object.sha256)


def ticket(one: Ticket) -> service_pb2.StartUploadResponse:
    return service_pb2.StartUploadResponse(
        upload_id=one.upload_id, part_size_bytes=one.part_size_bytes, part_urls=one.part_urls, complete=one.complete
    )


def download(one: Download) -> service_pb2.GetDownloadResponse:
    return service_pb2.GetDownloadResponse(url=one.url, sha256=one.object.sha256, size_bytes=one.object.size_bytes, key=one.key)


# -- requests


def new_run(request: service_pb2.CreateRunRequest) -> NewRun:
    given = request.source
    return NewRun(
        experiment_id=request.experiment_id,
        name=request.name,
        user=request.user,
        started_ms=request.started_ms,
        tags=dict(request.tags),
        source=RunSource(given.commit, given.dirty, given.diff_key, given.command, given.training_id),
        lease_seconds=request.lease_seconds,
        fencing_token=request.fencing_token,
        request_id=request.request_id,
        parent_run_id=request.parent_run_id,
    )


def metric_of(message: service_pb2.Metric) -> Metric:
    return Metric(message.key, message.value, message.timestamp_ms, message.step)


def signature_of(message: model_pb2.ModelSignature) -> Signature:
    return Signature(tuple(map(_tensor_of, message.inputs)), tuple(map(_tensor_of, message.outputs)))


def converted_of(message: service_pb2.SettleConversionRequest) -> Converted:
    return Converted(_blob_of(message.blob), _blob_of(message.samples))


def _blob_of(message: model_pb2.BlobRef) -> BlobRef:
    """Raises Invalid for a hash that is none."""
    check_sha256(message.sha256)
    return BlobRef(message.sha256, message.size_bytes, message.key)


def _tensor_of(message: model_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, message.datatype, tuple(message.shape))


def dataset_ref_of(message: model_pb2.DatasetRef) -> DatasetRef:
    return DatasetRef(message.name, message.version, message.sha256)


# -- page tokens: opaque to clients, the place to go on from


def page_token(*place: int | float | str) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def page_place(token: str, *types: type) -> list[Any] | None:
    """What `page_token` was given; None for "". Raises Invalid for a token that was not made by it."""
    if not token:
        return None
    try:
        place = json.loads(base64.urlsafe_b64decode(token.encode()))
        if [type(part) for part in place] == list(types):
            return list(place)
    except (ValueError, TypeError):
        pass  # told below, like a token of another kind
    raise Invalid("the input is not valid", [Violation("page_token", "not a page token of this method")])
