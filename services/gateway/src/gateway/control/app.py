"""Puts the control-plane API together: one span per request, authentication before everything, one error table, the routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from servicekit import errors, rpc
from servicekit.access import Caller, as_caller
from servicekit.httpspans import server_span
from starlette.exceptions import HTTPException

from gateway.control import deliveries, models, operations, rollouts, runs, traces, trainings

if TYPE_CHECKING:
    from fastapi import Request
    from fastapi.telemetry import TelemetryConfig
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gateway.control.peers import Peers
    from gateway.control.traces import SpanSource

_PREFIX = "/api/v1"
_OPENAPI = f"{_PREFIX}/openapi.json"

_NOT_ITS_OWN: TelemetryConfig = {"tracing": False, "logs": False}
"""FastAPI's own spans hold paths and query strings, its logs what exceptions say; its metrics name routes only, and stay."""

_VIOLATIONS = 20
"""So many wrong fields of a body are told at once."""

Authenticate = Callable[[str], Caller]
"""Bearer token -> who it is. Raises Unauthenticated."""


def create_app(peers: Peers, authenticate: Authenticate, spans: SpanSource | None) -> FastAPI:
    """The API as an ASGI application. Nothing but its own description is answered without a valid key or run token.

    Who may do what is decided by the services themselves, each by its access table: the caller's identity goes with every call.
    """
    app = FastAPI(title="Headrace", version="1", docs_url=None, redoc_url=None, openapi_url=_OPENAPI, telemetry=_NOT_ITS_OWN)
    app.state.peers = peers
    app.state.spans = spans
    for router in (runs.router, trainings.router, deliveries.router, models.router, rollouts.router, operations.router, traces.router):
        app.include_router(router, prefix=_PREFIX)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()[:_VIOLATIONS]
        violations = [errors.Violation(".".join(map(str, problem["loc"][1:])) or "body", problem["msg"]) for problem in problems]
        return JSONResponse(errors.http_body(errors.Invalid("the request is not as it should be", violations)), status_code=400)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            told: errors.Invalid = errors.NotFound(f"there is no {request.method} {request.url.path}")
        else:
            told = errors.Invalid(error.detail)
        return JSONResponse(errors.http_body(told), status_code=error.status_code, headers=error.headers)

    app.add_middleware(_Boundary, authenticate=authenticate)
    return app


class _Boundary:
    """The entry point: traces the request, knows who is calling, acts for them towards the services, and turns every error into HTTP."""

    def __init__(self, app: ASGIApp, authenticate: Authenticate) -> None:
        self._app = app
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _OPENAPI:
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                answered.status = message["status"]
            await send(message)

        try:
            with server_span(scope, _PREFIX) as answered:
                try:
                    caller = self._authenticate(_bearer(scope))
                    with as_caller(caller), rpc.acting_for(caller):
                        await self._app(scope, receive, watched)
                except Exception as error:  # explained within the span, so that span, log and answer name the same error
                    raise errors.explain(_told(error)) from error
        except errors.HeadraceError as error:
            if begun:  # too late for a status: the connection is cut instead, so that nobody takes half an answer for a whole one
                raise
            status, body = errors.http_error(error)
            headers = {"www-authenticate": "Bearer"} if status == 401 else {}
            await JSONResponse(body, status_code=status, headers=headers)(scope, receive, send)


def _told(error: Exception) -> Exception:
    """JSON has numbers and texts that protobuf has not: those are the request's fault, not ours."""
    if isinstance(error, UnicodeEncodeError):
        return errors.Invalid("a text of the request holds half a surrogate pair")
    if isinstance(error, ValueError) and str(error).startswith("Value out of range"):
        return errors.Invalid(f"a number of the request is too large: {str(error)[:100]}")
    return error


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return str(token.strip())
        if name == b"x-api-key":
            return str(value.decode("latin-1").strip())
    raise errors.Unauthenticated("an API key is required: Authorization: Bearer hr_...")
