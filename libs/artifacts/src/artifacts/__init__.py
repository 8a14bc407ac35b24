"""The artifact store: hashed, streamed objects by key, on any S3 (`artifacts.s3`) or in memory (`artifacts.memory`)."""

from __future__ import annotations

from artifacts.port import (
    PART_SIZE,
    ArtifactStore,
    Entry,
    HashMismatch,
    Multipart,
    Part,
    S3Location,
    Source,
    Stored,
    check_key,
    check_sha256,
    part_size_for,
)

__all__ = [
    "PART_SIZE",
    "ArtifactStore",
    "Entry",
    "HashMismatch",
    "Multipart",
    "Part",
    "S3Location",
    "Source",
    "Stored",
    "check_key",
    "check_sha256",
    "part_size_for",
]
