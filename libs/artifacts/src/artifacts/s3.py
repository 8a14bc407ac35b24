"""An artifact store on any S3 server, through minio-py in a pool of threads of a fixed size. The only file that imports minio."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.datatypes import Part as MinioPart
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from servicekit.errors import Forbidden, HeadraceError, Internal, Invalid, NotFound, TooLarge, Unavailable

from artifacts.files import read_chunks, write_atomically
from artifacts.port import (
    CHUNK_SIZE,
    MAX_PARTS,
    PART_SIZE,
    Entry,
    HashMismatch,
    Multipart,
    Part,
    S3Location,
    Source,
    Stored,
    check_key,
    check_prefix,
    check_sha256,
    expect,
    part_size_for,
    parts_of,
    verified,
)

SHA256 = "x-amz-meta-sha256"
"""The header under which an object carries its hash."""

_MAX_COPY = 5 * 1024**3  # what S3 copies in one request

T = TypeVar("T")
_log = logging.getLogger(__name__)


class S3Store:
    """The artifact store on S3. Makes no connection before it is used; `stop` lets go of threads and connections.

    `pool_size` requests can be under way at once; a stream that is slow holds a connection, but no thread, between its chunks.
    """

    name = "artifacts"

    def __init__(self, location: S3Location, pool_size: int = 16) -> None:
        self._location = location
        self._bucket = location.bucket
        self._threads = ThreadPoolExecutor(pool_size, thread_name_prefix="s3")
        self._http = urllib3.PoolManager(
            maxsize=pool_size,
            timeout=urllib3.Timeout(connect=5, read=60),
            retries=urllib3.Retry(total=3, backoff_factor=0.1, status_forcelist=[500, 502, 503, 504], raise_on_status=False),
        )
        self._client = self._minio(location.endpoint, location.secure)
        self._public = self._client
        if location.public_endpoint:
            scheme, separator, host = location.public_endpoint.rpartition("://")
            self._public = self._minio(host, scheme == "https" if separator else location.secure)

    async def start(self) -> None:
        """Nothing to begin; makes the store a lifecycle component."""

    async def stop(self) -> None:
        """Closes connections and threads; requests under way end first."""
        await asyncio.to_thread(self._threads.shutdown)
        self._http.clear()

    async def check(self) -> None:
        """Asks whether the bucket can be read. Raises Unavailable or Forbidden."""
        if not await self._run(lambda: self._client.bucket_exists(self._bucket)):
            raise Unavailable("the artifact store has no bucket for us", detail=self._bucket)

    async def put(self, key: str, source: Source, *, sha256: str | None = None, record: bool = True) -> Stored:
        check_key(key)
        if sha256 is not None:
            check_sha256(sha256)
        if isinstance(source, bytes):
            return await self._put_bytes(key, source, sha256)
        part_size = PART_SIZE
        if isinstance(source, Path):
            part_size = part_size_for((await asyncio.to_thread(source.stat)).st_size)
            source = read_chunks(source)
        parts = _in_parts(source, part_size)
        async with contextlib.aclosing(parts):
            first = [await anext(parts, b"")]  # in a list, from which it can be let go
            if len(first[0]) < part_size:
                return await self._put_bytes(key, first[0], sha256)
            return await self._put_parts(key, first, parts, sha256, record)

    async def _put_bytes(self, key: str, data: bytes, sha256: str | None) -> Stored:
        def put() -> str:
            computed = hashlib.sha256(data).hexdigest()
            expect(key, sha256, computed)
            self._client._put_object(self._bucket, key, data, {SHA256: computed, "Content-Type": "application/octet-stream"})
            return computed

        return Stored(key, len(data), await self._to_its_end(put))

    async def _put_parts(self, key: str, first: list[bytes], rest: AsyncIterator[bytes], sha256: str | None, record: bool) -> Stored:
        """Uploads part by part, the next being read while one is sent. The upload is aborted when anything goes wrong."""
        digest = hashlib.sha256()
        size = 0
        sent: list[MinioPart] = []
        headers: dict[str, str | list[str] | tuple[str]] = {"Content-Type": "application/octet-stream"}
        if sha256 is not None:
            headers[SHA256] = sha256
        upload_id = await self._run(lambda: self._client._create_multipart_upload(self._bucket, key, headers))
        sending: asyncio.Future[MinioPart] | None = None
        try:

            def send(number: int, data: bytes) -> MinioPart:
                digest.update(data)
                return MinioPart(number, self._client._upload_part(self._bucket, key, data, None, upload_id, number))

            part = first.pop()
            for number in itertools.count(1):
                if number > MAX_PARTS:
                    raise TooLarge(f"{key}: a stream has {MAX_PARTS * PART_SIZE} bytes at most")
                size += len(part)
                sending = asyncio.ensure_future(self._run(send, number, part))
                part = await anext(rest, b"")
                sent.append(await asyncio.shield(sending))
                if not part:
                    break
            computed = digest.hexdigest()
            expect(key, sha256, computed)
            await self._to_its_end(lambda: self._client._complete_multipart_upload(self._bucket, key, upload_id, sent))
        except BaseException:
            await asyncio.shield(self._abandon(key, upload_id, sending))
            raise
        if sha256 is None and record:
            # S3 takes metadata only when an upload begins; copying an object onto itself replaces them without moving bytes.
            if size > _MAX_COPY:
                raise TooLarge(f"{key}: a stream of more than 5 GiB must be put with its SHA-256")
            await self.copy(key, key, sha256=computed)
        return Stored(key, size, computed)

    async def _abandon(self, key: str, upload_id: str, sending: asyncio.Future[MinioPart] | None) -> None:
        """Aborts an upload after an error, which matters more than a failure to abort: that is logged only."""
        if sending is not None:
            await asyncio.wait([sending])  # the abort must not overtake a part
            with contextlib.suppress(Exception):
                sending.result()  # an error of its own is told by whoever waits for the part
        try:
            await self.abort_multipart(key, upload_id)
        except HeadraceError:
            _log.warning("the upload of %s could not be aborted: its parts stay until the store drops them", key, exc_info=True)

    async def get(self, key: str, *, sha256: str | None) -> AsyncGenerator[bytes, None]:
        check_key(key)
        if sha256 is not None:
            check_sha256(sha256)
        response = await self._open(key)
        async with contextlib.aclosing(self._body(response)) as body:
            wanted = sha256 if sha256 is not None else response.headers.get(SHA256)
            if wanted is None:
                raise HashMismatch(f"no SHA-256 was recorded for {key}")
            async with contextlib.aclosing(verified(key, body, wanted)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _open(self, key: str) -> urllib3.BaseHTTPResponse:
        return await self._run(lambda: self._client.get_object(self._bucket, key))

    async def _body(self, response: urllib3.BaseHTTPResponse) -> AsyncGenerator[bytes, None]:
        """The chunks of a response, each read in a thread. The connection is given back after the last, and closed on the way."""
        reading: asyncio.Future[bytes] | None = None
        finished = False
        try:
            while True:
                reading = asyncio.ensure_future(self._run(response.read, CHUNK_SIZE))
                chunk = await asyncio.shield(reading)
                if not chunk:
                    finished = True
                    return
                yield chunk
        finally:
            if finished:
                response.release_conn()
            elif reading is not None and not reading.done():
                reading.add_done_callback(lambda _: response.close())  # a thread is still reading from it
            else:
                response.close()

    async def read(self, key: str, *, sha256: str | None, max_bytes: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async with contextlib.aclosing(self.get(key, sha256=sha256)) as source:
            async for chunk in source:
                size += len(chunk)
                if size > max_bytes:
                    raise TooLarge(f"{key} has more than {max_bytes} bytes")
                chunks.append(chunk)
        return b"".join(chunks)

    async def download(self, key: str, path: Path, *, sha256: str | None) -> None:
        await write_atomically(path, self.get(key, sha256=sha256))

    async def digest(self, key: str) -> Stored:
        check_key(key)
        digest = hashlib.sha256()
        size = 0
        async with contextlib.aclosing(self._body(await self._open(key))) as body:
            async for chunk in body:
                digest.update(chunk)
                size += len(chunk)
        return Stored(key, size, digest.hexdigest())

    async def list(self, prefix: str) -> AsyncIterator[Entry]:
        check_prefix(prefix)
        found = self._client.list_objects(self._bucket, prefix=prefix, recursive=True)
        while page := await self._run(lambda: [*itertools.islice(found, 1000)]):
            for item in page:
                if item.object_name is not None and not item.is_dir:
                    yield Entry(item.object_name, item.size or 0, item.last_modified or datetime.fromtimestamp(0, UTC))

    async def stat(self, key: str) -> Entry:
        check_key(key)
        found = await self._run(lambda: self._client.stat_object(self._bucket, key))
        recorded = found.metadata.get(SHA256) if found.metadata else None
        return Entry(key, found.size or 0, found.last_modified or datetime.fromtimestamp(0, UTC), recorded)

    async def delete(self, key: str) -> None:
        check_key(key)
        with contextlib.suppress(NotFound):
            await self._run(lambda: self._client.remove_object(self._bucket, key))

    async def copy(self, src: str, dst: str, *, sha256: str | None = None) -> None:
        check_key(src)
        check_key(dst)
        replaced: dict[str, Any] = {}
        if sha256 is not None:
            check_sha256(sha256)
            replaced = {"metadata": {"sha256": sha256}, "metadata_directive": REPLACE}
        source = CopySource(self._bucket, src)
        await self._run(lambda: self._client.copy_object(self._bucket, dst, source, **replaced))

    async def presign_get(self, key: str, expires_s: int) -> str:
        check_key(key)
        # Signing needs no server, since the region is known.
        return self._public.get_presigned_url("GET", self._bucket, key, expires=timedelta(seconds=expires_s))

    async def presign_put(self, key: str, expires_s: int) -> str:
        check_key(key)
        return self._public.get_presigned_url("PUT", self._bucket, key, expires=timedelta(seconds=expires_s))

    async def start_multipart(self, key: str, size: int, *, count: int | None = None, expires_s: int = 3600) -> Multipart:
        check_key(key)
        part_size, parts = parts_of(size, count)
        upload_id = await self._run(lambda: self._client._create_multipart_upload(self._bucket, key, {}))
        expires = timedelta(seconds=expires_s)

        def sign(number: int) -> str:
            query: dict[str, str | list[str] | tuple[str]] = {"uploadId": upload_id, "partNumber": str(number)}
            return self._public.get_presigned_url("PUT", self._bucket, key, expires=expires, extra_query_params=query)

        urls = await self._run(lambda: tuple(sign(number) for number in range(1, parts + 1)))
        return Multipart(key, upload_id, part_size, urls)

    async def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> Entry:
        check_key(key)
        numbers = [part.number for part in parts]
        if not parts or numbers != sorted(set(numbers)):
            raise Invalid("the parts of an upload are named once each, in order")
        named = [MinioPart(part.number, part.etag.strip('"')) for part in parts]
        await self._run(lambda: self._client._complete_multipart_upload(self._bucket, key, upload_id, named))
        return await self.stat(key)

    async def abort_multipart(self, key: str, upload_id: str) -> None:
        check_key(key)
        with contextlib.suppress(NotFound):
            await self._run(lambda: self._client._abort_multipart_upload(self._bucket, key, upload_id))

    def _minio(self, endpoint: str, secure: bool) -> Minio:
        location = self._location
        return Minio(
            endpoint,
            access_key=location.access_key,
            secret_key=location.secret_key,
            secure=secure,
            region=location.region,
            http_client=self._http,
        )

    async def _to_its_end(self, function: Callable[..., T]) -> T:
        """As `_run`, and when it is cancelled the function has ended too: what is deleted next is not put after that."""
        running = asyncio.ensure_future(self._run(function))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a blocking function in a thread of the pool, and its errors by our names."""

        def call() -> T:
            with _in_our_terms():
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


async def _in_parts(source: AsyncIterator[bytes], part_size: int) -> AsyncGenerator[bytes, None]:
    """Chunks of any size, gathered or cut into parts of `part_size` bytes; the last is what is left."""
    pieces: list[memoryview] = []
    missing = part_size
    async for chunk in source:
        view = memoryview(chunk)
        while len(view) >= missing:
            pieces.append(view[:missing])
            view = view[missing:]
            part = b"".join(pieces)
            pieces.clear()  # before the part is passed on: the pieces are as large as it is
            missing = part_size
            yield part
        if view:
            pieces.append(view)
            missing -= len(view)
    if pieces:
        yield b"".join(pieces)


_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "ResourceNotFound"})
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "AllAccessDisabled"})
_WRONG = frozenset(
    {"InvalidPart", "InvalidPartOrder", "InvalidArgument", "KeyTooLongError", "InvalidObjectName", "XMinioInvalidObjectName"}
)
_LARGE = frozenset({"EntityTooLarge", "EntityTooSmall"})
# A bucket that is not there is the operator's fault and can be put right: not the fault of whoever asked for an object.
_AWAY = frozenset({"NoSuchBucket", "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "XMinioServerNotInitialized"})


@contextlib.contextmanager
def _in_our_terms() -> Iterator[None]:
    """The error table of S3."""
    try:
        yield
    except S3Error as error:
        code, message = error.code or "", f"{error.message} ({error.code}) {error.resource or ''}".strip()
        if code in _MISSING:
            raise NotFound(f"the artifact store has no {error.object_name or error.resource}: {code}") from error
        if code in _REFUSED:
            raise Forbidden(f"the artifact store refuses our key: {code}") from error
        if code in _WRONG:
            raise Invalid(message) from error
        if code in _LARGE:
            raise TooLarge(message) from error
        if code in _AWAY or error.response.status >= 500:
            raise Unavailable("the artifact store is not available", detail=message) from error
        raise Internal("the artifact store failed", detail=message) from error
    except (ServerError, InvalidResponseError) as error:
        raise Unavailable("the artifact store is not available", detail=str(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise Unavailable("the artifact store does not answer", detail=str(error)) from error
    except MinioException as error:
        raise Internal("the artifact store failed", detail=str(error)) from error
