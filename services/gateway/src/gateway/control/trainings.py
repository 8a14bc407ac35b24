"""/api/v1 for trainings: the trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from contracts.trainer.v1 import service_pb2 as pb
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from servicekit.errors import DeadlineExceeded

from gateway.control.bounds import Listed, Texts
from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["trainings"])

_STREAM_S = 1800.0
"""Seconds after which a log stream is asked for again, below the longest that servers allow."""


class SourceIn(BaseModel):
    upload_id: str = ""
    git_url: str = ""
    git_ref: str = ""
    commit: str = ""
    dirty: bool = False
    diff: str = ""


class ResourcesIn(BaseModel):
    processes: int = Field(default=0, ge=0)
    memory_bytes: int = Field(default=0, ge=0)
    timeout_seconds: int = Field(default=0, ge=0)
    disk_bytes: int = Field(default=0, ge=0)


class NewTraining(BaseModel):
    delivery: str = Field(default="", description="Takes what is not given here from this delivery's train section.")
    experiment: str = ""
    source: SourceIn | None = None
    command: Listed[str] = []
    environment: Texts = {}
    resources: ResourcesIn | None = None
    seed: int = 0
    run_name: str = ""
    request_id: str = Field(default="", description="The same one again answers the same training.")
    max_attempts: int = Field(default=0, ge=0)


class SourceUpload(BaseModel):
    sha256: str
    size_bytes: int = Field(ge=0)


@router.post("/trainings", responses=answers(pb.SubmitTrainingResponse))
async def submit(body: NewTraining, peers: PeersOf) -> Json:
    request = pb.SubmitTrainingRequest(
        delivery=body.delivery,
        experiment=body.experiment,
        source=pb.Source(**body.source.model_dump()) if body.source else None,
        command=body.command,
        environment=body.environment,
        resources=pb.Resources(**body.resources.model_dump()) if body.resources else None,
        seed=body.seed,
        run_name=body.run_name,
        request_id=body.request_id,
        max_attempts=body.max_attempts,
    )
    return to_json(await peers.trainer.SubmitTraining(request))


@router.get("/trainings", responses=answers(pb.ListTrainingsResponse))
async def list_trainings(peers: PeersOf, delivery: str = "", page_size: int = 100, page_token: str = "") -> Json:
    request = pb.ListTrainingsRequest(delivery=delivery, page_size=page_size, page_token=page_token)
    return to_json(await peers.trainer.ListTrainings(request))


@router.post("/trainings/source-uploads", responses=answers(pb.StartSourceUploadResponse))
async def start_source_upload(body: SourceUpload, peers: PeersOf) -> Json:
    return to_json(await peers.trainer.StartSourceUpload(pb.StartSourceUploadRequest(sha256=body.sha256, size_bytes=body.size_bytes)))


@router.get("/trainings/{training_id}", responses=answers(pb.GetTrainingResponse))
async def get_training(training_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.trainer.GetTraining(pb.GetTrainingRequest(training_id=training_id)))


@router.post("/trainings/{training_id}/cancel", responses=answers(pb.CancelTrainingResponse))
async def cancel(training_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.trainer.CancelTraining(pb.CancelTrainingRequest(training_id=training_id)))


@router.get("/trainings/{training_id}/log", response_class=StreamingResponse)
async def log(training_id: str, peers: PeersOf, offset: int = 0, follow: bool = False) -> StreamingResponse:
    """The log as plain text; with follow it goes on until the training ends."""
    await peers.trainer.GetTraining(pb.GetTrainingRequest(training_id=training_id))  # an unknown one is a 404, not an empty log

    async def chunks() -> AsyncIterator[bytes]:
        at = offset
        while True:
            try:
                async for part in peers.trainer.StreamLog(
                    pb.StreamLogRequest(training_id=training_id, offset=at, follow=follow), timeout=_STREAM_S
                ):
                    at = part.offset + len(part.data)
                    yield part.data
                return
            except DeadlineExceeded:  # a stream has a longest time, a training may take longer: go on where it ended
                continue

    return StreamingResponse(chunks(), media_type="text/plain; charset=utf-8")
