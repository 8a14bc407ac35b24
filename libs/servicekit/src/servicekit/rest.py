"""An HTTP API of a service, which only other services reach: people come to it through the gateway.

It is a table of endpoints, each with the rule of who may call it. What is not in the table is denied, and how errors read is for the
protocol that is spoken: this module knows none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from servicekit import access, errors
from servicekit.access import Rule
from servicekit.errors import DeadlineExceeded, Forbidden, HeadraceError
from servicekit.httpspans import server_span

DEADLINE_S = 60.0
"""A request is worked on for this long, unless its endpoint says otherwise."""

Handle = Callable[[Request], Awaitable[Response]]
"""Answers a request. May raise any error of servicekit.errors; `servicekit.access.current_caller` says who asks."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation: methods and path template (`/runs/{run_id}`, `{path:path}` for the rest of a path), who may call it, what does it.

    `deadline_s` None is for an answer that streams and may take any time.
    """

    methods: Sequence[str]
    path: str
    rule: Rule
    handle: Handle
    deadline_s: float | None = DEADLINE_S


class RestApi:
    """The endpoints as an ASGI application."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        token_hashes: Mapping[str, str],
        told: Callable[[HeadraceError], Response],
        missing: Callable[[], Response],
    ) -> None:
        """`told` makes the answer for an error, `missing` the one for a path or method that is not served.

        Raises ValueError for two endpoints with the same method and path.
        """
        self.endpoints = tuple(endpoints)
        self._token_hashes = dict(token_hashes)
        self._told = told
        self._missing = missing
        self._exact: dict[tuple[str, str], tuple[Endpoint, Route]] = {}
        self._templates: list[tuple[Endpoint, Route]] = []
        for endpoint in self.endpoints:
            route = Route(endpoint.path, _nothing, methods=list(endpoint.methods))
            if "{" in endpoint.path:
                self._templates.append((endpoint, route))
                continue
            for method in endpoint.methods:
                if (method, endpoint.path) in self._exact:
                    raise ValueError(f"{method} {endpoint.path} is there twice")
                self._exact[method, endpoint.path] = (endpoint, route)

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
                    await self._answer(scope, receive, watched)
                except Exception as error:  # the one place where any error becomes an answer; within the span, which names it too
                    raise errors.explain(error) from error
        except HeadraceError as error:
            if begun:
                raise
            await self._told(error)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Names of headers come in lower case, as the names of gRPC metadata do, and mean the same.
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        caller = access.identify(metadata, self._token_hashes)
        found = self._find(scope)
        if found is None:
            await self._missing()(scope, receive, send)
            return
        endpoint, route = found
        scope["route"] = route
        access.authorize(route.path, caller, {route.path: endpoint.rule})
        with access.as_caller(caller):
            scope_of_time = asyncio.timeout(endpoint.deadline_s)
            try:
                async with scope_of_time:
                    response = await endpoint.handle(Request(scope, receive))
                    await response(scope, receive, send)
            except TimeoutError:
                if scope_of_time.expired():
                    raise DeadlineExceeded(f"{route.path} took longer than {endpoint.deadline_s:g} s") from None
                raise

    def _find(self, scope: Scope) -> tuple[Endpoint, Route] | None:
        exact = self._exact.get((scope["method"], scope["path"]))
        if exact is not None:
            return exact
        for endpoint, route in self._templates:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                return endpoint, route
        return None


async def _nothing(request: Request) -> Response:
    """Stands in the routes, which only match here."""
    raise Forbidden("a route is not called by itself")
