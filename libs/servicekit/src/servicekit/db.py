"""PostgreSQL for a service: its engine, and the one table that says which database errors pass and which are bugs."""

from __future__ import annotations

import asyncpg
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from servicekit.errors import HeadraceError, Invalid, Unavailable, is_unreachable


def create_engine(url: str, pool_size: int = 10, *, pre_ping: bool = True) -> AsyncEngine:
    """An engine for `postgresql+asyncpg://...`; connects at first use, holds at most `pool_size` connections. Dispose of it at the end.

    A connection that died while idle is found before it is used, so a restart of the server costs no request an error; without
    `pre_ping` one is told (`Unavailable`), and a round trip per transaction is saved: for loops that retry anyway.
    """
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=pre_ping,
        pool_timeout=10,
        hide_parameters=True,
        connect_args={"timeout": 5, "server_settings": {"timezone": "UTC"}},
    )


# By SQLSTATE (PostgreSQL manual, appendix A). Classes: 08 connection, 53 insufficient resources, 57P0x the server is going or coming.
_TRANSIENT_CLASSES = ("08", "53")
_TRANSIENT_STATES = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "57P05"})

_CHARACTER_NOT_IN_REPERTOIRE = "22021"


def is_transient(exc: BaseException) -> bool:
    """Whether the same transaction may succeed if it is tried again: the server was away, busy, or chose it to resolve a deadlock."""
    if isinstance(exc, sa_exc.TimeoutError):  # no connection became free in the pool
        return True
    if isinstance(exc, sa_exc.DBAPIError):
        if exc.connection_invalidated:
            return True
        return exc.orig is not None and is_transient(exc.orig)
    state = getattr(exc, "sqlstate", None)
    if isinstance(state, str):
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES
    if isinstance(exc, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return "connection" in str(exc) and "closed" in str(exc)
    # asyncpg raises these bare, not wrapped by SQLAlchemy, while it connects.
    return is_unreachable(exc)


def translate(exc: BaseException) -> BaseException:
    """`Unavailable` for a database error that may pass, `Invalid` for a text that no database can hold, everything else as it is.

    The text of the server is not passed on.
    """
    if isinstance(exc, sa_exc.DBAPIError) and getattr(exc.orig, "sqlstate", None) == _CHARACTER_NOT_IN_REPERTOIRE:
        return Invalid("a text holds the character 0")
    if isinstance(exc, HeadraceError) or not is_transient(exc):
        return exc
    return Unavailable("the database is not available")
