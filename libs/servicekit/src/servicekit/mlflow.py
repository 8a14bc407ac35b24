"""How MLflow's REST API writes things: bodies, queries, answers, errors. What a service does with them is the service's own.

Source: the protocol buffers and `handlers.py` of MLflow 3.17 (https://mlflow.org/docs/latest/api_reference/rest-api.html).
Numbers of 64 bits come as JSON numbers or texts and are answered as numbers; NaN and the infinities are the texts of proto3's JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from servicekit import errors
from servicekit.access import Rule
from servicekit.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Exhausted,
    Forbidden,
    HeadraceError,
    Internal,
    Invalid,
    NotFound,
    TooLarge,
    Transient,
    Unauthenticated,
)
from servicekit.rest import Endpoint, Handle

PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")
"""Where the second version of the API is served: to clients, and to MLflow's own page."""

MAX_BODY_BYTES = 8 * 1024 * 1024

ERRORS: dict[type[HeadraceError], tuple[str, int]] = {
    Invalid: ("INVALID_PARAMETER_VALUE", 400),
    NotFound: ("RESOURCE_DOES_NOT_EXIST", 404),
    AlreadyExists: ("RESOURCE_ALREADY_EXISTS", 400),
    # INVALID_STATE, which says it better, is 500 on this wire: clients would try it again.
    Conflict: ("INVALID_PARAMETER_VALUE", 400),
    Unauthenticated: ("UNAUTHENTICATED", 401),
    Forbidden: ("PERMISSION_DENIED", 403),
    TooLarge: ("INVALID_PARAMETER_VALUE", 400),
    Transient: ("TEMPORARILY_UNAVAILABLE", 503),
    Exhausted: ("REQUEST_LIMIT_EXCEEDED", 429),
    DeadlineExceeded: ("DEADLINE_EXCEEDED", 504),
    Internal: ("INTERNAL_ERROR", 500),
}
"""The error table of MLflow's API: error_code and status. A subclass that is not named here is told as its nearest named ancestor."""

_T = TypeVar("_T")
_UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})


def endpoints(table: Iterable[tuple[Sequence[str] | str, str, Rule, Handle]]) -> list[Endpoint]:
    """Rows of methods, path below `PREFIXES`, rule and handler as endpoints under every prefix."""
    return [
        Endpoint((methods,) if isinstance(methods, str) else methods, f"{prefix}{path}", rule, handle)
        for methods, path, rule, handle in table
        for prefix in PREFIXES
    ]


def told(error: HeadraceError) -> Response:
    """The answer for an error: {"error_code", "message"}, the violations within the message, since clients show nothing else."""
    code, status = errors.row(ERRORS, type(error))
    message = "; ".join([error.message, *map(str, error.violations)])
    headers = {"www-authenticate": 'Basic realm="headrace"'} if status == 401 else None
    return answer({"error_code": code, "message": message}, status, headers)


def missing() -> Response:
    """The answer for what is not served: not JSON, by which clients tell an older server from a missing thing."""
    return PlainTextResponse("Not Found", 404)


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer. `body` holds what msgspec encodes; no float in it may be NaN or infinite (see `number`)."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def number(value: float) -> float | str:
    """A metric's value as the wire has it."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


async def read(request: Request, shape: type[_T]) -> _T:
    """What a request says, as `shape`, a msgspec.Struct: from its JSON body or, with GET, from its query. Fields that `shape` does not
    have are left out. Raises Invalid, TooLarge."""
    if request.method not in _UNSAFE:
        return _converted(_query(request, shape), shape)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can have a browser send text/plain without asking, and nothing else that is read here.
        raise Invalid(f"the content type must be application/json, not {kind[:100]}")
    body = await _body(request)
    if not body:
        return _converted({}, shape)
    try:
        return msgspec.json.decode(body, type=shape, strict=False)
    except msgspec.ValidationError as error:
        if b"null" not in body:
            raise _wrong(error) from None
        # A field that is null is one that was left out, as in proto3's JSON.
        return _converted(_without_nulls(_document(body)), shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Python's own clients write NaN and Infinity bare.
        return _converted(_without_nulls(_document(body)), shape)


def _document(body: bytes) -> Any:
    """JSON as Python reads it. Raises Invalid, also for texts that no UTF-8 can hold."""
    try:
        document = json.loads(body)
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Invalid("the body is not JSON in UTF-8") from None
    return document


def _without_nulls(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _without_nulls(value) for name, value in document.items() if value is not None}
    return [_without_nulls(value) for value in document] if isinstance(document, list) else document


_LISTS: dict[type[Any], frozenset[str]] = {}
"""By shape, the fields that hold more than one value: found out once, since that takes longer than a request."""


def _lists(shape: type[Any]) -> frozenset[str]:
    if shape not in _LISTS:
        fields = msgspec.structs.fields(shape)
        _LISTS[shape] = frozenset(field.encode_name for field in fields if msgspec.json.schema(field.type).get("type") == "array")
    return _LISTS[shape]


def _query(request: Request, shape: type[Any]) -> dict[str, Any]:
    """Repeated names make a list where the shape has one; else the last of a name counts."""
    lists = _lists(shape)
    return {name: request.query_params.getlist(name) if name in lists else request.query_params[name] for name in request.query_params}


def _converted(document: Any, shape: type[_T]) -> _T:
    try:
        return msgspec.convert(document, shape, strict=False)
    except msgspec.ValidationError as error:
        raise _wrong(error) from None
    except RecursionError:
        raise Invalid("the body is nested too deep") from None


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _wrong(error: msgspec.ValidationError) -> Invalid:
    """`Expected `int`, got `str` - at `$.metrics[0].step`` in the words of MLflow."""
    what, _, where = str(error).partition(" - at `$")
    field = where.rstrip("`").removeprefix(".").removeprefix("[...]") or "the request"
    if what.startswith("Object missing required field"):
        name = what.rpartition("field `")[2].rstrip("`")
        field = name if field == "the request" else f"{field}.{name}"
        return Invalid(f"Missing value for required parameter '{field}'.")
    return Invalid(f"Invalid value for parameter '{field}': {what.replace('`', '')}")
