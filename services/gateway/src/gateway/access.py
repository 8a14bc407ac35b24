"""Who may call: the table of API keys, built from the registry's snapshots. What no key allows is denied."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

ALL_ENDPOINTS = "*"
OVERRIDE_ROLES = frozenset({"admin", "editor"})
"""Who may choose the arm by X-Headrace-Arm."""

NAMING_ROLES = frozenset({"frontend"})
"""Whose X-Headrace-Key names callers that count as evidence. No other role holds it: it is a program's, and asked for by name."""

CACHED_CREDENTIALS = 4096
LONGEST_CACHED = 256
"""Bytes of a header's value: a key with much space before it is not worth keeping."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A snapshot of one API key. `hash`: SHA-256 of its whole text in hex; `expires_at`: seconds since 1970."""

    key_id: str
    revision: int
    hash: str = ""
    subject: str = ""
    roles: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    expires_at: float = math.inf
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What a key that was just presented allows."""

    key_id: str
    subject: str
    roles: frozenset[str]
    endpoints: frozenset[str]
    expires_at: float
    subject_bytes: bytes = field(default=b"", repr=False)

    def may_infer(self, endpoint: str) -> bool:
        return endpoint in self.endpoints or ALL_ENDPOINTS in self.endpoints

    @property
    def may_choose_arm(self) -> bool:
        return not self.roles.isdisjoint(OVERRIDE_ROLES)

    @property
    def may_name_callers(self) -> bool:
        return not self.roles.isdisjoint(NAMING_ROLES)


class AccessTable:
    """All keys. The highest revision of each wins; a revoked key stays known as revoked, so that no older snapshot revives it."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """`now` gives seconds since 1970, against which keys expire."""
        self._now = now
        self._keys: dict[str, KeySpec] = {}
        self._by_hash: dict[str, Grant] = {}
        self._cache: dict[bytes, Grant] = {}

    def apply(self, key: KeySpec) -> bool:
        """Takes a snapshot in. True when it is new, so that it should be kept."""
        known = self._keys.get(key.key_id)
        if known is not None:
            if key.revision <= known.revision:
                return False
            self._by_hash.pop(known.hash, None)
        self._keys[key.key_id] = key
        if not key.revoked and key.hash:
            self._by_hash[key.hash] = Grant(
                key.key_id, key.subject, key.roles, key.endpoints, key.expires_at, key.subject.encode("utf-8", "surrogateescape")
            )
        self._cache.clear()
        return True

    def valid(self, key_id: str) -> KeySpec | None:
        """The key of this id; None when it is unknown, revoked or expired."""
        key = self._keys.get(key_id)
        return None if key is None or key.revoked or not key.hash or self._now() >= key.expires_at else key

    def identify(self, authorization: bytes | None, api_key: bytes | None) -> Grant | None:
        """The grant of the key in `Authorization: Bearer hr_...` or `X-API-Key: hr_...`; None when it is unknown, expired or missing.

        The text of a key that was recognised is kept in memory, in a bounded cache, until the table changes.
        """
        presented = authorization or api_key
        if presented is None:
            return None
        grant = self._cache.get(presented)
        if grant is None:
            secret = _bearer(authorization) if authorization is not None else None
            if secret is None:
                secret = api_key
            if secret is None:
                return None
            grant = self._by_hash.get(hashlib.sha256(secret).hexdigest())
            if grant is None:
                return None
            # What was presented in a header that was not read must not stand for the key.
            if secret is api_key:
                presented = api_key
            if len(presented) <= LONGEST_CACHED:
                if len(self._cache) >= CACHED_CREDENTIALS:
                    self._cache.clear()
                self._cache[presented] = grant
        if grant.expires_at != math.inf and self._now() >= grant.expires_at:
            return None
        return grant


def _bearer(authorization: bytes) -> bytes | None:
    scheme, _, secret = authorization.partition(b" ")
    secret = secret.strip()
    return secret if scheme.lower() == b"bearer" and secret.startswith(b"hr_") else None
