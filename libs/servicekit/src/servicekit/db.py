"""PostgreSQL for a service: its engine, and the one table that says which database errors pass and which are bugs."""

from __future__ import annotations

import socket
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from servicekit.errors import HeadraceError, Invalid, Unavailable, is_unreachable

COMMAND_TIMEOUT_S = 30.0
"""How long a statement may take. A server that hangs, or a machine that vanished with it, says nothing at all."""

# A link that is dead while nothing is sent is found by probes after 25 s, one that is dead while something is by what stays unconfirmed.
_SOCKET = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),  # in ms
)


def create_engine(
    url: str, pool_size: int = 10, *, pre_ping: bool = True, command_timeout_s: float | None = COMMAND_TIMEOUT_S
) -> AsyncEngine:
    """An engine for `postgresql+asyncpg://...`; connects at first use, holds at most `pool_size` connections. Dispose of it at the end.

    A connection that died while idle is found before it is used, so a restart of the server costs no request an error; without
    `pre_ping` one is told (`Unavailable`), and a round trip per transaction is saved: for loops that retry anyway. A statement that
    takes longer than `command_timeout_s` ends with TimeoutError (`Unavailable`) and its connection is given up: the server may hang.
    None is for work that may take any time.
    """
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=pre_ping,
        pool_timeout=10,
        hide_parameters=True,
        connect_args={"timeout": 5, "command_timeout": command_timeout_s, "server_settings": {"timezone": "UTC"}},
    )
    event.listen(engine.sync_engine, "connect", _watch_link)
    event.listen(engine.sync_engine, "handle_error", _give_up)
    return engine


def _watch_link(connection: Any, _record: object) -> None:
    """Lets the system find a link that is dead. asyncpg has no setting for it, so this takes the socket from inside it."""
    link = connection.driver_connection._transport.get_extra_info("socket")
    if link.family != socket.AF_UNIX:
        for option in _SOCKET:
            link.setsockopt(*option)


def _give_up(context: ExceptionContext) -> None:
    """A connection whose statement timed out is closed at once: a ROLLBACK on it would only wait for the same server again."""
    if isinstance(context.original_exception, TimeoutError):
        context.is_disconnect = True


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
    if isinstance(exc, asyncpg.InternalClientError):
        # asyncpg loses count of what it waits for when its server dies in the middle of a statement, and says only this.
        return True
    if isinstance(exc, asyncpg.InterfaceError):
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
