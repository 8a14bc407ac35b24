"""The use cases of MLflow's artifact store: files of runs and logged models, listed, streamed both ways, sent in parts, taken away.

A client names an owner and a path among its artifacts; the key at which bytes lie is made here and never told. Bytes are hashed while they
pass, and a file is there when all of it is, under its new content or its old.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from artifacts import ArtifactStore
from servicekit.access import Caller
from servicekit.clock import Ids
from servicekit.errors import HeadraceError, Invalid, NotFound, TooLarge

from tracker import owners
from tracker.deliverables import Deliverables
from tracker.domain.artifact import Artifact, Listed, Place, Upload, check_path, key_of
from tracker.domain.errors import Rejected
from tracker.domain.model import BlobRef
from tracker.handlers import told
from tracker.ports import Store, UnitOfWork

MAX_STREAM_BYTES = 80_000_000_000
"""Of a file that is sent in one piece, which the store takes as 10,000 parts at most. One sent in parts has 5 TiB."""

MAX_LISTED = 10_000
_NOTHING = BlobRef("", 0, "")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """An upload that a client sends in parts, one PUT to each URL, cut as it likes."""

    upload_id: str
    urls: Sequence[str]


@dataclass(frozen=True, slots=True)
class Content:
    """A file on its way to a client. `chunks` raises before its last when what is stored is not what was."""

    artifact: Artifact
    chunks: AsyncGenerator[bytes, None]


@dataclass(frozen=True, slots=True)
class Link:
    """From where a client GETs a file by itself."""

    url: str
    size_bytes: int


class Artifacts:
    """Files of runs and of logged models."""

    def __init__(self, store: Store, objects: ArtifactStore, deliverables: Deliverables, ids: Ids, *, url_ttl_s: int) -> None:
        self._store = store
        self._objects = objects
        self._deliverables = deliverables
        self._ids = ids
        self._url_ttl_s = url_ttl_s

    async def experiment_of(self, caller: Caller, owner: str) -> int:
        """The experiment of an owner that the caller may read."""
        async with self._store.transaction() as work:
            return (await owners.readable(work, caller, owner)).experiment_id

    async def listed(self, caller: Caller, place: Place, after: str = "", limit: int = MAX_LISTED) -> Sequence[Listed]:
        """What lies directly in a folder, by name, those named after `after`. A file, or nothing, is an empty folder."""
        if place.path:
            _checked(place.path)
        async with self._store.transaction() as work:
            await self._reading(work, caller, place)
            return await work.artifacts.folder(place.owner, place.path, after, min(limit, MAX_LISTED))

    async def open(self, caller: Caller, place: Place) -> Content:
        """A file. Close its chunks. Raises NotFound."""
        found = await self._file(caller, place)
        return Content(found, self._objects.get(found.object.key, sha256=found.object.sha256))

    async def link(self, caller: Caller, place: Place) -> Link:
        """Where a client may GET a file straight from the store for a while. Raises NotFound."""
        found = await self._file(caller, place)
        return Link(await self._objects.presign_get(found.object.key, self._url_ttl_s), found.object.size_bytes)

    async def put(self, caller: Caller, place: Place, chunks: AsyncIterator[bytes], announced: int | None) -> BlobRef:
        """Stores a file in constant memory. One that breaks off leaves what was there. Repeatable with new chunks.

        `announced` is how many bytes will come, if that is known. Raises TooLarge beyond MAX_STREAM_BYTES, Conflict for what must stay.
        """
        _checked(place.path)
        if announced is not None and announced > MAX_STREAM_BYTES:
            raise TooLarge(f"a file that is sent in one piece has {MAX_STREAM_BYTES} bytes at most; send it in parts")
        upload = await self._begin(caller, place)
        try:
            arrived = await self._objects.put(upload.object.key, chunks, record=False)
            if announced not in (None, arrived.size):
                raise Invalid(f"{announced} bytes were announced, {arrived.size} arrived")
            stored = BlobRef(arrived.sha256, arrived.size, upload.object.key)
            async with self._store.transaction() as work:
                await self._may_put(work, caller, place, stored)
                await work.artifacts.complete_upload(dataclasses.replace(upload, object=stored))
        except BaseException:
            # Whoever sent it may be gone, and this request with them: what it left is cleared away all the same.
            await asyncio.shield(self._forget([upload.object.key]))
            raise
        return stored

    async def start_parts(self, caller: Caller, place: Place, count: int) -> Parts:
        """Begins an upload of `count` parts, which go from the client straight to the store."""
        _checked(place.path)
        upload_id = str(self._ids.uuid7())
        target = dataclasses.replace(_NOTHING, key=key_of(upload_id, place.owner, place.path))
        async with self._store.transaction() as work:
            await self._may_put(work, caller, place, None)
        multipart = await self._objects.start_multipart(target.key, 0, count=count)
        async with self._store.transaction() as work:
            upload = Upload(upload_id, place.owner, place.path, "", target, multipart.upload_id, complete=False)
            await work.artifacts.add_upload(upload)
        return Parts(upload_id, multipart.urls)

    async def complete_parts(self, caller: Caller, place: Place, upload_id: str, etags: Sequence[str]) -> BlobRef:
        """Joins the parts, reads the file back and hashes it, which takes a while. Repeatable; a repeated call joins the first."""
        await self._started(caller, place, upload_id)
        return await self._deliverables.complete_upload(caller, upload_id, etags)

    async def abort_parts(self, caller: Caller, place: Place, upload_id: str) -> None:
        """Forgets an upload in parts. Repeatable; one that is complete stays."""
        with contextlib.suppress(NotFound):
            upload = await self._started(caller, place, upload_id)
            if not upload.complete:
                await self._objects.abort_multipart(upload.object.key, upload.store_id)
                async with self._store.transaction() as work:
                    await work.artifacts.drop_upload(upload_id)

    async def remove(self, caller: Caller, place: Place) -> None:
        """Takes away a file, or a folder with all in it. Repeatable. Raises Conflict, and takes nothing, when one of them must stay."""
        if place.path:
            _checked(place.path)
        async with self._store.transaction() as work:
            owner = await self._writing(work, caller, place)
            for artifact in await work.artifacts.below(place.owner, place.path):
                await owners.check_replaceable(work, owner, artifact)
            keys = await work.artifacts.remove(place.owner, place.path)
        if keys:
            await self._forget(keys)

    async def _begin(self, caller: Caller, place: Place) -> Upload:
        """Writes the upload down before a byte of it is stored, so that nothing lies in the store that is not known."""
        upload_id = str(self._ids.uuid7())
        target = dataclasses.replace(_NOTHING, key=key_of(upload_id, place.owner, place.path))
        upload = Upload(upload_id, place.owner, place.path, "", target, "", complete=False)
        async with self._store.transaction() as work:
            await self._may_put(work, caller, place, None)
            await work.artifacts.add_upload(upload)
        return upload

    async def _may_put(self, work: UnitOfWork, caller: Caller, place: Place, content: BlobRef | None) -> None:
        """With `content` unknown yet, what must stay is told later: it may be sent again as it is."""
        owner = await self._writing(work, caller, place)
        there = await work.artifacts.get(place.owner, place.path)
        if content is not None and there is not None and there.object.sha256 != content.sha256:
            await owners.check_replaceable(work, owner, there)

    async def _started(self, caller: Caller, place: Place, upload_id: str) -> Upload:
        async with self._store.transaction() as work:
            await self._writing(work, caller, place)
            upload = await work.artifacts.get_upload(upload_id)
        if upload is None or (upload.owner, upload.path) != (place.owner, place.path):
            raise NotFound(f"there is no upload {upload_id[:100]} to {place.path}")
        return upload

    async def _file(self, caller: Caller, place: Place) -> Artifact:
        _checked(place.path)
        async with self._store.transaction() as work:
            await self._reading(work, caller, place)
            found = await work.artifacts.get(place.owner, place.path)
        if found is None:
            raise NotFound(f"there is no artifact {place.path}")
        return found

    async def _reading(self, work: UnitOfWork, caller: Caller, place: Place) -> None:
        _within(await owners.readable(work, caller, place.owner), place)

    async def _writing(self, work: UnitOfWork, caller: Caller, place: Place) -> owners.Owner:
        owner = await owners.writable(work, caller, place.owner)
        _within(owner, place)
        return owner

    async def _forget(self, keys: Sequence[str]) -> None:
        """Deletes objects and what is known of their uploads. What cannot be deleted now stays known, so that it can be found."""
        try:
            for key in keys:
                await self._objects.delete(key)
            async with self._store.transaction() as work:
                await work.artifacts.drop_uploads(keys)
        except HeadraceError:
            _log.warning("%d objects that nothing names any more could not be deleted", len(keys), exc_info=True)


def _within(owner: owners.Owner, place: Place) -> None:
    if owner.experiment_id != place.experiment_id:
        raise NotFound(f"there is no {place.owner} in experiment {place.experiment_id}")


def _checked(path: str) -> None:
    with told():
        if problems := check_path(path):
            raise Rejected(problems)
