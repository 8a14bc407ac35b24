"""Run tokens: what a training script holds. Each is good for one attempt of one run until it expires; no database is asked."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from servicekit.errors import Unauthenticated

PREFIX = "hrr_"
"""How a run token begins; an API key begins with `hr_`."""


@dataclass(frozen=True, slots=True)
class RunToken:
    """What a valid token says."""

    run_id: str
    fencing_token: int
    expires_at: datetime


def issue(secret: str, run_id: str, fencing_token: int, expires_at: datetime) -> str:
    """A token for one attempt of a run: `hrr_<payload>.<HMAC-SHA256 of the payload>`, both base64url. `expires_at` is aware."""
    payload = json.dumps({"run": run_id, "fence": fencing_token, "exp": int(expires_at.timestamp())}, separators=(",", ":")).encode()
    return f"{PREFIX}{_encode(payload)}.{_encode(_mac(secret, payload))}"


def verify(secret: str, token: str, now: datetime) -> RunToken:
    """What the token says. Raises Unauthenticated when it is not a token, was not issued with this secret, or has expired."""
    payload_text, _, mac_text = token.removeprefix(PREFIX).partition(".")
    try:
        payload, mac = _decode(payload_text), _decode(mac_text)
    except (binascii.Error, ValueError):
        raise Unauthenticated("not a run token") from None
    if not token.startswith(PREFIX) or not hmac.compare_digest(mac, _mac(secret, payload)):
        raise Unauthenticated("not a run token")
    claims = json.loads(payload)
    expires_at = datetime.fromtimestamp(claims["exp"], UTC)
    if now >= expires_at:
        raise Unauthenticated("the run token has expired")
    return RunToken(run_id=claims["run"], fencing_token=claims["fence"], expires_at=expires_at)


def _mac(secret: str, payload: bytes) -> bytes:
    if not secret:
        raise ValueError("run tokens need a secret")
    return hmac.new(secret.encode(), payload, hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
