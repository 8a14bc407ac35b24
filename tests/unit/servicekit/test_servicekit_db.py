"""Which database errors pass, for those that no server can be made to give on demand."""

from __future__ import annotations

import asyncpg
from eventing.faults import passes
from servicekit import db
from servicekit.errors import Unavailable


def test_a_connection_that_died_in_the_middle_of_a_statement_passes() -> None:
    error = asyncpg.InternalClientError("got result for unknown protocol state 0")
    assert passes(error)
    assert type(db.translate(error)) is Unavailable


def test_a_statement_that_took_too_long_passes() -> None:
    assert passes(TimeoutError())
    assert type(db.translate(TimeoutError())) is Unavailable


def test_a_wrong_use_of_a_connection_does_not_pass() -> None:
    assert not passes(asyncpg.InterfaceError("cannot perform operation: another operation is in progress"))
