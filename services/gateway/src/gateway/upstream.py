"""HTTP/1.1 to a runtime over connections that stay open: the protocol on httptools, and the pool that hands them out.

No task and no future per request: whoever wants an answer is a `Receiver`, is given to the pool with the bytes to send, and is
called back. A connection goes back to the pool before its receiver is called, so that the next request finds it there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from enum import Enum
from time import monotonic
from typing import Protocol

import httptools

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
"""Of an answer."""


class Failure(Enum):
    """Why there is no whole answer."""

    CONNECT = "the runtime cannot be reached"
    CLOSED = "the runtime closed the connection"
    TIMEOUT = "the runtime did not answer in time"
    PROTOCOL = "the runtime's answer is not HTTP"
    SATURATED = "too many requests wait for the runtime"


class Receiver(Protocol):
    """Who waits for an answer. The pool sets `connection` while one is at work."""

    wire: bytes
    deadline: float
    connection: Connection | None

    def answered(self, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
        """The whole answer is there."""

    def stream_started(self, status: int, fields: dict[bytes, bytes], body: bytes) -> bool:
        """The answer grew beyond the buffer: its beginning. False refuses the rest: the connection is dropped, nothing more is called."""
        ...

    def stream_continued(self, data: bytes) -> None:
        """More of a streamed answer."""

    def stream_ended(self) -> None:
        """The streamed answer is whole."""

    def failed(self, failure: Failure, *, stale: bool) -> None:
        """No answer, or not the whole of one. `stale`: a kept connection was closed before a byte came back, so another may do."""

    def crashed(self) -> None:
        """The receiver itself failed over what it was told; the error is logged. Whoever waits behind it must not wait for ever."""


class _Stop(Exception):
    """Ends the parsing of a read from within a callback."""


class Connection(asyncio.Protocol):
    """One connection to a runtime: one request at a time."""

    __slots__ = (
        "_body",
        "_complete",
        "_fields",
        "_framed",
        "_head_bytes",
        "_in_head",
        "_keep_alive",
        "_parser",
        "_pool",
        "_received",
        "_status",
        "_streaming",
        "_used",
        "deadline",
        "idle_since",
        "receiver",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self.receiver: Receiver | None = None
        self.deadline = 0.0
        self.idle_since = 0.0
        self._used = False
        self._reset()

    def _reset(self) -> None:
        self._fields: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._complete = False
        self._in_head = False
        self._head_bytes = 0
        self._received = False
        self._status = 0
        self._streaming = False
        self._framed = False
        self._keep_alive = False

    def start(self, receiver: Receiver) -> None:
        """Sends the receiver's request; it is called back."""
        self.receiver = receiver
        receiver.connection = self
        self.deadline = receiver.deadline
        self.transport.write(receiver.wire)

    def abort(self) -> None:
        """Drops the connection, and the runtime's work with it, without calling anybody."""
        receiver, self.receiver = self.receiver, None
        if receiver is not None and receiver.connection is self:
            receiver.connection = None
        self.transport.abort()

    def expire(self) -> None:
        """The deadline has passed."""
        self._fail(Failure.TIMEOUT)

    def pause(self) -> None:
        """Reads no more of a streamed answer until `resume`: its reader is slower than the runtime."""
        self.transport.pause_reading()

    def resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's is never another
        self.transport = transport
        self._pool.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        self._fail(Failure.CLOSED)

    def data_received(self, data: bytes) -> None:
        if self.receiver is None:
            # Nobody asked: an answer to nothing, which must not become the next caller's.
            self.transport.abort()
            return
        self._received = True
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail(Failure.PROTOCOL)
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # Bytes behind a whole answer come here too: the answer counts, the connection does not.
            self._keep_alive = False
            if not self._complete:
                self._fail(Failure.PROTOCOL)
        if self._complete:
            self._deliver()

    # httptools

    def on_message_begin(self) -> None:
        if self._complete:
            raise _Stop
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        parser = self._parser
        self._status = parser.get_status_code()
        if self._status < 200:
            return
        # Valid only here: once the message is complete, the parser always says no.
        self._keep_alive = parser.should_keep_alive()
        fields = self._fields
        length, coding = b"content-length" in fields, b"transfer-encoding" in fields
        # An answer that ends with the connection cannot be told from one that was cut off.
        self._framed = length is not coding or self._status in (204, 304)
        if not self._framed:
            raise _Stop

    def on_body(self, data: bytes) -> None:
        if self._streaming:
            receiver = self.receiver
            if receiver is not None:
                receiver.stream_continued(data)
            return
        if not self._body:
            self._body = data
        elif type(self._body) is bytes:
            self._body = bytearray(self._body) + data
        else:
            self._body += data
        if len(self._body) > self._pool.stream_above:
            self._start_stream()

    def on_message_complete(self) -> None:
        if self._status < 200:
            # 100 or 103: the answer proper follows in a message of its own.
            self._fields = {}
            if self._status == 101:
                raise _Stop
            return
        self._complete = True

    # inside

    def _start_stream(self) -> None:
        receiver = self.receiver
        self._streaming = True
        if receiver is not None and not receiver.stream_started(self._status, self._fields, bytes(self._body)):
            self.abort()
        self._body = b""

    def _deliver(self) -> None:
        receiver, self.receiver = self.receiver, None
        status, fields, body, streamed = self._status, self._fields, self._body, self._streaming
        self._used = True
        self._reset_after(keep=self._keep_alive)
        if receiver is None:
            return
        receiver.connection = None
        try:
            if streamed:
                receiver.stream_ended()
            else:
                receiver.answered(status, fields, body if type(body) is bytes else bytes(body))
        except Exception:
            _log.exception("an answer could not be handled")
            receiver.crashed()

    def _reset_after(self, *, keep: bool) -> None:
        self._reset()
        if keep:
            self._pool.release(self)
        else:
            self.transport.close()

    def _fail(self, failure: Failure) -> None:
        receiver, self.receiver = self.receiver, None
        stale = failure is Failure.CLOSED and self._used and not self._received
        self.transport.abort()
        if receiver is not None:
            receiver.connection = None
            _tell(receiver, failure, stale=stale)


def _tell(receiver: Receiver, failure: Failure, *, stale: bool = False) -> None:
    try:
        receiver.failed(failure, stale=stale)
    except Exception:
        _log.exception("a failure could not be handled")
        receiver.crashed()


class Pool:
    """Connections to one address for one use (callers' requests and shadow copies never share one)."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_connections: int,
        max_waiting: int,
        connect_timeout_s: float,
        idle_timeout_s: float,
        stream_above: int,
    ) -> None:
        """`stream_above`: answers of more bytes than this are not buffered but streamed."""
        self._host = host
        self._port = port
        self._max_connections = max_connections
        self._max_waiting = max_waiting
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self.stream_above = stream_above
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._waiting: deque[Receiver] = deque()
        self._connecting: set[asyncio.Task[None]] = set()
        # As of the last sweep: exact enough to tell what has been idle for long.
        self._now = monotonic()
        self._closed = False
        self.opened_total = 0

    @property
    def connections(self) -> int:
        return len(self._all)

    def submit(self, receiver: Receiver, *, fresh: bool = False) -> None:
        """Sends the receiver's request over an idle connection, or over the next that becomes free. `fresh`: over a new one only."""
        idle = self._idle
        while idle and not fresh:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.start(receiver)
                return
        if len(self._waiting) >= self._max_waiting or self._closed:
            receiver.failed(Failure.SATURATED, stale=False)
            return
        if fresh:
            # Every kept connection may be as stale as the one that has just failed.
            self._drop_idle()
        self._waiting.append(receiver)
        self._connect_if_needed()

    def cancel(self, receiver: Receiver) -> None:
        """The receiver wants nothing any more; it is not called back."""
        if receiver.connection is not None:
            receiver.connection.abort()
        else:
            try:
                self._waiting.remove(receiver)
            except ValueError:
                return

    def sweep(self, now: float) -> None:
        """Ends what has passed its deadline and closes what has been idle for long. `now` is monotonic."""
        self._now = now
        for connection in [c for c in self._all if c.receiver is not None and now >= c.deadline]:
            connection.expire()
        for receiver in [r for r in self._waiting if now >= r.deadline]:
            self._waiting.remove(receiver)
            _tell(receiver, Failure.TIMEOUT)
        for connection in [c for c in self._idle if now - c.idle_since > self._idle_timeout_s]:
            self._idle.remove(connection)
            connection.transport.close()

    def close(self) -> None:
        """Drops every connection. Receivers that still wait are told."""
        self._closed = True
        for task in self._connecting:
            task.cancel()
        while self._waiting:
            _tell(self._waiting.popleft(), Failure.CLOSED)
        for connection in list(self._all):
            connection.transport.abort()

    # called by connections

    def opened(self, connection: Connection) -> None:
        self._all.add(connection)
        self.opened_total += 1

    def lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._connect_if_needed()

    def release(self, connection: Connection) -> None:
        if self._closed or connection.transport.is_closing():
            connection.transport.close()
        elif self._waiting:
            connection.start(self._waiting.popleft())
        else:
            connection.idle_since = self._now
            self._idle.append(connection)

    # inside

    def _drop_idle(self) -> None:
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()

    def _connect_if_needed(self) -> None:
        if self._closed or not self._waiting:
            return
        room = self._max_connections - len(self._all) - len(self._connecting)
        if room > 0 and len(self._connecting) < len(self._waiting):
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)

    async def _connect(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: Connection(self), self._host, self._port)
        except Exception as error:
            self._connecting.discard(task)
            if isinstance(error, OSError):
                _log.debug("cannot connect to %s:%s: %s", self._host, self._port, error)
            else:
                # Such as a name that no resolver takes. Whoever waits must be told of it all the same.
                _log.exception("cannot connect to %s:%s", self._host, self._port)
            if self._waiting:
                _tell(self._waiting.popleft(), Failure.CONNECT)
            self._connect_if_needed()
            return
        finally:
            self._connecting.discard(task)
        self.release(connection)
        self._connect_if_needed()
