"""/api/v1 for runs, experiments, artifacts and data sets: the tracker."""

from __future__ import annotations

import time

from contracts.tracker.v1 import events_pb2, model_pb2
from contracts.tracker.v1 import service_pb2 as pb
from fastapi import APIRouter
from pydantic import BaseModel, Field
from servicekit.access import current_caller
from servicekit.errors import AlreadyExists, NotFound

from gateway.control.bounds import Listed, Texts
from gateway.control.peers import Peers
from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["runs"])


class SourceIn(BaseModel):
    commit: str = ""
    dirty: bool = False
    command: str = ""


class NewRun(BaseModel):
    experiment: str = Field(default="Default", description="By name; made when there is none.")
    name: str = ""
    tags: Texts = {}
    lease_seconds: int = Field(default=0, ge=0, le=3600, description="More than 0: the run fails when nobody renews it for so long.")
    source: SourceIn = SourceIn()
    parent_run_id: str = ""
    started_ms: int = Field(default=0, ge=0, description="Milliseconds since 1970; 0: now. For runs that began elsewhere.")
    request_id: str = Field(default="", description="The same one again answers the same run.")


class MetricIn(BaseModel):
    key: str
    value: float
    timestamp_ms: int
    step: int = 0


class Batch(BaseModel):
    metrics: Listed[MetricIn] = []
    params: Texts = {}
    tags: Texts = {}


class Finish(BaseModel):
    status: str = Field(default="FINISHED", description="FINISHED, FAILED or KILLED.")
    finished_ms: int = 0
    reason: str = ""


class TensorIn(BaseModel):
    name: str
    datatype: str
    shape: Listed[int]


class SignatureIn(BaseModel):
    inputs: Listed[TensorIn]
    outputs: Listed[TensorIn]


class ModelIn(BaseModel):
    name: str
    path: str
    format: str
    signature: SignatureIn
    samples_path: str


class DatasetIn(BaseModel):
    name: str
    version: int


class Inputs(BaseModel):
    inputs: Listed[DatasetIn]


class Upload(BaseModel):
    path: str = Field(default="", description="Path in the run; not for a data set.")
    size_bytes: int = Field(ge=0)
    sha256: str


class Parts(BaseModel):
    part_etags: Listed[str] = []


class NewDatasetVersion(BaseModel):
    upload_id: str
    columns_json: str = Field(default="[]", description='JSON: [{"name", "type"}].')
    holdout: bool = Field(default=False, description="Models are judged on it: no run may read it. Never changes.")


@router.get("/experiments", responses=answers(pb.ListExperimentsResponse))
async def list_experiments(peers: PeersOf, page_size: int = 100, page_token: str = "") -> Json:
    return to_json(await peers.tracker.ListExperiments(pb.ListExperimentsRequest(page_size=page_size, page_token=page_token)))


@router.post("/runs", responses=answers(pb.CreateRunResponse))
async def create_run(body: NewRun, peers: PeersOf) -> Json:
    experiment_id = await _experiment(peers, body.experiment)
    request = pb.CreateRunRequest(
        experiment_id=experiment_id,
        name=body.name,
        user=current_caller().subject,  # who approves must be able to rely on who made it
        started_ms=body.started_ms or int(time.time() * 1000),
        tags=body.tags,
        source=events_pb2.RunSource(commit=body.source.commit, dirty=body.source.dirty, command=body.source.command),
        lease_seconds=body.lease_seconds,
        request_id=body.request_id,
        parent_run_id=body.parent_run_id,
    )
    return to_json(await peers.tracker.CreateRun(request))


@router.get("/runs", responses=answers(pb.ListRunsResponse))
async def list_runs(peers: PeersOf, experiment: str = "Default", page_size: int = 100, page_token: str = "", status: str = "") -> Json:
    found = await peers.tracker.GetExperiment(pb.GetExperimentRequest(name=experiment))
    request = pb.ListRunsRequest(experiment_id=found.experiment.id, page_size=page_size, page_token=page_token, status=status)
    return to_json(await peers.tracker.ListRuns(request))


@router.get("/runs/{run_id}", responses=answers(pb.GetRunResponse))
async def get_run(run_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.tracker.GetRun(pb.GetRunRequest(run_id=run_id)))


@router.post("/runs/{run_id}/log-batch", responses=answers(pb.LogBatchResponse))
async def log_batch(run_id: str, body: Batch, peers: PeersOf) -> Json:
    metrics = [pb.Metric(key=m.key, value=m.value, timestamp_ms=m.timestamp_ms, step=m.step) for m in body.metrics]
    return to_json(await peers.tracker.LogBatch(pb.LogBatchRequest(run_id=run_id, metrics=metrics, params=body.params, tags=body.tags)))


@router.post("/runs/{run_id}/finish", responses=answers(pb.FinishRunResponse))
async def finish_run(run_id: str, body: Finish, peers: PeersOf) -> Json:
    finished_ms = body.finished_ms or int(time.time() * 1000)
    request = pb.FinishRunRequest(run_id=run_id, status=body.status, finished_ms=finished_ms, reason=body.reason)
    return to_json(await peers.tracker.FinishRun(request))


@router.post("/runs/{run_id}/lease", responses=answers(pb.RenewLeaseResponse))
async def renew_lease(run_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.tracker.RenewLease(pb.RenewLeaseRequest(run_id=run_id)))


@router.get("/runs/{run_id}/metrics/{key:path}", responses=answers(pb.GetMetricHistoryResponse))
async def metric_history(run_id: str, key: str, peers: PeersOf, page_size: int = 1000, page_token: str = "") -> Json:
    request = pb.GetMetricHistoryRequest(run_id=run_id, key=key, page_size=page_size, page_token=page_token)
    return to_json(await peers.tracker.GetMetricHistory(request))


@router.post("/runs/{run_id}/models", responses=answers(pb.LogModelResponse))
async def log_model(run_id: str, body: ModelIn, peers: PeersOf) -> Json:
    signature = model_pb2.ModelSignature(inputs=_tensors(body.signature.inputs), outputs=_tensors(body.signature.outputs))
    request = pb.LogModelRequest(
        run_id=run_id, name=body.name, path=body.path, format=body.format, signature=signature, samples_path=body.samples_path
    )
    return to_json(await peers.tracker.LogModel(request))


@router.post("/runs/{run_id}/inputs", responses=answers(pb.LogInputsResponse))
async def log_inputs(run_id: str, body: Inputs, peers: PeersOf) -> Json:
    inputs = [model_pb2.DatasetRef(name=i.name, version=i.version) for i in body.inputs]
    return to_json(await peers.tracker.LogInputs(pb.LogInputsRequest(run_id=run_id, inputs=inputs)))


@router.post("/runs/{run_id}/uploads", responses=answers(pb.StartUploadResponse))
async def start_artifact_upload(run_id: str, body: Upload, peers: PeersOf) -> Json:
    request = pb.StartUploadRequest(run_id=run_id, path=body.path, size_bytes=body.size_bytes, sha256=body.sha256)
    return to_json(await peers.tracker.StartUpload(request))


@router.post("/uploads/{upload_id}/complete", responses=answers(pb.CompleteUploadResponse))
async def complete_upload(upload_id: str, body: Parts, peers: PeersOf) -> Json:
    return to_json(await peers.tracker.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=body.part_etags)))


@router.get("/runs/{run_id}/artifacts", responses=answers(pb.ListArtifactsResponse))
async def list_artifacts(run_id: str, peers: PeersOf, path: str = "") -> Json:
    return to_json(await peers.tracker.ListArtifacts(pb.ListArtifactsRequest(run_id=run_id, path=path)))


@router.get("/runs/{run_id}/artifacts/download", responses=answers(pb.GetDownloadResponse))
async def download_artifact(run_id: str, path: str, peers: PeersOf) -> Json:
    return to_json(await peers.tracker.GetDownload(pb.GetDownloadRequest(run_id=run_id, path=path)))


@router.get("/datasets", responses=answers(pb.ListDatasetsResponse), tags=["datasets"])
async def list_datasets(peers: PeersOf) -> Json:
    return to_json(await peers.tracker.ListDatasets(pb.ListDatasetsRequest()))


@router.get("/datasets/{name}", responses=answers(pb.GetDatasetResponse), tags=["datasets"])
async def get_dataset(name: str, peers: PeersOf, version: int = 0) -> Json:
    return to_json(await peers.tracker.GetDataset(pb.GetDatasetRequest(name=name, version=version)))


@router.post("/datasets/{name}/uploads", responses=answers(pb.StartUploadResponse), tags=["datasets"])
async def start_dataset_upload(name: str, body: Upload, peers: PeersOf) -> Json:
    return to_json(await peers.tracker.StartUpload(pb.StartUploadRequest(dataset=name, size_bytes=body.size_bytes, sha256=body.sha256)))


@router.post("/datasets/{name}/versions", responses=answers(pb.RegisterDatasetResponse), tags=["datasets"])
async def register_dataset(name: str, body: NewDatasetVersion, peers: PeersOf) -> Json:
    request = pb.RegisterDatasetRequest(name=name, upload_id=body.upload_id, schema_json=body.columns_json, holdout=body.holdout)
    return to_json(await peers.tracker.RegisterDataset(request))


@router.get("/datasets/{name}/download", responses=answers(pb.GetDownloadResponse), tags=["datasets"])
async def download_dataset(name: str, version: int, peers: PeersOf) -> Json:
    reference = model_pb2.DatasetRef(name=name, version=version)
    return to_json(await peers.tracker.GetDownload(pb.GetDownloadRequest(dataset=reference)))


async def _experiment(peers: Peers, name: str) -> int:
    """The id of the experiment of this name; made when there is none, also when somebody else makes it at the same moment."""
    try:
        return int((await peers.tracker.GetExperiment(pb.GetExperimentRequest(name=name))).experiment.id)
    except NotFound:
        try:
            return int((await peers.tracker.CreateExperiment(pb.CreateExperimentRequest(name=name))).experiment.id)
        except AlreadyExists:
            return int((await peers.tracker.GetExperiment(pb.GetExperimentRequest(name=name))).experiment.id)


def _tensors(specs: list[TensorIn]) -> list[model_pb2.TensorSpec]:
    return [model_pb2.TensorSpec(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]
