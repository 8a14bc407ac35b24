"""The tracker over gRPC, and the object store by the URLs that it hands out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import httpx
from contracts.tracker.v1 import events_pb2, model_pb2, service_pb2_grpc
from contracts.tracker.v1 import service_pb2 as pb
from servicekit.errors import AlreadyExists, Invalid, NotFound, Unavailable

from trainer.domain.conversion import Conversion
from trainer.ports import NewRun, StartedRun, StoredBlob, StoredFile

SERVICE = pb.DESCRIPTOR.services_by_name["TrackerService"].full_name

IDEMPOTENT = tuple(
    f"/{SERVICE}/{method}"
    for method in (
        "GetExperiment",
        "CreateRun",
        "GetRun",
        "FinishRun",
        "RenewLease",
        "CompleteUpload",
        "ListModelFiles",
        "SettleConversion",
    )
)
"""What the channel may try again: reads, and writes that the tracker knows again."""

_VERIFY_S = 60.0


class GrpcTracker:
    """Implements `ports.Tracker` and `ports.LoggedModels`."""

    def __init__(self, stub: service_pb2_grpc.TrackerServiceAsyncStub) -> None:
        self._stub = stub

    async def start_run(self, run: NewRun) -> StartedRun:
        made = await self._stub.CreateRun(
            pb.CreateRunRequest(
                experiment_id=await self._experiment(run.experiment),
                name=run.name,
                user=run.user,
                tags=run.tags,
                source=events_pb2.RunSource(
                    commit=run.commit, dirty=run.dirty, diff_key=run.diff_key, command=run.command, training_id=run.training_id
                ),
                lease_seconds=run.lease_seconds,
                fencing_token=run.fencing_token,
                request_id=run.request_id,
            )
        )
        return StartedRun(made.run.run_id, made.run_token)

    async def status(self, run_id: str) -> str:
        return (await self._stub.GetRun(pb.GetRunRequest(run_id=run_id))).run.status

    async def renew(self, run_id: str, fencing_token: int) -> None:
        await self._stub.RenewLease(pb.RenewLeaseRequest(run_id=run_id, fencing_token=fencing_token))

    async def finish(self, run_id: str, status: str, reason: str, fencing_token: int) -> None:
        await self._stub.FinishRun(pb.FinishRunRequest(run_id=run_id, status=status, reason=reason, fencing_token=fencing_token))

    async def store_file(self, run_id: str, path: str, file: Path) -> None:
        sha256, size = await asyncio.to_thread(_digest, file)
        ticket = await self._stub.StartUpload(pb.StartUploadRequest(run_id=run_id, path=path, size_bytes=size, sha256=sha256))
        etags = [] if ticket.complete else await self._put(file, ticket.part_size_bytes, list(ticket.part_urls))
        await self._stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=ticket.upload_id, part_etags=etags), timeout=_VERIFY_S)

    async def files(self, conversion: Conversion) -> Sequence[StoredFile]:
        asked = pb.ListModelFilesRequest(run_id=conversion.run_id, owner=conversion.owner, folder=conversion.folder)
        found = (await self._stub.ListModelFiles(asked)).files
        return [StoredFile(file.path, file.object.key, file.object.sha256, file.object.size_bytes) for file in found]

    async def converted(self, conversion: Conversion, blob: StoredBlob, samples: StoredBlob) -> None:
        message = _settled(conversion)
        message.blob.CopyFrom(_blob(blob))
        message.samples.CopyFrom(_blob(samples))
        await self._stub.SettleConversion(message, timeout=_VERIFY_S)

    async def refused(self, conversion: Conversion, reason: str) -> None:
        message = _settled(conversion)
        message.refused = reason
        await self._stub.SettleConversion(message)

    async def _experiment(self, name: str) -> int:
        wanted = pb.GetExperimentRequest(name=name)
        try:
            return (await self._stub.GetExperiment(wanted)).experiment.id
        except NotFound:
            pass
        try:
            return (await self._stub.CreateExperiment(pb.CreateExperimentRequest(name=name))).experiment.id
        except AlreadyExists:  # made by somebody else meanwhile
            return (await self._stub.GetExperiment(wanted)).experiment.id

    async def _put(self, file: Path, part_size: int, urls: list[str]) -> list[str]:
        etags = []
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=_VERIFY_S) as http:
                for number, url in enumerate(urls):
                    part = await asyncio.to_thread(_part, file, number * part_size, part_size)
                    answer = await http.put(url, content=part)
                    if answer.status_code >= 500:
                        raise Unavailable(f"the object store answers {answer.status_code}")
                    if answer.status_code >= 300:
                        raise Invalid(f"the object store refuses an upload with {answer.status_code}")
                    etags.append(answer.headers.get("etag", "").strip('"'))
        except httpx.TransportError as exc:
            raise Unavailable(f"the object store does not answer: {exc!r}") from exc
        return etags


def _digest(file: Path) -> tuple[str, int]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return digest, opened.tell()


def _part(file: Path, offset: int, size: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def _settled(conversion: Conversion) -> pb.SettleConversionRequest:
    return pb.SettleConversionRequest(run_id=conversion.run_id, owner=conversion.owner, folder=conversion.folder)


def _blob(stored: StoredBlob) -> model_pb2.BlobRef:
    return model_pb2.BlobRef(sha256=stored.sha256, size_bytes=stored.size_bytes, key=stored.key)
