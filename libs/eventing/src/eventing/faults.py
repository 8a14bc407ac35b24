"""Which errors pass by themselves."""

from __future__ import annotations

from servicekit import db
from servicekit.errors import Transient
from sqlalchemy import exc as sa_exc


def passes(exc: BaseException) -> bool:
    """Whether an error may pass by itself: a server is away, busy, or chose this transaction to give way."""
    return isinstance(exc, Transient) or db.is_transient(exc)


def is_conflict(exc: BaseException) -> bool:
    """A deadlock or a serialisation failure: PostgreSQL chose this transaction to give way."""
    if isinstance(exc, sa_exc.DBAPIError) and exc.orig is not None:
        exc = exc.orig
    return getattr(exc, "sqlstate", None) in ("40P01", "40001")
