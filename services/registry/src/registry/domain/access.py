"""API keys: whom one stands for, what it allows, until when. Only the hash of a key is known here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from registry.domain.errors import Malformed

PEOPLE = ("viewer", "editor", "approver", "admin")
ROLES = (*PEOPLE, "frontend")
"""`frontend` opens no call: it is for a program that stands before callers of its own, whom gateways then count by the names it gives."""

ALL_ENDPOINTS = "*"
MAX_ENDPOINTS = 100

_SUBJECT = re.compile(r"[A-Za-z0-9][-._@+A-Za-z0-9]{0,127}")
_ENDPOINT = re.compile(r"\*|[A-Za-z0-9][-._A-Za-z0-9]{0,127}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key at one revision. `subject` is the person or program it stands for; `expires_at` is None for never."""

    key_id: str
    revision: int
    hash: str
    subject: str
    roles: tuple[str, ...]
    inference_endpoints: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked: bool = False

    def good_at(self, now: datetime) -> bool:
        """Whether it opens anything at this time."""
        return not self.revoked and (self.expires_at is None or now < self.expires_at)

    def revoke(self) -> ApiKey:
        """The key at its next revision, revoked; itself when it is already."""
        return self if self.revoked else replace(self, revoked=True, revision=self.revision + 1)


def new_key(
    key_id: str, digest: str, subject: str, roles: Iterable[str], endpoints: Iterable[str], now: datetime, expires_at: datetime | None
) -> ApiKey:
    """A new key. Raises Malformed for a subject, role, endpoint or time that cannot be."""
    wanted, allowed = tuple(sorted(set(roles), key=_rank)), tuple(sorted(set(endpoints)))
    if not _SUBJECT.fullmatch(subject):
        raise Malformed("subject: 1 to 128 letters, digits and .-_@+, beginning with a letter or digit")
    unknown = [role for role in wanted if role not in ROLES]
    if unknown:
        raise Malformed(f"roles: {', '.join(unknown)} is unknown; known are {', '.join(ROLES)}")
    if not wanted and not allowed:
        raise Malformed("a key without a role and without an endpoint opens nothing")
    if len(allowed) > MAX_ENDPOINTS or not all(_ENDPOINT.fullmatch(endpoint) for endpoint in allowed):
        raise Malformed(f"inference_endpoints: names of endpoints or *, {MAX_ENDPOINTS} at most")
    if expires_at is not None and expires_at <= now:
        raise Malformed("expires_at: is in the past")
    return ApiKey(key_id, 1, digest, subject, wanted, allowed, now, expires_at)


def bootstrap_key(text: str, now: datetime) -> ApiKey:
    """The first admin key, from `<key id>:<sha256 hex of the key's text>`. Raises Malformed."""
    key_id, colon, digest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9]{1,64}", key_id) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise Malformed("the bootstrap key is written <key id>:<sha256 in hex>")
    return new_key(key_id, digest, "admin", PEOPLE, [ALL_ENDPOINTS], now, None)


def _rank(role: str) -> tuple[int, str]:
    return (ROLES.index(role) if role in ROLES else len(ROLES), role)
