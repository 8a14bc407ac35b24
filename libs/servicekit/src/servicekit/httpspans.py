"""The server span of an HTTP request: root of the calls that it causes, or child of what its caller traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from starlette.types import Scope

from servicekit import errors, telemetry
from servicekit.errors import HeadraceError

# Attributes, by the semantic conventions of OpenTelemetry for HTTP.
METHOD, ROUTE, STATUS = "http.request.method", "http.route", "http.response.status_code"

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_OTHER = "_OTHER"


class Answered:
    """The status with which a request was answered; 0 until it is known."""

    def __init__(self) -> None:
        self.status = 0


@contextmanager
def server_span(scope: Scope, prefix: str) -> Iterator[Answered]:
    """Runs the block, which answers the request or raises a HeadraceError, within the request's span.

    The span is named by method and route template, known when the block ends; the routers are mounted at `prefix`. Neither path nor
    query is told: ids and texts of the user are in them.
    """
    method = scope["method"] if scope["method"] in _METHODS else _OTHER
    inbound = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    parent = telemetry.context_from(inbound.decode("latin-1"))
    opened = telemetry.OpenSpan("HTTP" if method == _OTHER else method, SpanKind.SERVER, parent, attributes={METHOD: method})
    answered = Answered()
    failure: BaseException | None = None
    try:
        with trace.use_span(opened.span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield answered
    except BaseException as error:
        failure = error
        if isinstance(error, HeadraceError) and not answered.status:
            answered.status = errors.row(errors.HTTP_STATUS, type(error))
        raise
    finally:
        if answered.status:
            opened.tell({STATUS: answered.status})
        if (route := scope.get("route")) is not None and method != _OTHER:
            template = f"{prefix}{route.path_format}"
            opened.tell({ROUTE: template}, name=f"{method} {template}")
        opened.end(failure)
