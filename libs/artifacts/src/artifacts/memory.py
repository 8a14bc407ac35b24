"""An artifact store in memory, for tests: the same promises, kept by a dictionary."""

from __future__ import annotations

import builtins
import hashlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from servicekit.clock import Clock, SystemClock
from servicekit.errors import Invalid, NotFound, TooLarge

from artifacts.files import read_chunks, write_atomically
from artifacts.port import (
    CHUNK_SIZE,
    Entry,
    HashMismatch,
    Multipart,
    Part,
    Source,
    Stored,
    check_key,
    check_prefix,
    check_sha256,
    expect,
    parts_of,
    verified,
)


@dataclass(slots=True)
class _Upload:
    key: str
    parts: dict[int, bytes] = field(default_factory=dict)


class MemoryStore:
    """Keeps objects until it is forgotten itself. `upload_part` stands for the PUT that a client makes to a presigned URL."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._objects: dict[str, tuple[bytes, Entry]] = {}
        self._uploads: dict[str, _Upload] = {}
        self._ids = itertools.count(1)

    async def put(self, key: str, source: Source, *, sha256: str | None = None, record: bool = True) -> Stored:
        check_key(key)
        if sha256 is not None:
            check_sha256(sha256)
        if isinstance(source, bytes):
            data = source
        else:
            chunks = read_chunks(source) if isinstance(source, Path) else source
            data = b"".join([chunk async for chunk in chunks])
        computed = hashlib.sha256(data).hexdigest()
        expect(key, sha256, computed)
        self._keep(key, data, computed if record else sha256)
        return Stored(key, len(data), computed)

    async def get(self, key: str, *, sha256: str | None) -> AsyncGenerator[bytes, None]:
        data, entry = self._find(key)
        wanted = sha256 if sha256 is not None else entry.sha256
        if wanted is None:
            raise HashMismatch(f"no SHA-256 was recorded for {key}")
        check_sha256(wanted)
        async for chunk in verified(key, _chunks(data), wanted):
            yield chunk

    async def read(self, key: str, *, sha256: str | None, max_bytes: int) -> bytes:
        if self._find(key)[1].size > max_bytes:
            raise TooLarge(f"{key} has more than {max_bytes} bytes")
        return b"".join([chunk async for chunk in self.get(key, sha256=sha256)])

    async def download(self, key: str, path: Path, *, sha256: str | None) -> None:
        await write_atomically(path, self.get(key, sha256=sha256))

    async def digest(self, key: str) -> Stored:
        data, _ = self._find(key)
        return Stored(key, len(data), hashlib.sha256(data).hexdigest())

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        check_prefix(prefix)
        for key in sorted(self._objects):
            if key.startswith(prefix) and key in self._objects:
                entry = self._objects[key][1]
                yield Entry(entry.key, entry.size, entry.modified_at)

    async def stat(self, key: str) -> Entry:
        return self._find(key)[1]

    async def delete(self, key: str) -> None:
        check_key(key)
        self._objects.pop(key, None)

    async def copy(self, src: str, dst: str, *, sha256: str | None = None) -> None:
        check_key(dst)
        if sha256 is not None:
            check_sha256(sha256)
        data, entry = self._find(src)
        self._keep(dst, data, sha256 or entry.sha256)

    async def presign_get(self, key: str, expires_s: int) -> str:
        check_key(key)
        return f"memory:///{key}?expires={expires_s}"

    async def presign_put(self, key: str, expires_s: int) -> str:
        check_key(key)
        return f"memory:///{key}?put&expires={expires_s}"

    def put_object(self, url: str, data: bytes) -> None:
        """What a client's PUT to a URL of `presign_put` does."""
        self._keep(url.removeprefix("memory:///").partition("?put")[0], data, None)

    async def start_multipart(self, key: str, size: int, *, count: int | None = None, expires_s: int = 3600) -> Multipart:
        check_key(key)
        part_size, parts = parts_of(size, count)
        upload_id = f"upload-{next(self._ids)}"
        self._uploads[upload_id] = _Upload(key)
        urls = tuple(f"memory:///{key}?uploadId={upload_id}&partNumber={number}" for number in range(1, parts + 1))
        return Multipart(key, upload_id, part_size, urls)

    def upload_part(self, url: str, data: bytes) -> str:
        """What a client's PUT to a URL of `start_multipart` does; returns the ETag."""
        _, _, query = url.partition("?uploadId=")
        upload_id, _, number = query.partition("&partNumber=")
        if upload_id not in self._uploads:
            raise NotFound("no such upload")
        self._uploads[upload_id].parts[int(number)] = data
        return _etag(data)

    async def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> Entry:
        upload = self._upload(key, upload_id)
        numbers = [part.number for part in parts]
        if not parts or numbers != sorted(set(numbers)):
            raise Invalid("the parts of an upload are named once each, in order")
        for part in parts:
            if part.number not in upload.parts or _etag(upload.parts[part.number]) != part.etag.strip('"'):
                raise Invalid(f"part {part.number} was not uploaded as named")
        self._keep(key, b"".join(upload.parts[number] for number in numbers), None)
        del self._uploads[upload_id]
        return self._objects[key][1]

    async def abort_multipart(self, key: str, upload_id: str) -> None:
        check_key(key)
        self._uploads.pop(upload_id, None)

    def open_uploads(self) -> builtins.list[str]:
        """The ids of the uploads that are neither completed nor aborted."""
        return sorted(self._uploads)

    def _keep(self, key: str, data: bytes, sha256: str | None) -> None:
        self._objects[key] = data, Entry(key, len(data), self._clock.now(), sha256)

    def _find(self, key: str) -> tuple[bytes, Entry]:
        check_key(key)
        if key not in self._objects:
            raise NotFound(f"there is no artifact {key}")
        return self._objects[key]

    def _upload(self, key: str, upload_id: str) -> _Upload:
        check_key(key)
        upload = self._uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise NotFound("no such upload")
        return upload


def _etag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), CHUNK_SIZE):
        yield data[start : start + CHUNK_SIZE]
