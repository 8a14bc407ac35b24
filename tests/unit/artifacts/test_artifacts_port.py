"""Keys, hashes, part sizes, and how a stream is verified and cut."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence

import pytest
from artifacts import PART_SIZE, HashMismatch, check_key, part_size_for
from artifacts.blobs import blob_key
from artifacts.port import MAX_PARTS, verified
from artifacts.s3 import _in_parts
from hypothesis import given
from hypothesis import strategies as st
from servicekit.errors import Invalid, TooLarge

HASH = hashlib.sha256(b"x").hexdigest()


async def each(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def test_a_blob_is_named_by_its_hash() -> None:
    assert blob_key(HASH) == f"blobs/sha256/{HASH[:2]}/{HASH}"


@pytest.mark.parametrize("sha256", ["", HASH.upper(), HASH[1:], "../" + HASH[3:], HASH + "0"])
def test_what_is_no_hash_names_no_blob(sha256: str) -> None:
    with pytest.raises(Invalid):
        blob_key(sha256)


SEGMENTS = st.text(st.characters(exclude_characters="/\\", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


@given(st.lists(SEGMENTS, min_size=1, max_size=5))
def test_a_key_is_a_relative_path_of_plain_segments(segments: list[str]) -> None:
    if {".", ".."} & set(segments):
        with pytest.raises(Invalid):
            check_key("/".join(segments))
    else:
        check_key("/".join(segments))


@given(st.integers(0, 5 * 1024**4))
def test_parts_are_few_enough_and_large_enough(size: int) -> None:
    part_size = part_size_for(size)
    assert part_size >= PART_SIZE
    assert -(-size // part_size) <= MAX_PARTS


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(Invalid):
        part_size_for(-1)
    with pytest.raises(TooLarge):
        part_size_for(5 * 1024**4 + 1)


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 40))
async def test_a_stream_is_cut_into_parts_of_one_size(chunks: list[bytes], part_size: int) -> None:
    parts = [part async for part in _in_parts(each(chunks), part_size)]
    assert b"".join(parts) == b"".join(chunks)
    assert all(len(part) == part_size for part in parts[:-1])
    assert all(0 < len(part) <= part_size for part in parts)


@given(st.lists(st.binary(min_size=1, max_size=10), max_size=10), st.booleans())
async def test_the_last_chunk_leaves_only_when_all_is_right(chunks: list[bytes], right: bool) -> None:
    wanted = hashlib.sha256(b"".join(chunks)).hexdigest() if right else "0" * 64
    got: list[bytes] = []
    try:
        async for chunk in verified("a", each(chunks), wanted):
            got.append(chunk)
    except HashMismatch:
        assert not right
        assert got == chunks[:-1]
    else:
        assert right
        assert got == chunks
