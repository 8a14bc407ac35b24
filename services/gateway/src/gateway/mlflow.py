"""The door to MLflow's API and page: says who is calling, and passes requests and answers through to tracker and registry as they come.

Of a large body nothing is kept but the piece that is on its way, so an artifact of any size takes the memory of one piece.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote, unquote_to_bytes, urlencode

import aiohttp
from servicekit import access, errors, mlflow, telemetry
from servicekit.access import Caller
from servicekit.errors import DeadlineExceeded, HeadraceError, Invalid, NotFound, TooLarge, Unauthenticated, Unavailable
from servicekit.httpspans import server_span
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from gateway import browser, sessions, signin
from gateway.browser import Hosts
from gateway.page import Page
from gateway.server import ON_LOST
from gateway.sessions import Sessions

AJAX = ("/ajax-api/2.0/", "/ajax-api/3.0/")
PREFIXES = ("/api/2.0/", "/api/3.0/", *AJAX)
"""What begins so is MLflow's."""

OF_VERSION = "/model-versions/get-artifact"
"""A file of a model version: the registry knows where it is, and the tracker has it."""

BESIDE_PAGE = frozenset({"/graphql", "/get-artifact", OF_VERSION})
ALONE = BESIDE_PAGE | {"/version", "/health"}
"""What else MLflow's server answers beside its API: all but the last two for its page."""

PAGE = "/mlflow"
"""Where the page is served, and below it what the page asks for."""

_REGISTRY = re.compile(r"/(?:(?:ajax-)?api/2\.0/mlflow/(?:registered-models|model-versions|webhooks)(?:/|$)|model-versions/)")
_BYTES = re.compile(r"/(?:ajax-)?api/[23]\.0/mlflow-artifacts/|/(?:model-versions/)?get-artifact$")
"""Whose bodies or answers are files."""
_UPLOAD = re.compile(r"/(?:ajax-)?api/[23]\.0/mlflow-artifacts/|/ajax-api/2\.0/mlflow/upload-artifact$")
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})

# What a request and an answer say about themselves. All else is between a client and the gateway, or was never theirs to say.
_ASKED = frozenset(
    {"content-type", "content-length", "content-encoding", "accept", "accept-encoding", "range", "if-none-match", "if-match", "if-range",
     "x-headrace-filter"}
)  # fmt: skip
_ANSWERED = frozenset(
    {"content-type", "content-length", "content-encoding", "content-disposition", "content-range", "accept-ranges", "etag", "vary",
     "last-modified", "cache-control", "www-authenticate", "retry-after", "location", "x-content-type-options"}
)  # fmt: skip
_SETS = ("Content-Type", "User-Agent", "Accept", "Accept-Encoding")
"""What aiohttp adds unless told not to."""

_PIECE = 256 * 1024
_SMALL = 64 * 1024
_CONNECT_S = 5.0
_SILENT_S = 120.0
"""A service may take its time for an answer, but neither say nothing nor take nothing of a body for this long."""

# An answer of data that a cookie has opened is never a page with the rights of this one, whatever its content says it is.
_DATA = {"content-security-policy": "sandbox; default-src 'none'; frame-ancestors 'self'", "cache-control": "private, no-cache"}

Authenticate = Callable[[str], Caller]
"""API key or run token -> who it is. Raises Unauthenticated."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Bytes that a body may have: an artifact's, and any other's."""

    upload_bytes: int
    body_bytes: int


class MlflowDoor:
    """An ASGI application for the paths of MLflow. `close` it at the end."""

    def __init__(
        self,
        authenticate: Authenticate,
        sessions: Sessions,
        hosts: Hosts,
        page: Page | None,
        limits: DoorLimits,
        *,
        tracker: str,
        registry: str,
        service_token: str,
    ) -> None:
        """`tracker` and `registry` are their HTTP addresses, `host:port`. Connects at first use."""
        self._authenticate = authenticate
        self._sessions = sessions
        self._hosts = hosts
        self._page = page
        self._limits = limits
        self._tracker = f"http://{tracker}"
        self._registry = f"http://{registry}"
        self._token = f"Bearer {service_token}"
        self._calls: aiohttp.ClientSession | None = None
        self._files: aiohttp.ClientSession | None = None

    def before(self, app: ASGIApp) -> ASGIApp:
        """`app` with this door in it: what is not MLflow's goes on to `app`.

        Clients print links to the page as if it were at the root; a browser keeps what stands behind the # of such a link on its way.
        """

        async def both(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == "/" and scope["method"] in browser.SAFE:
                await RedirectResponse(f"{PAGE}/", 307)(scope, receive, send)
                return
            await (self if scope["type"] == "http" and _is_mine(scope["path"]) else app)(scope, receive, send)

        return both

    def streamed_body(self, method: bytes, path: bytes, headers: Mapping[bytes, bytes]) -> int | None:
        """A gateway.plane.StreamedBody: bodies of artifacts may be large when their sender shows a key or run token."""
        text = unquote(path.decode("latin-1"))
        if not _is_mine(text):
            return None
        if method not in (b"PUT", b"POST") or _UPLOAD.match(text) is None:
            return 0
        try:
            secret = _secret({name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()})
            if secret is None:
                return 0
            self._authenticate(secret)
        except Unauthenticated:
            return 0
        return self._limits.upload_bytes

    async def close(self) -> None:
        for session in (self._calls, self._files):
            if session is not None:
                await session.close()
        self._calls = self._files = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. An error after the answer has begun is raised, so that the server cuts the connection."""
        begun = False
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        below_page = scope["path"] == PAGE or scope["path"].startswith(f"{PAGE}/")
        browsing = below_page or "cookie" in headers or "sec-fetch-mode" in headers

        async def watched(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                answered.status = message["status"]
                if browsing:
                    message = {**message, "headers": _guarded(message["headers"])}
            await send(message)

        try:
            with server_span(scope, "") as answered, _until_lost(scope) as left:
                try:
                    request = _Request(scope["method"], _path(scope["raw_path"]), headers, scope, receive)
                    if below_page:
                        response = await self._below_page(request, watched)
                    else:
                        response = await self._beside_page(request, watched)
                    if response is not None:
                        await response(scope, receive, watched)
                except Exception as error:
                    raise errors.explain(error) from error
        except HeadraceError as error:
            if begun:
                raise
            await _told(error, browsing=browsing)(scope, receive, send)
        except asyncio.CancelledError:
            if not left():
                raise

    async def _beside_page(self, request: _Request, send: Send) -> Response | None:
        """Clients of the API, and what a page elsewhere on this host may ask of it."""
        secret = _secret(request.headers)
        if secret is not None:
            caller = self._authenticate(secret)
        elif request.path.startswith(AJAX):
            caller = self._signed_in(request)
        else:
            raise _no_key()
        await self._pass(request, request.path, caller, send)
        return None

    async def _below_page(self, request: _Request, send: Send) -> Response | None:
        """The page and what it asks for."""
        rest = request.path.removeprefix(PAGE)
        site = self._hosts.site(request.headers)
        if rest in ("/sign-in", "/sign-out"):
            browser.check(site, request.method, request.headers)
            return await (self._sign_in if rest == "/sign-in" else self._sign_out)(request, https=site.https)
        secret = _secret(request.headers)
        try:
            caller = self._authenticate(secret) if secret is not None else self._signed_in(request)
        except Unauthenticated:
            if rest in ("", "/") and request.method in browser.SAFE and secret is None:
                return RedirectResponse(f"{PAGE}/sign-in", 303, {"cache-control": "no-store"})
            raise
        if rest in BESIDE_PAGE or rest.startswith(AJAX):
            await self._pass(request, rest, caller, send)
            return None
        if request.method not in browser.SAFE:
            raise NotFound(f"there is no {request.method} here")
        if rest == "":
            return RedirectResponse(f"{PAGE}/", 308)
        if self._page is None:
            return signin.no_page()
        file = "index.html" if rest == "/" else rest.removeprefix("/static-files/")
        return await self._page.answer(file, request.headers) or mlflow.missing()

    def _signed_in(self, request: _Request) -> Caller:
        """Who has signed in by a cookie, once it is certain that they ask themselves. Raises Unauthenticated, Forbidden, Invalid."""
        if "cookie" not in request.headers:
            raise _no_key()
        site = self._hosts.site(request.headers)
        known: Caller | None = None
        for session in sessions.of_cookies(request.headers, https=site.https):
            try:
                known = self._sessions.caller(session)
                break
            except Unauthenticated:
                continue
        if known is None:
            raise Unauthenticated("this session is over: sign in again")
        browser.check(site, request.method, request.headers)
        browser.check_json(request.method, request.headers)
        return known

    async def _sign_in(self, request: _Request, *, https: bool) -> Response:
        if request.method in browser.SAFE:
            return signin.form()
        if request.method != "POST":
            raise NotFound(f"there is no {request.method} here")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            raise Invalid("the form was not sent as a form")
        fields = parse_qs((await request.whole(signin.MAX_FORM_BYTES)).decode("latin-1"), max_num_fields=8)
        try:
            session, seconds = self._sessions.open(fields.get("key", [""])[-1].strip())
        except Unauthenticated as error:
            return signin.form(error.message)
        headers = {"set-cookie": sessions.cookie(session, seconds, https=https), "cache-control": "no-store"}
        return RedirectResponse(f"{PAGE}/", 303, headers)

    async def _sign_out(self, request: _Request, *, https: bool) -> Response:
        if request.method in browser.SAFE:
            return signin.leaving()
        if request.method != "POST":
            raise NotFound(f"there is no {request.method} here")
        headers = {"set-cookie": sessions.cookie("", 0, https=https), "cache-control": "no-store"}
        return RedirectResponse(f"{PAGE}/sign-in", 303, headers)

    async def _pass(self, request: _Request, path: str, caller: Caller, send: Send) -> None:
        """Asks the service for `path`, as the gateway, for `caller`, and hands its answer on."""
        query = request.scope["query_string"].decode("latin-1")
        if path == OF_VERSION:
            path, query = await self._of_version(request, query, caller)
        await self._pass_to(request, path, query, caller, send)

    async def _of_version(self, request: _Request, query: str, caller: Caller) -> tuple[str, str]:
        """Where the tracker has a file of a model version: path and query. Raises what the registry told, NotFound, Invalid."""
        if request.method not in browser.SAFE:
            raise NotFound(f"there is no {request.method} here")
        asked = parse_qs(query, keep_blank_values=True, max_num_fields=8)
        name, version, file = (asked.get(field, [""])[-1] for field in ("name", "version", "path"))
        if not (name and version and file):
            raise Invalid("name, version and path are needed, each once")
        where = URL(f"{self._registry}/api/2.0/mlflow/model-versions/get-download-uri").with_query({"name": name, "version": version})
        try:
            async with asyncio.timeout(_SILENT_S), self._session(files=False).get(where, headers=self._headers({}, caller)) as answer:
                told = await answer.json(content_type=None)
        except TimeoutError as error:
            raise DeadlineExceeded(errors.FOREIGN_SENTENCES[DeadlineExceeded], detail=str(error)) from error
        except (aiohttp.ClientError, ValueError) as error:
            raise Unavailable(errors.FOREIGN_SENTENCES[Unavailable], detail=str(error)) from error
        if answer.status == 404:
            raise NotFound(told.get("message", "there is no such version"))
        if answer.status != 200:
            raise Invalid(told.get("message", "the registry does not say where this version is"))
        return _stored_at(told["artifact_uri"], file)

    async def _pass_to(self, request: _Request, path: str, query: str, caller: Caller, send: Send) -> None:
        if request.method not in _METHODS:
            raise NotFound(f"there is no {request.method} here")
        files = _BYTES.match(path) is not None
        limit = self._limits.upload_bytes if _UPLOAD.match(path) else self._limits.body_bytes
        if int(request.headers.get("content-length", 0)) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        service = self._registry if _REGISTRY.match(path) else self._tracker
        # Written anew from what was read of it: the service reads what was looked at here.
        target = URL(f"{service}{quote(path, safe=_PLAIN)}{'?' if query else ''}{query}", encoded=True)
        try:
            async with (
                asyncio.timeout(None) as patience,
                self._session(files=files).request(
                    request.method,
                    target,
                    headers=self._headers(request.headers, caller),
                    data=await request.body(patience),
                    allow_redirects=False,
                ) as answer,
            ):
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

    def _headers(self, given: Mapping[str, str], caller: Caller) -> dict[str, str]:
        headers = {name: value for name, value in given.items() if name in _ASKED}
        headers[access.AUTHORIZATION] = self._token
        headers |= dict(access.identity_metadata(caller))
        if trace := telemetry.current_traceparent():
            headers["traceparent"] = trace
        return headers

    def _session(self, *, files: bool) -> aiohttp.ClientSession:
        """Files have connections of their own, so that many long ones do not keep the short requests waiting."""
        if files:
            self._files = self._files or _session(1024)
            return self._files
        self._calls = self._calls or _session(256)
        return self._calls


@dataclass(frozen=True, slots=True)
class _Request:
    """A request: its path as it was read, its headers by their names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    scope: Scope
    receive: Receive

    async def body(self, patience: asyncio.Timeout) -> bytes | AsyncIterator[bytes] | None:
        """The body: whole when it is small, else in pieces while they come; `patience` ends when nobody takes the next of them."""
        length = self.headers.get("content-length")
        if length is None and "transfer-encoding" not in self.headers:
            return None
        if length is not None and int(length) <= _SMALL:
            return await self.whole(_SMALL)
        return self._taken(patience)

    async def whole(self, limit: int) -> bytes:
        """The body at once. Raises TooLarge."""
        parts: list[bytes] = []
        size = 0
        async for piece in self._pieces():
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            parts.append(piece)
        return b"".join(parts)

    async def _taken(self, patience: asyncio.Timeout) -> AsyncIterator[bytes]:
        # aiohttp's own limits count from the end of the body.
        loop = asyncio.get_running_loop()
        async for piece in self._pieces():
            patience.reschedule(loop.time() + _SILENT_S)
            yield piece
            patience.reschedule(None)

    async def _pieces(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message: Mapping[str, Any] = await self.receive()
            if message["type"] == "http.disconnect":
                raise Unavailable("the client went away")
            more = message.get("more_body", False)
            if piece := message.get("body", b""):
                yield piece


def _session(connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S),
        skip_auto_headers=_SETS,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


_PLAIN = "/:@!$&'()*+,;=-._~"
"""What stands in a path as it is."""


_UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f\\]|(?:^|/)\.\.?(?:/|$)")


def _stored_at(uri: str, file: str) -> tuple[str, str]:
    """Path and query by which the tracker hands out a file of what a version was made from. Raises NotFound, Invalid."""
    if _UNSPEAKABLE.search(file) or file.startswith("/"):
        raise Invalid("the path of the file holds . or .. as a part, a backslash or a control character, or begins with /")
    scheme, _, rest = uri.partition(":")
    rest = rest.strip("/")
    if scheme == "models":
        return f"/api/2.0/mlflow/logged-models/{rest}/artifacts/files", urlencode({"artifact_file_path": file})
    if scheme == "runs":
        run_id, _, folder = rest.partition("/")
        return "/get-artifact", urlencode({"run_uuid": run_id, "path": f"{folder}/{file}" if folder else file})
    if scheme == "mlflow-artifacts":
        return f"/api/2.0/mlflow-artifacts/artifacts/{rest}/{file}", ""
    raise NotFound("this version has no files")


def _is_mine(path: str) -> bool:
    return path.startswith(PREFIXES) or path in ALONE or path == PAGE or path.startswith(f"{PAGE}/")


def _path(raw: bytes) -> str:
    """The path that a request means, read once. Raises Invalid for one that somebody behind could read differently."""
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise Invalid("the path is not UTF-8") from None
    if _UNSPEAKABLE.search(path):
        raise Invalid("the path holds . or .. as a part, a backslash or a control character")
    return path


@contextmanager
def _until_lost(scope: Scope) -> Iterator[Callable[[], bool]]:
    """Cancels the task of the block when the client goes; what is given says whether it has."""
    lost = False
    task = asyncio.current_task()
    extension = scope.get("extensions", {}).get(ON_LOST)

    def gone() -> None:
        nonlocal lost
        lost = True
        if task is not None:
            task.cancel()

    if extension is not None:
        extension["tell"](gone)
    yield lambda: lost


def _guarded(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of an answer to a browser: with those that protect its user, where they are not there already."""
    there = {name.lower() for name, _ in headers}
    more = browser.HEADERS | _DATA
    return [*headers, *((name.encode(), value.encode()) for name, value in more.items() if name.encode() not in there)]


def _told(error: HeadraceError, *, browsing: bool) -> Response:
    response = mlflow.told(error)
    if browsing:
        if "www-authenticate" in response.headers:
            # A browser would open a window of its own for Basic.
            response.headers["www-authenticate"] = 'Bearer realm="headrace"'
        response.headers.update(browser.HEADERS | _DATA)
    return response


def _no_key() -> Unauthenticated:
    return Unauthenticated("an API key is required: set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


def _secret(headers: Mapping[str, str]) -> str | None:
    """The API key or run token: a bearer token (MLFLOW_TRACKING_TOKEN), or the password of basic authentication
    (MLFLOW_TRACKING_PASSWORD; the name beside it is not looked at). None when there is neither. Raises Unauthenticated."""
    authorization = headers.get("authorization")
    if authorization is None:
        key = headers.get("x-api-key")
        return None if key is None else key.strip()
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":
        return _password(given.strip())
    raise Unauthenticated("keys come as a bearer token or as the password of basic authentication")


def _password(encoded: str) -> str:
    try:
        _, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthenticated("this is not basic authentication") from None
    return password
