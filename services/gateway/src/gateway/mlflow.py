"""The door to MLflow's REST API: says who is calling, and passes requests and answers through to tracker and registry as they come.

Nothing is read of a body here and nothing is kept, so an artifact of any size takes the memory of one piece of it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import aiohttp
from servicekit import access, errors, mlflow, telemetry
from servicekit.access import Caller
from servicekit.errors import DeadlineExceeded, HeadraceError, NotFound, Unauthenticated, Unavailable
from servicekit.httpspans import server_span
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

PREFIXES = ("/api/2.0/", "/api/3.0/", "/ajax-api/2.0/", "/ajax-api/3.0/")
"""What begins so is MLflow's."""

_REGISTRY = re.compile(r"/(?:ajax-)?api/2\.0/mlflow/(?:registered-models|model-versions|webhooks)(?:/|$)")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})

# What a request and an answer say about themselves. All else is between a client and the gateway, or was never theirs to say.
_ASKED = frozenset({"content-type", "content-length", "content-encoding", "accept", "range", "if-none-match", "if-match"})
_ANSWERED = frozenset(
    {"content-type", "content-length", "content-encoding", "content-disposition", "content-range", "accept-ranges", "etag",
     "cache-control", "www-authenticate", "location", "x-content-type-options"}
)  # fmt: skip

_PIECE = 256 * 1024
_CONNECT_S = 5.0
_SILENT_S = 120.0
"""A service may take its time for an answer, but not say nothing for this long."""

Authenticate = Callable[[str], Caller]
"""API key or run token -> who it is. Raises Unauthenticated."""


class MlflowDoor:
    """An ASGI application for the paths of `PREFIXES`. `close` it at the end."""

    def __init__(self, authenticate: Authenticate, *, tracker: str, registry: str, service_token: str) -> None:
        """`tracker` and `registry` are their HTTP addresses, `host:port`. Connects at first use."""
        self._authenticate = authenticate
        self._tracker = URL(f"http://{tracker}")
        self._registry = URL(f"http://{registry}")
        self._token = service_token
        self._session: aiohttp.ClientSession | None = None

    def before(self, app: ASGIApp) -> ASGIApp:
        """`app` with this door in it: what is not MLflow's goes on to `app`."""

        async def both(scope: Scope, receive: Receive, send: Send) -> None:
            mine = scope["type"] == "http" and scope["path"].startswith(PREFIXES)
            await (self if mine else app)(scope, receive, send)

        return both

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. An error after the answer has begun is raised, so that the server cuts the connection."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                answered.status = message["status"]
            await send(message)

        try:
            with server_span(scope, "") as answered:
                try:
                    await self._pass(scope, receive, watched)
                except Exception as error:
                    raise errors.explain(error) from error
        except HeadraceError as error:
            if begun:
                raise
            await mlflow.told(error)(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = self._authenticate(_secret(scope["headers"]))
        if scope["method"] not in _METHODS:
            raise NotFound(f"there is no {scope['method']} here")
        raw = scope["raw_path"].decode("latin-1")
        query = scope["query_string"].decode("latin-1")
        service = self._registry if _REGISTRY.match(scope["path"]) else self._tracker
        target = service.join(URL(f"{raw}?{query}" if query else raw, encoded=True))
        headers = self._headers(scope["headers"], caller)
        has_body = "content-length" in headers or any(name == b"transfer-encoding" for name, _ in scope["headers"])
        if self._session is None:
            self._session = _session()
        try:
            async with self._session.request(
                scope["method"], target, headers=headers, data=_body(receive) if has_body else None, allow_redirects=False
            ) as answer:
                kept = [
                    (name.lower().encode("latin-1"), value.encode("latin-1"))
                    for name, value in answer.headers.items()
                    if name.lower() in _ANSWERED
                ]
                await send({"type": "http.response.start", "status": answer.status, "headers": kept})
                async for piece in answer.content.iter_chunked(_PIECE):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError as error:
            raise DeadlineExceeded(errors.FOREIGN_SENTENCES[DeadlineExceeded], detail=str(error)) from error
        except aiohttp.ClientError as error:
            raise Unavailable(errors.FOREIGN_SENTENCES[Unavailable], detail=str(error)) from error

    def _headers(self, given: Iterable[tuple[bytes, bytes]], caller: Caller) -> dict[str, str]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in given if name.decode("latin-1") in _ASKED}
        headers[access.AUTHORIZATION] = f"Bearer {self._token}"
        headers |= dict(access.identity_metadata(caller))
        if trace := telemetry.current_traceparent():
            headers["traceparent"] = trace
        return headers


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=256, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message: Mapping[str, Any] = await receive()
        if message["type"] == "http.disconnect":
            raise Unavailable("the client went away")
        more = message.get("more_body", False)
        if piece := message.get("body", b""):
            yield piece


def _secret(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The API key or run token: a bearer token (MLFLOW_TRACKING_TOKEN), or the password of basic authentication
    (MLFLOW_TRACKING_PASSWORD; the name beside it is not looked at). Raises Unauthenticated."""
    for name, value in headers:
        if name == b"x-api-key":
            return value.decode("latin-1").strip()
        if name == b"authorization":
            scheme, _, given = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return given.strip()
            if scheme.lower() == "basic":
                return _password(given.strip())
    raise Unauthenticated("an API key is required: set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


def _password(encoded: str) -> str:
    try:
        _, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthenticated("this is not basic authentication") from None
    return password
