"""Which arm a request gets: at random, or by its caller, so that the same caller keeps the same arm."""

from __future__ import annotations

import random
import zlib

from gateway.routes import WHOLE, Arm, Route

_random = random.random


def pick(route: Route, subject: bytes, key: bytes) -> Arm:
    """The arm for one request. `subject` is the authenticated caller; `key` is X-Headrace-Key, which only refines the subject."""
    if route.single is not None:
        return route.single
    point: float = caller_point(route.hash_seed, subject, key) if route.by_caller else _random() * WHOLE
    for below, arm in route.thresholds:
        if point < below:
            return arm
    return route.thresholds[-1][1]


def caller_point(seed: int, subject: bytes, key: bytes) -> int:
    """Where a caller stands on the scale of 10,000, for the rollout that `seed` stands for.

    CRC-32 is linear: without a mixing step the places of all callers in two rollouts would differ by one constant, and the
    same callers would go first together again and again. The mixing is the finaliser of MurmurHash3 (public domain, Austin
    Appleby).
    """
    h = zlib.crc32(key, zlib.crc32(b"\0", zlib.crc32(subject, seed)))
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return h % WHOLE
