"""The port: what every artifact store can do, the values it speaks in, and the rules for keys and hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from servicekit.errors import Invalid, TooLarge

PART_SIZE = 8 * 1024 * 1024
"""Bytes in a part of an upload, and at most two of them in memory. S3 wants 5 MiB or more, and 10,000 parts or less."""

MAX_PARTS = 10_000

CHUNK_SIZE = 1024 * 1024
"""Bytes that are read at a time."""

Source = AsyncIterator[bytes] | bytes | Path
"""What can be stored: a stream of chunks of any size, bytes, or a file."""


class HashMismatch(Invalid):
    """The bytes are not those that were asked for or announced. Trying again does not help: something stored them wrong."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was stored: size in bytes, SHA-256 in hex."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as the store describes it. `sha256` is what was recorded when it was put; None if nothing was, and in listings."""

    key: str
    size: int
    modified_at: datetime
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part that a client uploaded: its number from 1 on, and the ETag that the store answered."""

    number: int
    etag: str


@dataclass(frozen=True, slots=True)
class Multipart:
    """An upload that a client makes by itself: one PUT to each URL, of `part_size` bytes each, the last one of what is left."""

    key: str
    upload_id: str
    part_size: int
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class S3Location:
    """An S3 server, `host:port`, and a bucket on it. `public_endpoint` is how clients reach it, for presigned URLs: `host:port`,
    or with a scheme when that differs from `secure`."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    secure: bool = False
    public_endpoint: str | None = None
    region: str = "us-east-1"


class ArtifactStore(Protocol):
    """Objects by key. Keys are relative paths; a put replaces the object as a whole, and readers see the old or the new one.

    Everywhere: NotFound when there is no such object, Forbidden when the store refuses our key, Unavailable when it does not
    answer, Invalid for a malformed key. Nothing blocks the event loop. All may be repeated.
    """

    async def put(self, key: str, source: Source, *, sha256: str | None = None, record: bool = True) -> Stored:
        """Stores a source in constant memory and records its hash.

        With `sha256` it raises HashMismatch when the source has another hash, and leaves nothing behind; what was at the key
        before stays. A stream is consumed, so the caller must make a new one to repeat. TooLarge beyond 80 GB of stream.
        A stream without `sha256` has 5 GiB at most, and is copied once within the store so that its hash stands with it; `record`
        False is for who keeps the answered hash: nothing is copied, and it may have 80 GB.
        """
        ...

    def get(self, key: str, *, sha256: str | None) -> AsyncGenerator[bytes, None]:
        """The object's bytes in chunks, in constant memory, verified against `sha256`, or against the recorded hash when that is None.

        Raises HashMismatch before the last chunk is released, so that whoever has read to the end has read the right bytes;
        what came before must not be acted upon until then. With None and nothing recorded it raises at once. Close the
        iterator (`contextlib.aclosing`) when you leave early.
        """
        ...

    async def read(self, key: str, *, sha256: str | None, max_bytes: int) -> bytes:
        """The whole object, verified as by `get`. Raises TooLarge when it has more than `max_bytes`."""
        ...

    async def download(self, key: str, path: Path, *, sha256: str | None) -> None:
        """Writes the object to a file, verified as by `get`: the file appears complete or not at all. OSError when the disk is full."""
        ...

    async def digest(self, key: str) -> Stored:
        """Reads the object through and tells its size and hash: for objects that somebody else uploaded."""
        ...

    def list(self, prefix: str) -> AsyncIterator[Entry]:
        """All objects whose key begins with `prefix` ("" for all), by key; those put or deleted meanwhile may be there or not."""
        ...

    async def stat(self, key: str) -> Entry:
        """What the store knows about the object, without reading it."""
        ...

    async def delete(self, key: str) -> None:
        """Deletes the object; no error when there is none."""
        ...

    async def copy(self, src: str, dst: str, *, sha256: str | None = None) -> None:
        """Copies within the store, with the recorded hash, or recording `sha256` (not verified: see `digest`)."""
        ...

    async def presign_get(self, key: str, expires_s: int) -> str:
        """A URL from which anyone can GET the object for `expires_s` seconds. Does not ask whether it exists."""
        ...

    async def presign_put(self, key: str, expires_s: int) -> str:
        """A URL to which anyone can PUT one object of 5 GB at most for `expires_s` seconds. No hash is recorded: see `digest`."""
        ...

    async def start_multipart(self, key: str, size: int, *, count: int | None = None, expires_s: int = 3600) -> Multipart:
        """Begins an upload of `size` bytes that a client makes by itself, and gives it a URL for each part.

        With `count` the client cuts as many parts as it likes, of sizes of its own, and `size` is not looked at. Raises Invalid for
        a count that is not 1 to MAX_PARTS.
        """
        ...

    async def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> Entry:
        """Makes the object of its parts. No hash is recorded: see `digest`. Raises Invalid when a part is missing or not the one named,
        NotFound when the upload is not (any longer) open."""
        ...

    async def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drops an upload and its parts; no error when it is gone."""
        ...


_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_key(key: str) -> None:
    """Raises Invalid unless the key is a relative path of plain segments: no empty, `.` or `..` segment, no control character."""
    segments = key.split("/")
    if not key or len(key.encode()) > 1024 or any(s in ("", ".", "..") for s in segments) or any(ord(c) < 32 or c in "\\\x7f" for c in key):
        raise Invalid(f"{key!r} is not a key of an artifact")


def check_prefix(prefix: str) -> None:
    """Raises Invalid unless some key can begin so."""
    if prefix:
        check_key(prefix.removesuffix("/"))


def check_sha256(sha256: str) -> None:
    """Raises Invalid unless it is written like a SHA-256: 64 lower-case hex digits."""
    if not _SHA256.fullmatch(sha256):
        raise Invalid(f"{sha256!r} is not a SHA-256 in lower-case hex")


def part_size_for(size: int) -> int:
    """The part size with which `size` bytes make 10,000 parts at most. Raises Invalid, TooLarge beyond S3's 5 TiB."""
    if size < 0:
        raise Invalid("a size is not negative")
    if size > 5 * 1024**4:
        raise TooLarge("an object has 5 TiB at most")
    least = -(-size // MAX_PARTS)
    return max(PART_SIZE, -(-least // CHUNK_SIZE) * CHUNK_SIZE)


def parts_of(size: int, count: int | None) -> tuple[int, int]:
    """The part size of an upload, and how many parts it has. Raises Invalid, TooLarge."""
    if count is None:
        part_size = part_size_for(size)
        return part_size, max(1, -(-size // part_size))
    if not 1 <= count <= MAX_PARTS:
        raise Invalid(f"an upload has 1 to {MAX_PARTS} parts, not {count}")
    return PART_SIZE, count


def expect(key: str, wanted: str | None, computed: str) -> None:
    """Raises HashMismatch when a hash is wanted and another was computed."""
    if wanted is not None and wanted != computed:
        raise HashMismatch(f"{key} has the SHA-256 {computed}, not {wanted}")


async def verified(key: str, chunks: AsyncIterator[bytes], sha256: str | None) -> AsyncGenerator[bytes, None]:
    """Passes chunks on one behind, so that the last leaves only when the hash of all is right; see ArtifactStore.get."""
    digest = hashlib.sha256()
    held: bytes | None = None
    async for chunk in chunks:
        if held is not None:
            yield held
        digest.update(chunk)
        held = chunk
    expect(key, sha256, digest.hexdigest())
    if held is not None:
        yield held
