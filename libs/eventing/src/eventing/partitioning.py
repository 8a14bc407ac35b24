"""Which partition a key belongs to: murmur2, as Kafka's own producers compute it, so that foreign tools agree with us."""

from __future__ import annotations

import struct
from functools import lru_cache

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


def murmur2(data: bytes) -> int:
    """Austin Appleby's MurmurHash2, 32 bits, with the seed that Kafka uses. Returns an unsigned number."""
    length = len(data)
    h = _SEED ^ length
    blocks = length // 4
    for k in struct.unpack_from(f"<{blocks}I", data):
        k = k * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    tail = data[blocks * 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=65536)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of `key` in a topic with so many partitions."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
