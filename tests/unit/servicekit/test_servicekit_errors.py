"""Every error class has its row in every table, and survives the way over gRPC."""

from __future__ import annotations

import logging
from typing import Any

import asyncpg
import grpc
import pytest
from servicekit import errors
from servicekit.errors import HeadraceError, Internal, Invalid, NotFound, TooLarge, Transient, Unavailable, Violation
from sqlalchemy import exc as sa_exc


def walk(cls: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *walk(sub))]


OWN_CLASSES = [cls for cls in walk(HeadraceError) if cls.__module__ == errors.__name__]


class Failure:
    """What a client sees of a failed call."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def over_the_wire(exc: BaseException) -> HeadraceError:
    status = errors.to_grpc_status(exc)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return errors.from_rpc_error(Failure(code, status.message, [("grpc-status-details-bin", status.SerializeToString())]))


@pytest.mark.parametrize("table", [errors.GRPC_CODES, errors.HTTP_STATUS, errors.REASONS], ids=["grpc", "http", "reasons"])
def test_every_class_is_in_every_table(table: dict[type[HeadraceError], object]) -> None:
    assert set(table) == set(OWN_CLASSES)


def test_every_class_anywhere_is_told_as_something() -> None:
    for cls in walk(HeadraceError):
        assert errors.row(errors.REASONS, cls) != "INTERNAL" or issubclass(cls, Internal), f"{cls} descends from no class of the tables"


def test_reasons_are_distinct() -> None:
    assert len(set(errors.REASONS.values())) == len(errors.REASONS)


@pytest.mark.parametrize("cls", OWN_CLASSES)
def test_class_message_and_violations_survive_grpc(cls: type[HeadraceError]) -> None:
    violations = (Violation("serve.steps[1].weight", "must grow", line=12), Violation("name", "is missing"))
    restored = over_the_wire(cls("that does not work", violations))
    assert type(restored) is cls
    if cls is Internal:  # of a bug, callers learn an id
        assert restored.message == f"internal error {restored.error_id}"
        assert restored.violations == ()
    else:
        assert restored.message == "that does not work"
        assert restored.violations == violations


SECRETS = "postgresql+asyncpg://tracker:hunter2@10.0.0.7:5432/headrace SELECT * FROM tracker.run"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (Unavailable("the artifact store does not answer", detail=SECRETS), 503, "the artifact store does not answer"),
        (Transient("not yet", detail=SECRETS), 503, "not yet"),
        (errors.DeadlineExceeded("it took too long", detail=SECRETS), 504, "it took too long"),
        (Internal(SECRETS), 500, None),
        (Internal("the artifact store failed", detail=SECRETS), 500, None),
        (RuntimeError(SECRETS), 500, None),
        (ConnectionRefusedError(111, SECRETS), 503, "a server that is needed does not answer"),
        (sa_exc.OperationalError(SECRETS, None, asyncpg.CannotConnectNowError(SECRETS)), 503, "the database is not available"),
        (sa_exc.ProgrammingError(SECRETS, None, asyncpg.UndefinedTableError(SECRETS)), 500, None),
        (errors.from_rpc_error(Failure(grpc.StatusCode.UNAVAILABLE, SECRETS)), 503, "a server that is needed does not answer"),
        (errors.from_rpc_error(Failure(grpc.StatusCode.DEADLINE_EXCEEDED, SECRETS)), 504, "a server that is needed did not answer in time"),
        (errors.from_rpc_error(Failure(grpc.StatusCode.UNKNOWN, SECRETS)), 500, None),
    ],
)
def test_what_is_not_the_callers_fault_is_told_in_a_sentence_with_an_id(
    error: Exception, status: int, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found, body = errors.http_error(error)
    assert found == status
    error_id = body["error"]["error_id"]
    assert body["error"]["message"] == (told or f"internal error {error_id}")
    assert not any(word in str(body) for word in ("hunter2", "10.0.0.7", "SELECT"))
    assert error_id in caplog.text
    assert "hunter2" in caplog.text  # the log has the rest


@pytest.mark.parametrize("error", [Unavailable("away", detail=SECRETS), RuntimeError(SECRETS)])
def test_one_failure_has_one_id_and_is_logged_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    told = errors.explain(error)  # as the span names it
    passed_on = over_the_wire(told)  # to the gateway, which tells its client
    body = errors.http_body(passed_on)
    assert "hunter2" not in repr(body)
    assert {told.error_id, passed_on.error_id, body["error"]["error_id"]} == {told.error_id}
    assert told.error_id
    assert sum(told.error_id in record.getMessage() for record in caplog.records) == 1


def test_what_callers_do_wrong_has_no_id() -> None:
    for error in (Invalid("wrong"), NotFound("none"), errors.Exhausted("too many")):
        assert "error_id" not in errors.http_body(error)["error"]


def test_a_subclass_is_told_as_its_ancestor() -> None:
    class RunNotFound(NotFound):
        pass

    restored = over_the_wire(RunNotFound("no run abc"))
    assert type(restored) is NotFound
    assert errors.http_error(RunNotFound("no run abc"))[0] == 404


def test_a_bug_leaks_nothing_but_its_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status, body = errors.http_error(ValueError("password=hunter2"))
    assert status == 500
    assert "hunter2" not in str(body)
    assert body["error"]["code"] == "INTERNAL"
    assert body["error"]["error_id"] in caplog.text
    assert "hunter2" in caplog.text  # the log has the stack

    restored = over_the_wire(KeyError("secret-key"))
    assert isinstance(restored, Internal)
    assert restored.error_id
    assert "secret-key" not in str(restored)


def test_the_bare_base_class_is_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    assert errors.http_error(HeadraceError("should have been a subclass"))[0] == 500


@pytest.mark.parametrize(
    ("code", "details", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)", TooLarge),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", errors.Exhausted),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", Unavailable),
        (grpc.StatusCode.INTERNAL, "oops", Internal),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", Internal),
        (grpc.StatusCode.UNKNOWN, "", Internal),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
    ],
)
def test_statuses_that_somebody_else_wrote(code: grpc.StatusCode, details: str, cls: type[HeadraceError]) -> None:
    assert type(errors.from_rpc_error(Failure(code, details))) is cls


def test_unreadable_details_do_not_hide_the_error() -> None:
    error = errors.from_rpc_error(Failure(grpc.StatusCode.NOT_FOUND, "gone", [("grpc-status-details-bin", b"\xff\xff")]))
    assert type(error) is NotFound
    assert error.message == "gone"


def test_http_body_names_line_and_field() -> None:
    body = errors.http_body(Invalid("the delivery is wrong", [Violation("promote.model", "is missing", line=7)]))
    assert body == {
        "error": {
            "code": "INVALID",
            "message": "the delivery is wrong",
            "violations": [{"field": "promote.model", "message": "is missing", "line": 7}],
        }
    }


def test_invalid_and_transient_are_apart() -> None:
    assert not [cls for cls in OWN_CLASSES if issubclass(cls, Invalid) and issubclass(cls, Transient)]


def asyncpg_error() -> Any:
    return asyncpg.exceptions.CannotConnectNowError("the database system is starting up")


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (ConnectionRefusedError(111, "10.0.0.7:5432"), Unavailable),
        (TimeoutError(), Unavailable),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 5432), ..."), Unavailable),
        (asyncpg_error(), Unavailable),
        (FileNotFoundError(2, "no such file"), Internal),
        (OSError(28, "No space left on device"), Internal),
    ],
)
def test_a_server_that_does_not_answer_is_no_bug(error: BaseException, cls: type[HeadraceError], caplog: pytest.LogCaptureFixture) -> None:
    told = errors.explain(error)
    assert type(told) is cls
    assert "10.0.0.7" not in str(told)
