"""Where content lives that is addressed by its own hash: the same bytes are stored once, and a key can never mean other bytes."""

from __future__ import annotations

from artifacts.port import check_sha256

BLOBS = "blobs/sha256/"
"""The prefix of all blobs."""


def blob_key(sha256: str) -> str:
    """`blobs/sha256/ab/abcd...`: the key of the blob with this hash (64 lower-case hex digits). Raises Invalid."""
    check_sha256(sha256)
    return f"{BLOBS}{sha256[:2]}/{sha256}"
