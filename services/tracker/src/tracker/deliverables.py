"""The tracker's use cases that talk to the artifact store: uploads of artifacts and data sets, and deliverable models.

The store is never asked within a transaction. Clients say a path, a size and a hash; where the bytes go is decided here, and nothing
counts as stored before its bytes have been read back and hashed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts import ArtifactStore, Part
from artifacts.blobs import blob_key
from artifacts.onnxfile import MAX_ONNX_BYTES, check_one_file
from servicekit.access import GATEWAY, Caller, require_role
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, TooLarge, Violation

from tracker import owners
from tracker.domain import artifact as rules
from tracker.domain.artifact import Artifact, Dataset, Upload
from tracker.domain.errors import Problem, Rejected
from tracker.domain.model import (
    FORMATS,
    MAX_MODELS,
    MAX_SAMPLES_BYTES,
    BlobRef,
    DeliverableModel,
    Signature,
    check_samples,
    check_signature,
)
from tracker.domain.run import check_name
from tracker.handlers import WRITERS, found_run, may_read, may_write, no_training_on, told
from tracker.ports import Store, UnitOfWork


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where to PUT an upload's parts, in order; `complete` when there is nothing to send."""

    upload_id: str
    part_size_bytes: int
    part_urls: Sequence[str]
    complete: bool


@dataclass(frozen=True, slots=True)
class Download:
    """Where to GET an object. `key` is empty for an end user."""

    url: str
    object: BlobRef
    key: str


class Deliverables:
    """Uploads, artifacts, models and data sets."""

    def __init__(self, store: Store, objects: ArtifactStore, clock: Clock, ids: Ids, *, url_ttl_s: int, work_dir: Path) -> None:
        """`work_dir`: where models are laid that are looked at."""
        self._work_dir = work_dir
        self._store = store
        self._objects = objects
        self._clock = clock
        self._ids = ids
        self._url_ttl_s = url_ttl_s
        self._verifying: dict[str, asyncio.Task[BlobRef]] = {}

    async def start_upload(self, caller: Caller, run_id: str, path: str, dataset: str, size_bytes: int, sha256: str) -> Ticket:
        """Repeating it starts another upload of the same, unless one has been completed: then there is nothing to send."""
        upload_id = str(self._ids.uuid7())
        with told():
            target = rules.target(upload_id, run_id, path, dataset, size_bytes, sha256)
        async with self._store.transaction() as work:
            await self._may_upload(caller, work, run_id)
            if done := await work.artifacts.find_complete(run_id, path, dataset, sha256):
                return Ticket(done.upload_id, 0, (), complete=True)
        multipart = await self._objects.start_multipart(target.key, size_bytes)
        upload = Upload(upload_id, run_id, path, dataset, target, multipart.upload_id, complete=False)
        async with self._store.transaction() as work:
            await work.artifacts.add_upload(upload)
        return Ticket(upload_id, multipart.part_size, multipart.urls, complete=False)

    async def complete_upload(self, caller: Caller, upload_id: str, part_etags: Sequence[str]) -> BlobRef:
        """Joins the parts, reads them back and verifies size and hash. Repeatable; takes as long as reading takes.

        The verification goes on when its caller gives up, and a repeated call joins it. Raises Invalid when the bytes are not what
        was announced: then they are gone and the upload with them.
        """
        async with self._store.transaction() as work:
            upload = await work.artifacts.get_upload(upload_id)
            if upload is None:
                raise NotFound(f"there is no upload {upload_id}")
            await self._may_upload(caller, work, upload.owner)
        if upload.complete:
            return upload.object
        task = self._verifying.get(upload_id)
        if task is None:
            verification = self._complete(caller, upload, part_etags)
            task = self._verifying[upload_id] = asyncio.create_task(verification, name=f"verify {upload_id}")
            task.add_done_callback(lambda done: self._verified(upload_id, done))
        return await asyncio.shield(task)

    async def list_artifacts(self, caller: Caller, run_id: str, path: str) -> Sequence[Artifact]:
        """All artifacts at and below a path; "" is the top."""
        may_read(caller, run_id)
        async with self._store.transaction() as work:
            found_run(await work.runs.get(run_id), run_id)
            return await work.artifacts.below(run_id, path.strip("/"))

    async def download_artifact(self, caller: Caller, run_id: str, path: str) -> Download:
        may_read(caller, run_id)
        async with self._store.transaction() as work:
            artifact = await work.artifacts.get(run_id, path)
        if artifact is None:
            raise NotFound(f"run {run_id} has no artifact {path}")
        return await self._download(caller, artifact.object)

    async def download_dataset(self, caller: Caller, name: str, version: int) -> Download:
        """Version 0 is the newest. Raises Forbidden for a run token that asks for what is a holdout, under whatever name."""
        may_read(caller)
        async with self._store.transaction() as work:
            dataset = await work.datasets.get(name, version) if version >= 0 else None
            if dataset is None:
                raise NotFound(f"there is no data set {name}{f' version {version}' if version else ''}")
            if caller.run_id is not None and (holdout := await work.datasets.holdout_of(dataset.blob.sha256)):
                raise Forbidden(f"{no_training_on(dataset, holdout)}; ask for other rows, or pull it with a key of your own")
        return await self._download(caller, dataset.blob)

    async def log_model(
        self, caller: Caller, run_id: str, name: str, path: str, format: str, signature: Signature, samples_path: str
    ) -> DeliverableModel:
        """Declares an uploaded artifact to be a deliverable model and copies it to its blob. Repeatable; the last of a name counts.

        Raises Invalid for a model that names other files to read its weights from: what was hashed must be all of it.
        """
        problems = check_name("name", name) + check_signature(signature)
        if format not in FORMATS:
            problems.append(Problem("format", f"{format!r} is not one of {', '.join(sorted(FORMATS))}"))
        if not samples_path:
            problems.append(Problem("samples_path", "sample rows are needed: parity and warm-up use them"))
        with told():
            if problems:
                raise Rejected(problems[:20])
        async with self._store.transaction() as work:
            run = found_run(await work.runs.get(run_id), run_id)
            may_write(caller, run)
            with told():
                run.check_open()
            model_file = await self._artifact(work, run_id, "path", path)
            samples_file = await self._artifact(work, run_id, "samples_path", samples_path)
        if samples_file.size_bytes > MAX_SAMPLES_BYTES:
            raise Invalid("the input is not valid", [Violation("samples_path", f"at most {MAX_SAMPLES_BYTES} bytes of sample rows")])
        rows = await self._objects.read(samples_file.key, sha256=samples_file.sha256, max_bytes=MAX_SAMPLES_BYTES)
        with told():
            await asyncio.to_thread(check_samples, rows, signature)
        await self._check_model(model_file)
        samples = await self._blob(samples_file)
        model = DeliverableModel(name, format, await self._blob(model_file), signature, samples)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            may_write(caller, run)
            with told():
                run.check_open()
            names = {logged.name for logged in (await work.runs.facts([run_id]))[run_id].models}
            if len(names | {name}) > MAX_MODELS:
                raise Conflict(f"run {run_id} has logged {MAX_MODELS} models, which is the most it may")
            await work.artifacts.add_blob(model.blob)
            await work.artifacts.add_blob(samples)
            await work.runs.log_model(run_id, model)
        return model

    async def register_dataset(self, caller: Caller, name: str, upload_id: str, schema_json: str, holdout: bool = False) -> Dataset:
        """Makes a completed upload the next version of a data set; the same content answers the version that it has.

        Raises Conflict when that version is a holdout and this is to be none, or the other way round: that never changes; and when a
        holdout of another name has this content and this is to be none: no training could read it.
        """
        with told():
            schema = rules.check_schema(schema_json)
        async with self._store.transaction() as work:
            await self._may_upload(caller, work, "")
            upload = await work.artifacts.get_upload(upload_id)
            if upload is None or not upload.dataset:
                raise NotFound(f"there is no upload {upload_id} to a data set")
            if upload.dataset != name:
                raise Conflict(f"upload {upload_id} is for data set {upload.dataset}")
            if not upload.complete:
                raise Conflict(f"upload {upload_id} is not complete")
            created_ms = int(self._clock.now().timestamp() * 1000)
            stored = await work.datasets.add(Dataset(name, 0, upload.object, schema, created_ms, holdout))
            if stored.holdout != holdout:
                what = "is a holdout" if stored.holdout else "is not a holdout"
                raise Conflict(
                    f"{name} version {stored.version} has this content and {what}, which never changes; register it under another name"
                )
            if not holdout and (exam := await work.datasets.holdout_of(upload.object.sha256)):
                raise Conflict(
                    f"this content is version {exam.version} of the holdout {exam.name}; a training may not read it: "
                    "push it with --holdout or leave it out"
                )
            return stored

    async def close(self) -> None:
        """Gives up verifications under way; a client repeats its call."""
        tasks = list(self._verifying.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, caller: Caller, upload: Upload, part_etags: Sequence[str]) -> BlobRef:
        wanted = upload.object
        parts = [Part(number, etag) for number, etag in enumerate(part_etags, start=1)]
        # Not known any more: joined by an earlier call that did not get to its end. Then the object is there, and it is what counts.
        with contextlib.suppress(NotFound):
            await self._objects.complete_multipart(wanted.key, upload.store_id, parts)
        try:
            arrived = await self._objects.digest(wanted.key)
        except NotFound:
            raise Conflict(f"upload {upload.upload_id} is not known to the object store any more; start it again") from None
        if not wanted.sha256:
            # Whoever sends parts by MLflow's API announces nothing.
            wanted = BlobRef(arrived.sha256, arrived.size, wanted.key)
        elif (arrived.size, arrived.sha256) != (wanted.size_bytes, wanted.sha256):
            await self._discard(upload)
            violations = [
                Violation("size_bytes", f"{wanted.size_bytes} were announced, {arrived.size} arrived"),
                Violation("sha256", f"{wanted.sha256} was announced, {arrived.sha256} arrived"),
            ]
            raise Invalid("the bytes that arrived are not those that were announced", violations)
        try:
            async with self._store.transaction() as work:
                await self._may_keep(caller, work, upload, wanted)
                await work.artifacts.complete_upload(dataclasses.replace(upload, object=wanted))
        except Invalid:
            await self._discard(upload)
            raise
        return wanted

    async def _may_keep(self, caller: Caller, work: UnitOfWork, upload: Upload, content: BlobRef) -> None:
        """Asked again when the bytes are there: the run may have ended meanwhile."""
        if upload.owner:
            owner = await owners.writable(work, caller, upload.owner)
            there = await work.artifacts.get(upload.owner, upload.path)
            if there is not None and there.object.sha256 != content.sha256:
                await owners.check_replaceable(work, owner, there)

    def _verified(self, upload_id: str, task: asyncio.Task[BlobRef]) -> None:
        self._verifying.pop(upload_id, None)
        if not task.cancelled():
            task.exception()  # told to whoever waits; when nobody does any more, a repeated call meets it again

    async def _discard(self, upload: Upload) -> None:
        async with self._store.transaction() as work:
            await work.artifacts.drop_upload(upload.upload_id)
        await self._objects.delete(upload.object.key)

    async def _blob(self, source: BlobRef) -> BlobRef:
        async with self._store.transaction() as work:
            if blob := await work.artifacts.find_blob(source.sha256):
                return blob
        key = blob_key(source.sha256)
        # The source was verified and nothing overwrites it, and whoever reads the blob verifies it again.
        await self._objects.copy(source.key, key, sha256=source.sha256)
        return BlobRef(source.sha256, source.size_bytes, key)

    async def _check_model(self, source: BlobRef) -> None:
        """Raises Invalid for a model that is not all there. Takes as long as reading it takes."""
        if source.size_bytes > MAX_ONNX_BYTES:
            raise TooLarge(f"an ONNX file holds at most {MAX_ONNX_BYTES} bytes", [Violation("path", f"has {source.size_bytes} bytes")])
        with tempfile.TemporaryDirectory(prefix="headrace-model-", dir=self._work_dir) as folder:
            file = Path(folder) / "model.onnx"
            await self._objects.download(source.key, file, sha256=source.sha256)
            try:
                await asyncio.to_thread(check_one_file, file)
            except Invalid as refused:
                raise Invalid("the input is not valid", [Violation("path", refused.message)]) from refused

    async def _artifact(self, work: UnitOfWork, run_id: str, field: str, path: str) -> BlobRef:
        artifact = await work.artifacts.get(run_id, path)
        if artifact is None:
            raise NotFound(f"run {run_id} has no artifact {path!r}", [Violation(field, "upload it first")])
        return artifact.object

    async def _download(self, caller: Caller, target: BlobRef) -> Download:
        url = await self._objects.presign_get(target.key, self._url_ttl_s)
        return Download(url, target, "" if caller.service == GATEWAY else target.key)

    async def _may_upload(self, caller: Caller, work: UnitOfWork, owner: str) -> None:
        if owner:
            await owners.writable(work, caller, owner)
        elif caller.run_id is not None:
            raise Forbidden("a run token does not write data sets")
        else:
            require_role(caller, *WRITERS)
