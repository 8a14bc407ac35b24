"""What every artifact store promises, against memory, SeaweedFS and MinIO."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import PART_SIZE, ArtifactStore, Entry, HashMismatch, Part, Stored
from artifacts.blobs import blob_key
from artifacts.memory import MemoryStore
from artifacts.port import CHUNK_SIZE
from artifacts.s3 import S3Store
from servicekit.errors import Forbidden, Invalid, NotFound, TooLarge, Unavailable


@dataclass
class Harness:
    """A store, a key prefix of this test's own, and what only a test does with a store."""

    store: ArtifactStore
    prefix: str

    def key(self, name: str) -> str:
        return self.prefix + name

    async def put_to(self, url: str, data: bytes) -> str:
        """What a client does with a URL of a multipart upload; returns the ETag."""
        if isinstance(self.store, MemoryStore):
            return self.store.upload_part(url, data)
        request = urllib.request.Request(url, data=data, method="PUT")
        headers, _ = await asyncio.to_thread(_send, request)
        return headers["ETag"]

    async def put_whole(self, url: str, data: bytes) -> None:
        """What a client does with a URL of `presign_put`."""
        if isinstance(self.store, MemoryStore):
            self.store.put_object(url, data)
            return
        await asyncio.to_thread(_send, urllib.request.Request(url, data=data, method="PUT"))

    async def store_silently(self, key: str, data: bytes, recorded: str | None) -> None:
        """Puts an object as another program would: with any hash recorded, or none."""
        if isinstance(self.store, MemoryStore):
            self.store._keep(key, data, recorded)
            return
        assert isinstance(self.store, S3Store)
        client, bucket = self.store._client, self.store._bucket
        headers: Any = {} if recorded is None else {"x-amz-meta-sha256": recorded}
        await asyncio.to_thread(client._put_object, bucket, key, data, headers)

    async def open_uploads(self) -> list[str]:
        if isinstance(self.store, MemoryStore):
            return self.store.open_uploads()
        assert isinstance(self.store, S3Store)
        found = await asyncio.to_thread(self.store._client._list_multipart_uploads, self.store._bucket, prefix=self.prefix)
        return [upload.upload_id or "" for upload in found.uploads]

    async def names(self, prefix: str = "") -> list[str]:
        return [entry.key.removeprefix(self.prefix) async for entry in self.store.list(self.key(prefix))]


def _send(request: urllib.request.Request) -> tuple[dict[str, str], bytes]:
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(response.headers), response.read()


@pytest.fixture(params=["memory", "seaweedfs", "minio"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    prefix = f"contract/{secrets.token_hex(6)}/"
    if request.param == "memory":
        yield Harness(MemoryStore(), prefix)
        return
    location = request.getfixturevalue("stack_servers").s3 if request.param == "seaweedfs" else request.getfixturevalue("minio_server")
    store = S3Store(location, pool_size=8)
    await store.check()
    yield Harness(store, prefix)
    await store.stop()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def stream(data: bytes, chunk: int = 1_000_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), chunk):
        yield data[start : start + chunk]


async def drain(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


SIZES = {
    "empty": 0,
    "small": 1234,
    "one chunk": CHUNK_SIZE,
    "just under a part": PART_SIZE - 1,
    "one part": PART_SIZE,
    "several parts": 2 * PART_SIZE + 12345,
}


@pytest.mark.parametrize("kind", ["bytes", "file", "stream"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
async def test_what_is_put_is_got(harness: Harness, size: int, kind: str, tmp_path: Path) -> None:
    data = os.urandom(size)
    file = tmp_path / "source"
    file.write_bytes(data)
    sources: dict[str, Callable[[], Any]] = {"bytes": lambda: data, "file": lambda: file, "stream": lambda: stream(data)}
    for name, known in (("known", digest(data)), ("unknown", None)):
        key = harness.key(name)
        assert await harness.store.put(key, sources[kind](), sha256=known) == Stored(key, size, digest(data))
        assert await drain(harness.store.get(key, sha256=digest(data))) == data
        assert await drain(harness.store.get(key, sha256=None)) == data
        entry = await harness.store.stat(key)
        assert (entry.key, entry.size, entry.sha256) == (key, size, digest(data))
        assert await harness.store.digest(key) == Stored(key, size, digest(data))
    assert await harness.open_uploads() == []


@pytest.mark.parametrize("size", [10, 2 * PART_SIZE], ids=["small", "several parts"])
@pytest.mark.parametrize("kind", ["bytes", "file", "stream"])
async def test_a_source_with_another_hash_is_refused_and_leaves_nothing(harness: Harness, size: int, kind: str, tmp_path: Path) -> None:
    data = os.urandom(size)
    file = tmp_path / "source"
    file.write_bytes(data)
    sources: dict[str, Any] = {"bytes": data, "file": file, "stream": stream(data)}
    with pytest.raises(HashMismatch):
        await harness.store.put(harness.key("a"), sources[kind], sha256=digest(b"other"))
    assert await harness.names() == []
    assert await harness.open_uploads() == []


async def test_what_was_there_before_a_refused_put_stays(harness: Harness) -> None:
    await harness.store.put(harness.key("a"), b"before")
    with pytest.raises(HashMismatch):
        await harness.store.put(harness.key("a"), stream(os.urandom(PART_SIZE + 1)), sha256=digest(b"other"))
    assert await harness.store.read(harness.key("a"), sha256=None, max_bytes=100) == b"before"


async def test_a_put_replaces_the_object_and_its_hash(harness: Harness) -> None:
    await harness.store.put(harness.key("a"), b"before")
    await harness.store.put(harness.key("a"), b"after")
    assert await harness.store.read(harness.key("a"), sha256=digest(b"after"), max_bytes=100) == b"after"


async def test_a_source_that_fails_or_is_cancelled_leaves_nothing(harness: Harness) -> None:
    reached = asyncio.Event()

    async def source(fails: bool) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield os.urandom(PART_SIZE)
        reached.set()
        if fails:
            raise OSError("the disk broke")
        await asyncio.Event().wait()

    with pytest.raises(OSError, match="the disk broke"):
        await harness.store.put(harness.key("a"), source(fails=True))
    reached.clear()
    putting = asyncio.create_task(harness.store.put(harness.key("a"), source(fails=False)))
    await asyncio.wait_for(reached.wait(), 30)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await harness.open_uploads() == []
    assert await harness.names() == []


@pytest.mark.parametrize("size", [1, CHUNK_SIZE, 3 * CHUNK_SIZE + 1])
async def test_the_last_chunk_of_wrong_bytes_is_never_released(harness: Harness, size: int) -> None:
    data = os.urandom(size)
    await harness.store_silently(harness.key("a"), data, recorded=digest(data))
    got = bytearray()

    async def read() -> None:
        async for chunk in harness.store.get(harness.key("a"), sha256=digest(b"other")):
            got.extend(chunk)

    with pytest.raises(HashMismatch, match=digest(data)):
        await read()
    assert len(got) < size
    with pytest.raises(HashMismatch):
        await harness.store.read(harness.key("a"), sha256=digest(b"other"), max_bytes=size)


async def test_bytes_that_changed_under_their_recorded_hash_are_found(harness: Harness) -> None:
    await harness.store_silently(harness.key("a"), b"tampered", recorded=digest(b"original"))
    with pytest.raises(HashMismatch):
        await drain(harness.store.get(harness.key("a"), sha256=None))
    assert await drain(harness.store.get(harness.key("a"), sha256=digest(b"tampered"))) == b"tampered"


async def test_without_any_hash_nothing_is_given_out(harness: Harness) -> None:
    await harness.store_silently(harness.key("a"), b"from somewhere", recorded=None)
    assert (await harness.store.stat(harness.key("a"))).sha256 is None
    with pytest.raises(HashMismatch, match="recorded"):
        await drain(harness.store.get(harness.key("a"), sha256=None))
    assert await harness.store.digest(harness.key("a")) == Stored(harness.key("a"), 14, digest(b"from somewhere"))


async def test_read_is_bounded(harness: Harness) -> None:
    await harness.store.put(harness.key("a"), b"x" * 100)
    assert await harness.store.read(harness.key("a"), sha256=None, max_bytes=100) == b"x" * 100
    with pytest.raises(TooLarge):
        await harness.store.read(harness.key("a"), sha256=None, max_bytes=99)


async def test_a_download_appears_complete_or_not_at_all(harness: Harness, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_SIZE)
    await harness.store.put(harness.key("a"), data)
    target = tmp_path / "a file"
    await harness.store.download(harness.key("a"), target, sha256=digest(data))
    assert target.read_bytes() == data
    target.write_bytes(b"before")
    with pytest.raises(HashMismatch):
        await harness.store.download(harness.key("a"), target, sha256=digest(b"other"))
    with pytest.raises(NotFound):
        await harness.store.download(harness.key("b"), target, sha256=digest(b"other"))
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a file"]


async def test_readers_that_leave_early_cost_nothing(harness: Harness) -> None:
    data = os.urandom(4 * CHUNK_SIZE)
    await harness.store.put(harness.key("a"), data)
    for _ in range(40):  # more than there are threads and connections
        async with aclosing(harness.store.get(harness.key("a"), sha256=digest(data))) as chunks:
            async for chunk in chunks:
                assert data.startswith(chunk)
                break
    assert await drain(harness.store.get(harness.key("a"), sha256=digest(data))) == data


async def test_more_streams_than_threads_make_progress_together(harness: Harness) -> None:
    """Copies through the client: each holds a reader and a writer, twice as many as there are threads."""
    data = os.urandom(PART_SIZE + 3 * CHUNK_SIZE)
    await harness.store.put(harness.key("a"), data)

    async def pipe(number: int) -> Stored:
        return await harness.store.put(harness.key(f"copy-{number}"), harness.store.get(harness.key("a"), sha256=digest(data)))

    async with asyncio.timeout(120):
        copies = await asyncio.gather(*(pipe(number) for number in range(12)))
    assert {stored.sha256 for stored in copies} == {digest(data)}


async def test_what_is_not_there(harness: Harness) -> None:
    missing = harness.key("missing")
    with pytest.raises(NotFound):
        await drain(harness.store.get(missing, sha256=None))
    with pytest.raises(NotFound):
        await harness.store.read(missing, sha256=digest(b""), max_bytes=1)
    with pytest.raises(NotFound):
        await harness.store.stat(missing)
    with pytest.raises(NotFound):
        await harness.store.digest(missing)
    with pytest.raises(NotFound):
        await harness.store.copy(missing, harness.key("b"))
    await harness.store.delete(missing)


async def test_listing_and_deleting(harness: Harness) -> None:
    for name in ("b/2", "a", "b/1", "b/c/3", "bb"):
        await harness.store.put(harness.key(name), name.encode())
    assert await harness.names() == ["a", "b/1", "b/2", "b/c/3", "bb"]
    assert await harness.names("b/") == ["b/1", "b/2", "b/c/3"]
    assert await harness.names("b") == ["b/1", "b/2", "b/c/3", "bb"]
    assert await harness.names("c") == []
    entries = [entry async for entry in harness.store.list(harness.key("b/c"))]
    assert [(entry.size, entry.modified_at.tzinfo is not None) for entry in entries] == [(5, True)]
    await harness.store.delete(harness.key("b/1"))
    await harness.store.delete(harness.key("b/1"))
    assert await harness.names("b/") == ["b/2", "b/c/3"]


async def test_a_listing_longer_than_a_page(harness: Harness) -> None:
    async def put(numbers: range) -> None:
        for number in numbers:
            await harness.store.put(harness.key(f"{number:04}"), b"x")

    await asyncio.gather(*(put(range(start, 1005, 8)) for start in range(8)))
    assert await harness.names() == [f"{number:04}" for number in range(1005)]


async def test_copying_keeps_the_hash_or_records_one(harness: Harness) -> None:
    data = os.urandom(1000)
    await harness.store.put(harness.key("a"), data)
    await harness.store.copy(harness.key("a"), harness.key("b"))
    assert await harness.store.read(harness.key("b"), sha256=None, max_bytes=1000) == data
    await harness.store_silently(harness.key("client"), data, recorded=None)
    blob = harness.key(blob_key(digest(data)))
    await harness.store.copy(harness.key("client"), blob, sha256=digest(data))
    assert (await harness.store.stat(blob)).sha256 == digest(data)
    assert await harness.store.read(blob, sha256=None, max_bytes=1000) == data


async def test_unusual_keys(harness: Harness) -> None:
    for name in ("with space", "über/ümlaut", "plus+and&amp;%25", "a" * 200, "quote'and\"", "tilde~=,:;@()"):
        data = name.encode()
        await harness.store.put(harness.key(name), data)
        assert await harness.store.read(harness.key(name), sha256=None, max_bytes=1000) == data
        assert await harness.names(name) == [name]
        await harness.store.copy(harness.key(name), harness.key("copy"))
        assert await harness.store.read(harness.key("copy"), sha256=None, max_bytes=1000) == data


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "..", "a\nb", "a\\b", "x" * 1025])
async def test_what_is_no_key_is_refused_everywhere(harness: Harness, key: str) -> None:
    store = harness.store
    calls: list[Callable[[], Any]] = [
        lambda: store.put(key, b"x"),
        lambda: drain(store.get(key, sha256=None)),
        lambda: store.read(key, sha256=None, max_bytes=1),
        lambda: store.stat(key),
        lambda: store.digest(key),
        lambda: store.delete(key),
        lambda: store.copy(key, "a"),
        lambda: store.copy("a", key),
        lambda: store.presign_get(key, 60),
        lambda: store.presign_put(key, 60),
        lambda: store.start_multipart(key, 1),
        lambda: store.complete_multipart(key, "x", [Part(1, "x")]),
        lambda: store.abort_multipart(key, "x"),
    ]
    for call in calls:
        with pytest.raises(Invalid, match="not a key"):
            await call()


@pytest.mark.parametrize("prefix", ["/", "../", "a/../", "a//", "/a"])
async def test_what_is_no_prefix_is_refused(harness: Harness, prefix: str) -> None:
    with pytest.raises(Invalid):
        _ = [entry async for entry in harness.store.list(prefix)]


@pytest.mark.parametrize("sha256", ["", "abc", "A" * 64, "g" * 64, "0" * 65])
async def test_what_is_no_hash_is_refused(harness: Harness, sha256: str) -> None:
    await harness.store.put(harness.key("a"), b"x")
    with pytest.raises(Invalid):
        await harness.store.put(harness.key("b"), b"x", sha256=sha256)
    with pytest.raises(Invalid):
        await drain(harness.store.get(harness.key("a"), sha256=sha256))
    with pytest.raises(Invalid):
        await harness.store.copy(harness.key("a"), harness.key("b"), sha256=sha256)
    assert await harness.names() == ["a"]


async def test_a_client_uploads_in_parts(harness: Harness) -> None:
    data = os.urandom(2 * PART_SIZE + 777)
    key = harness.key("uploaded")
    upload = await harness.store.start_multipart(key, len(data))
    assert (upload.key, upload.part_size, len(upload.urls)) == (key, PART_SIZE, 3)
    pieces = [data[start : start + upload.part_size] for start in range(0, len(data), upload.part_size)]
    etags = [await harness.put_to(url, piece) for url, piece in zip(upload.urls, pieces, strict=True)]
    assert await harness.names() == []  # not before it is completed
    entry = await harness.store.complete_multipart(key, upload.upload_id, [Part(n, etag) for n, etag in enumerate(etags, start=1)])
    assert isinstance(entry, Entry)
    assert (entry.key, entry.size, entry.sha256) == (key, len(data), None)
    assert await harness.store.digest(key) == Stored(key, len(data), digest(data))
    assert await drain(harness.store.get(key, sha256=digest(data))) == data
    assert await harness.open_uploads() == []


async def test_a_client_uploads_in_one_piece(harness: Harness) -> None:
    key = harness.key("with space")
    await harness.put_whole(await harness.store.presign_put(key, 60), b"whole")
    assert (await harness.store.stat(key)).sha256 is None
    assert await harness.store.digest(key) == Stored(key, 5, digest(b"whole"))


async def test_an_empty_file_is_one_part(harness: Harness) -> None:
    upload = await harness.store.start_multipart(harness.key("empty"), 0)
    assert len(upload.urls) == 1
    etag = await harness.put_to(upload.urls[0], b"")
    entry = await harness.store.complete_multipart(harness.key("empty"), upload.upload_id, [Part(1, etag)])
    assert entry.size == 0


async def test_parts_must_be_those_that_were_uploaded(harness: Harness) -> None:
    key = harness.key("uploaded")
    upload = await harness.store.start_multipart(key, PART_SIZE + 1)
    etag = await harness.put_to(upload.urls[0], os.urandom(PART_SIZE))
    wrong: list[list[Part]] = [[], [Part(1, etag), Part(1, etag)], [Part(2, etag), Part(1, etag)], [Part(1, etag), Part(2, "0" * 32)]]
    for parts in wrong:
        with pytest.raises(Invalid) as caught:
            await harness.store.complete_multipart(key, upload.upload_id, parts)
        assert not isinstance(caught.value, NotFound)
    assert await harness.names() == []
    await harness.store.abort_multipart(key, upload.upload_id)
    await harness.store.abort_multipart(key, upload.upload_id)
    assert await harness.open_uploads() == []
    with pytest.raises(NotFound):
        await harness.store.complete_multipart(key, upload.upload_id, [Part(1, etag)])


async def test_sizes_that_cannot_be(harness: Harness) -> None:
    with pytest.raises(Invalid):
        await harness.store.start_multipart(harness.key("a"), -1)
    with pytest.raises(TooLarge):
        await harness.store.start_multipart(harness.key("a"), 6 * 1024**4)


# From here on what only a server can get wrong.


@pytest.fixture(params=["seaweedfs", "minio"])
def location(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("stack_servers").s3 if request.param == "seaweedfs" else request.getfixturevalue("minio_server")


async def test_a_presigned_url_gives_the_object_to_anyone_for_a_while(location: Any) -> None:
    store = S3Store(location)
    key = f"contract/{secrets.token_hex(6)}/with space"
    await store.put(key, b"hello")
    url = await store.presign_get(key, 60)
    _, body = await asyncio.to_thread(_send, urllib.request.Request(url))
    assert body == b"hello"
    for wrong in (url.replace("with%20space", "other"), url.partition("?")[0], url[:-4] + "0000"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            await asyncio.to_thread(_send, urllib.request.Request(wrong))
        assert caught.value.code in (401, 403)
        caught.value.close()
    await store.stop()


async def test_presigned_urls_name_the_public_endpoint(location: Any) -> None:
    store = S3Store(replace(location, public_endpoint="https://artifacts.example.com"))
    assert (await store.presign_get("a/b", 60)).startswith(f"https://artifacts.example.com/{location.bucket}/a/b?")
    upload = await store.start_multipart(f"contract/{secrets.token_hex(6)}", 5)
    assert upload.urls[0].startswith("https://artifacts.example.com/")
    await store.abort_multipart(upload.key, upload.upload_id)
    await store.stop()
    bare = S3Store(replace(location, public_endpoint="artifacts.example.com:9000"))
    assert (await bare.presign_get("a/b", 60)).startswith(f"http://artifacts.example.com:9000/{location.bucket}/a/b?")
    await bare.stop()


@pytest.mark.parametrize("wrong", [{"secret_key": "wrong-secret"}, {"access_key": "nobody"}])
async def test_a_wrong_key_is_forbidden(location: Any, wrong: dict[str, str]) -> None:
    store = S3Store(replace(location, **wrong))
    with pytest.raises(Forbidden):
        await store.put("contract/forbidden", b"x")
    with pytest.raises(Forbidden):
        await drain(store.get("contract/forbidden", sha256=None))
    with pytest.raises(Forbidden):
        _ = [entry async for entry in store.list("")]
    await store.stop()


async def test_a_bucket_that_is_not_there_is_the_operators_fault(location: Any) -> None:
    store = S3Store(replace(location, bucket=f"no-such-bucket-{secrets.token_hex(6)}"))
    with pytest.raises(Unavailable):
        await store.check()
    with pytest.raises(Unavailable):  # a put may make the bucket: SeaweedFS does
        _ = [entry async for entry in store.list("")]
    await store.stop()


async def test_a_server_that_is_away_is_unavailable(location: Any) -> None:
    store = S3Store(replace(location, endpoint="127.0.0.1:1"))
    calls: list[Callable[[], Any]] = [
        lambda: store.put("a", b"x"),
        lambda: store.put("a", stream(os.urandom(PART_SIZE))),
        lambda: drain(store.get("a", sha256=None)),
        lambda: store.stat("a"),
        lambda: store.delete("a"),
        lambda: store.start_multipart("a", 1),
    ]
    for call in calls:
        with pytest.raises(Unavailable):
            await call()
    await store.stop()


def test_no_secret_in_a_repr(location: Any) -> None:
    assert location.secret_key not in repr(location)
