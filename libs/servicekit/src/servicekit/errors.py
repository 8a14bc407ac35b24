"""The errors that cross a service's boundary, and the one table per transport that says how each is told to a caller.

Three kinds, three fates: `Invalid` is the caller's fault and never retried, `Transient` passes and may be retried, and
everything else is a bug. Of what is not the caller's fault it learns a sentence and an error id, and nothing of the inside: what
another system said goes into `detail`, which is for the log, where the error id finds it and the stack.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # publishes no types

DOMAIN = "headrace"
"""The `domain` of the ErrorInfo that Headrace's own servers send: a status without it was written by somebody else."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries a serialised google.rpc.Status (gRPC's richer error model)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with an input: the field by its path (`serve.steps[1].weight`), a sentence, the line if it came from a file."""

    field: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}, {self.field}" if self.line is not None else self.field
        return f"{where}: {self.message}"


class HeadraceError(Exception):
    """Base of all errors with a meaning. Raise a subclass: this class itself counts as a bug.

    `message` and `violations` are told to callers. `detail` is not: it is for what another system said (addresses, queries, paths),
    and only `str`, which is for logs, has it. `error_id` finds the error in the log of the server that raised it.
    """

    def __init__(self, message: str = "", violations: Iterable[Violation] = (), *, detail: str = "", error_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.violations: tuple[Violation, ...] = tuple(violations)
        self.detail = detail
        self.error_id = error_id

    def __str__(self) -> str:
        told = "; ".join([self.message, *map(str, self.violations)])
        return f"{told}: {self.detail}" if self.detail else told


class Invalid(HeadraceError):
    """The input is wrong and stays wrong: never retried."""


class NotFound(Invalid):
    """What was named does not exist."""


class AlreadyExists(Invalid):
    """What was to be made exists, and is not the same."""


class Conflict(Invalid):
    """The state of the thing does not allow it (a failed precondition)."""


class Unauthenticated(Invalid):
    """The caller did not prove who it is."""


class Forbidden(Invalid):
    """The caller is known and may not do this."""


class TooLarge(Invalid):
    """The input is larger than the limit."""


class Transient(HeadraceError):
    """It may work later: retry with backoff where the call is idempotent."""


class Unavailable(Transient):
    """A server that is needed does not answer."""


class Exhausted(Transient):
    """A quota or a queue is full."""


class DeadlineExceeded(Transient):
    """The time given for the work is over. The work may have been done."""


class Internal(HeadraceError):
    """A bug, here or in the server that was called: never retried. Its message is not told either."""

    def __init__(
        self, message: str = "internal error", violations: Iterable[Violation] = (), *, detail: str = "", error_id: str = ""
    ) -> None:
        super().__init__(message, violations, detail=detail, error_id=error_id)


GRPC_CODES: dict[type[HeadraceError], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    # Not RESOURCE_EXHAUSTED, which clients retry: a body that is too large stays too large.
    TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    Transient: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Internal: grpc.StatusCode.INTERNAL,
}
"""The error table of gRPC. A subclass that is not named here is told as its nearest named ancestor."""

HTTP_STATUS: dict[type[HeadraceError], int] = {
    Invalid: 400,
    NotFound: 404,
    AlreadyExists: 409,
    Conflict: 409,
    Unauthenticated: 401,
    Forbidden: 403,
    TooLarge: 413,
    Transient: 503,
    Unavailable: 503,
    Exhausted: 429,
    DeadlineExceeded: 504,
    Internal: 500,
}
"""The error table of HTTP. A subclass that is not named here is told as its nearest named ancestor."""

REASONS: dict[type[HeadraceError], str] = {
    Invalid: "INVALID",
    NotFound: "NOT_FOUND",
    AlreadyExists: "ALREADY_EXISTS",
    Conflict: "CONFLICT",
    Unauthenticated: "UNAUTHENTICATED",
    Forbidden: "FORBIDDEN",
    TooLarge: "TOO_LARGE",
    Transient: "TRANSIENT",
    Unavailable: "UNAVAILABLE",
    Exhausted: "EXHAUSTED",
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    Internal: "INTERNAL",
}
"""The name of each class on the wire: `code` of an HTTP body, `reason` of a gRPC ErrorInfo, from which a client restores the class."""

_CLASSES = {reason: cls for cls, reason in REASONS.items()}

# What a status without our ErrorInfo means: written by gRPC itself, or by somebody else's server.
_FOREIGN_CODES: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.OUT_OF_RANGE: Invalid,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}

FOREIGN_SENTENCES: dict[type[HeadraceError], str] = {
    Unavailable: "a server that is needed does not answer",
    Exhausted: "a server that is needed is busy",
    DeadlineExceeded: "a server that is needed did not answer in time",
    Internal: "internal error",
}
"""What a caller is told when another system failed us; what that system said is the error's `detail`."""

_Row = TypeVar("_Row")


def row(table: Mapping[type[HeadraceError], _Row], cls: type[BaseException]) -> _Row:
    """The row of a table for an error class: its own, else that of its nearest ancestor, else that of `Internal`."""
    for ancestor in cls.__mro__:
        if ancestor in table:
            return table[ancestor]
    return table[Internal]


def explain(exc: BaseException) -> HeadraceError:
    """The error to tell a caller for any exception.

    `Invalid` errors and `Exhausted` are returned as they are. Another `Transient` is logged as a warning under a new error id, which
    it has from then on; a database or another server that cannot be reached becomes `Unavailable` first. Anything else is a bug: it is
    logged with its stack, and an `Internal` that says nothing but the id is returned. What has an id was logged where it got it.
    """
    if isinstance(exc, HeadraceError) and type(exc) is not HeadraceError:
        error: BaseException = exc
    elif type(exc).__module__.partition(".")[0] in ("sqlalchemy", "asyncpg"):
        from servicekit import db  # imported here: a service without a database must not pay for SQLAlchemy

        error = db.translate(exc)
    elif is_unreachable(exc):  # SQLAlchemy passes on what the socket said while it connected
        error = Unavailable(FOREIGN_SENTENCES[Unavailable])
    else:
        error = exc
    if isinstance(error, Transient):
        if not error.error_id and not isinstance(error, Exhausted):
            error.error_id = secrets.token_hex(8)
            _log.warning("error %s: %s", error.error_id, error, exc_info=exc, extra={"error_id": error.error_id})
        return error
    if isinstance(error, Invalid) or (isinstance(error, Internal) and error.error_id):
        return error
    error_id = secrets.token_hex(8)
    _log.error("internal error %s", error_id, exc_info=exc, extra={"error_id": error_id})
    return Internal(f"internal error {error_id}", error_id=error_id)


def is_unreachable(exc: BaseException) -> bool:
    """Whether a socket said that nobody is there or answers in time. Other errors of the system, such as a full disk, are not this."""
    if isinstance(exc, ConnectionError | TimeoutError | socket.gaierror):
        return True
    # What asyncio raises when a name has several addresses and none of them answers: a bare OSError.
    return type(exc) is OSError and "Connect call failed" in str(exc)


def to_grpc_status(exc: BaseException) -> status_pb2.Status:
    """The google.rpc.Status of an error: code and message, ErrorInfo with the class, BadRequest with the violations.

    An exception without a meaning goes through `explain` first, so this may log.
    """
    error = explain(exc)
    info = error_details_pb2.ErrorInfo(reason=row(REASONS, type(error)), domain=DOMAIN)
    if error.error_id:
        info.metadata["error_id"] = error.error_id
    packed = [_pack(info)]
    if error.violations:
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field,
                    description=violation.message,
                    # The one free machine-readable field of a violation; its syntax allows upper case, digits and _.
                    reason="" if violation.line is None else f"LINE_{violation.line}",
                )
                for violation in error.violations
            ]
        )
        packed.append(_pack(bad_request))
    code: int = row(GRPC_CODES, type(error)).value[0]
    return status_pb2.Status(code=code, message=error.message, details=packed)


class RpcFailure(Protocol):
    """What a failed call tells: grpc.aio.AioRpcError has it, and so has the error of a synchronous stub."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Any: ...


def from_rpc_error(error: RpcFailure) -> HeadraceError:
    """Restores the error that the server raised: class, message, violations, error id. Does not raise; a broken detail is left out.

    What gRPC itself says names addresses: a caller of ours is told a sentence instead.
    """
    message = error.details() or error.code().name
    status = _status_of(error)
    info: error_details_pb2.ErrorInfo | None = None
    violations: tuple[Violation, ...] = ()
    if status is not None:
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad_request = error_details_pb2.BadRequest()
                detail.Unpack(bad_request)
                violations = tuple(Violation(v.field, v.description, _line(v.reason)) for v in bad_request.field_violations)
    if info is not None and info.domain == DOMAIN:
        cls = _CLASSES.get(info.reason) or _FOREIGN_CODES.get(error.code(), Internal)
        return cls(message, violations, error_id=info.metadata.get("error_id", ""))
    cls = _foreign(error.code(), message)
    if cls in FOREIGN_SENTENCES:
        return cls(FOREIGN_SENTENCES[cls], detail=message)
    return cls(message, violations)


def http_body(exc: BaseException) -> dict[str, Any]:
    """The JSON body of an HTTP error; its status is `row(HTTP_STATUS, type(explain(exc)))`, or use `http_error` for both."""
    return http_error(exc)[1]


def http_error(exc: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of an HTTP error. An exception without a meaning goes through `explain` first, so this may log."""
    error = explain(exc)
    body: dict[str, Any] = {
        "code": row(REASONS, type(error)),
        "message": error.message,
        "violations": [{"field": v.field, "message": v.message} | ({} if v.line is None else {"line": v.line}) for v in error.violations],
    }
    if error.error_id:
        body["error_id"] = error.error_id
    return row(HTTP_STATUS, type(error)), {"error": body}


def _foreign(code: grpc.StatusCode, message: str) -> type[HeadraceError]:
    # gRPC answers both a full quota and a message over its size limit with RESOURCE_EXHAUSTED; the second never gets better.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return TooLarge
    # A server that is killed can end a stream with a reset, which gRPC calls INTERNAL.
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message:
        return Unavailable
    return _FOREIGN_CODES.get(code, Internal)


def _status_of(error: RpcFailure) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except Exception:  # the error being explained matters more than a detail that cannot be read
                _log.warning("unreadable %s", STATUS_DETAILS_KEY)
                return None
    return None


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _line(reason: str) -> int | None:
    match = re.fullmatch(r"LINE_(\d+)", reason)
    return int(match[1]) if match else None
