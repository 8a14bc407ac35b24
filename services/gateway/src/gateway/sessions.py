"""Sessions of people in browsers: a signed cookie that stands for an API key and says nothing of it.

Nothing is kept here, so a session holds over restarts and on every gateway with the same secret; and the key is looked up at every
request, so a session ends when its key is revoked, changed or expires.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping

from servicekit.access import GATEWAY, Caller
from servicekit.errors import Unauthenticated

from gateway.access import AccessTable, KeySpec

_OVER_HTTP = "headrace_session"
_OVER_HTTPS = "__Host-headrace_session"
"""A browser takes this one only over https and from this very host."""

_LONGEST = 1024
_NO_SESSION = "this session is over: sign in again"


class Sessions:
    """Opens sessions and knows whose they are. A session is good until its time or its key's, whichever comes first."""

    def __init__(self, access: AccessTable, secret: bytes, ttl_s: float, now: Callable[[], float] = time.time) -> None:
        """`now` gives seconds since 1970. Raises ValueError for an empty secret."""
        if not secret:
            raise ValueError("sessions need a secret")
        self._access = access
        self._secret = secret
        self._ttl_s = ttl_s
        self._now = now

    def open(self, api_key: str) -> tuple[str, int]:
        """The session of the key's owner, and the seconds that it is good for. Raises Unauthenticated."""
        grant = self._access.identify(None, api_key.encode())
        key = self._access.valid(grant.key_id) if grant is not None else None
        if key is None:
            raise Unauthenticated("this API key is not known, or has expired")
        expires = int(min(self._now() + self._ttl_s, key.expires_at))
        name = base64.urlsafe_b64encode(key.key_id.encode()).decode()
        return f"{name}.{expires}.{self._signature(key, expires)}", int(expires - self._now())

    def caller(self, session: str) -> Caller:
        """Whose session this is. Raises Unauthenticated."""
        name, _, rest = session.partition(".")
        end, _, signature = rest.partition(".")
        if len(session) > _LONGEST or not session.isascii() or not end.isdecimal():
            raise Unauthenticated(_NO_SESSION)
        try:
            key = self._access.valid(base64.b64decode(name, altchars=b"-_", validate=True).decode())
        except (binascii.Error, UnicodeDecodeError):
            raise Unauthenticated(_NO_SESSION) from None
        if key is None or not hmac.compare_digest(signature, self._signature(key, int(end))) or self._now() >= int(end):
            raise Unauthenticated(_NO_SESSION)
        return Caller(GATEWAY, key.subject, key.roles)

    def _signature(self, key: KeySpec, expires: int) -> str:
        # The key's hash is in it, so that a session of one key is never one of another that got its id.
        told = f"headrace session 1\n{key.key_id}\n{key.hash}\n{expires}".encode()
        return hmac.new(self._secret, told, hashlib.sha256).hexdigest()


def of_cookies(headers: Mapping[str, str], *, https: bool) -> list[str]:
    """The sessions that a request carries. Where it is https for certain, a cookie without the name that only https can set is nobody's:
    a neighbour on the same domain may have set it."""
    names = (_OVER_HTTPS,) if https else (_OVER_HTTPS, _OVER_HTTP)
    pairs = [part.strip().partition("=") for part in headers.get("cookie", "").split(";")]
    return [value for wanted in names for name, _, value in pairs if name == wanted]


def cookie(session: str, seconds: int, *, https: bool) -> str:
    """The `Set-Cookie` that hands a session to a browser; `seconds` 0 takes it away."""
    name = _OVER_HTTPS if https else _OVER_HTTP
    return f"{name}={session}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{'; Secure' if https else ''}"


def derived_secret(secret: str) -> bytes:
    """A key for signing sessions, from a secret that serves another purpose; empty for an empty one."""
    return hmac.new(secret.encode(), b"headrace browser sessions", hashlib.sha256).digest() if secret else b""
