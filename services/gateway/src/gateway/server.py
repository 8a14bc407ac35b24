"""The server side of the data path: uvicorn's httptools protocol, with the V2 paths taken out before ASGI begins.

What is not under /v2 goes on to the base class, that is to the FastAPI application of the control plane. The base class has no
public extension point for this, so uvicorn is pinned, and `check_uvicorn` refuses to start on one that lacks a name used here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway import kv2
from gateway.exchange import Exchange, Refusal
from gateway.kv2 import Op
from gateway.newcomers import origin
from gateway.plane import DataPlane
from gateway.routes import Target

_log = logging.getLogger(__name__)

UVICORN_VERSION = "0.54.0"
_PROTOCOL_NAMES = (
    "connection_made", "connection_lost", "data_received", "eof_received", "on_message_begin", "on_url", "on_header",
    "on_headers_complete", "on_body", "on_message_complete", "on_response_complete", "_start_asgi_task", "send_400_response",
    "shutdown", "pause_writing", "resume_writing", "timeout_keep_alive_handler", "_unset_keepalive_if_required",
)  # fmt: skip
_INSTANCE_NAMES = (
    "config", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser", "pipeline", "scope", "server_state",
    "timeout_keep_alive_task", "transport", "url", "connections", "tasks",
)  # fmt: skip
_CYCLE_NAMES = ("keep_alive", "response_complete", "disconnected", "message_event", "body")

_ONCE = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"host",
        b"expect",
        b"cookie",
        b"origin",
        b"sec-fetch-site",
        b"transfer-encoding",
        b"content-type",
        b"content-encoding",
        b"traceparent",
        b"x-headrace-arm",
        b"x-headrace-key",
        b"inference-header-content-length",
    }
)
"""Headers that must not come twice: two readers might read two things."""

ON_LOST = "headrace.on_lost"
"""The extension in the ASGI scope by which an application is called back when its client has gone."""

_UNAUTHENTICATED = b'www-authenticate: Bearer realm="headrace"\r\n'
_SAFE_ID = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:/+=")

# What a connection is in the middle of, for the sweeps.
_IDLE, _HEAD, _BODY, _BUSY = range(4)


def check_uvicorn() -> None:
    """Raises RuntimeError unless uvicorn is the one whose private names the data path uses."""
    if uvicorn.__version__ != UVICORN_VERSION:
        raise RuntimeError(f"the data path is written for uvicorn {UVICORN_VERSION}, not {uvicorn.__version__}")
    missing = [name for name in _PROTOCOL_NAMES if not callable(getattr(HttpToolsProtocol, name, None))]
    code = HttpToolsProtocol.__init__.__code__.co_names + HttpToolsProtocol.on_message_begin.__code__.co_names
    missing += [name for name in _INSTANCE_NAMES if name not in code]
    missing += [name for name in _CYCLE_NAMES if name not in RequestResponseCycle.__init__.__code__.co_names]
    missing += [name for name in ("read_paused",) if name not in FlowControl.__init__.__code__.co_names]
    if missing:
        raise RuntimeError(f"uvicorn {uvicorn.__version__} lacks {', '.join(missing)}")


class _Stop(Exception):
    """Ends the parsing of a read from within a callback: the connection has had its last answer."""


class DataProtocol(HttpToolsProtocol):
    """One client connection. `protocol_for` makes the class that uvicorn takes."""

    plane: ClassVar[DataPlane]
    cycle: Any
    """An Exchange, a RequestResponseCycle of uvicorn, or None."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active: Exchange | None = None
        self._control: RequestResponseCycle | None = None
        self.pipeline: deque[tuple[Any, Any]]
        self._phase = _IDLE
        self._messages = 0
        self._fed = 0
        self._read = 0
        self._body_bytes = 0
        self._stopped = False
        # A state that no connection is in, so that the first sweep starts the clock and does not end a connection that has just come.
        self._swept: tuple[int, int, int] = (-1, _IDLE, 0)
        self._swept_at = 0.0
        self._writing_paused_at = 0.0
        self._unsent = 0
        self._body_limit = 0
        self._streams = self._large = self._closes = False
        self._on_lost: Callable[[], None] | None = None
        self._linger_until = 0.0
        self._proven = False
        self._origin = ""

    # The transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        plane = self.plane
        if len(plane.connections) >= plane.limits.max_connections and not plane.draining:
            oldest = plane.newcomers.oldest()
            if oldest is not None:
                oldest.shed()
        if len(plane.connections) >= plane.limits.max_connections or plane.draining:
            self._stopped = True
            transport.abort()
            return
        plane.connections.add(self)
        self._origin = origin(self.client[0]) if self.client else ""
        self._wait_for_proof()

    def _wait_for_proof(self) -> None:
        surplus = self.plane.newcomers.add(self, self._origin)
        if surplus is not None:
            surplus.shed()

    def shed(self) -> None:
        """Ends a connection whose client has not shown a key, to make room for another; its place is free at once."""
        self.plane.connections.discard(self)
        self._stopped = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.plane.connections.discard(self)
        self.plane.newcomers.remove(self)
        self._stopped = True
        active, self.active = self.active, None
        if active is not None:
            active.abandon()
        control = self._control
        if control is not None and not control.response_complete:
            control.disconnected = True
            control.message_event.set()
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._stopped:
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._read = len(data)
        if self._phase != _BODY:
            self._fed += len(data)
            if self._phase == _HEAD and self._fed > self.plane.limits.max_head_bytes:
                self._refuse_message(Refusal(431, "the request's head is too long", close=True))
                return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse_message(Refusal(400, "this server upgrades to no other protocol", close=True))
        except httptools.HttpParserCallbackError as error:
            if not self._stopped:
                # A bug of ours: the place of the answer in the line cannot be trusted any more.
                _log.error("a request could not be handled", exc_info=error.__context__ or error)
                self._stopped = True
                self.transport.abort()
        except httptools.HttpParserError:
            if not self._stopped:
                self._refuse_message(Refusal(400, "this is not HTTP", close=True))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_paused_at = self.loop.time()
        self._unsent = self.transport.get_write_buffer_size()
        if self.active is not None:
            self.active.pause_stream()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing_paused_at = 0.0
        if self.active is not None:
            self.active.resume_stream()

    def linger(self) -> None:
        """The last answer is written, but the client may still be sending: a close now would reset the connection under the answer.

        So only the sending side closes; what still comes is thrown away, until the client closes or the sweep does.
        """
        self._stopped = True
        self._linger_until = self.loop.time() + self.plane.limits.linger_s
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    # httptools

    def on_message_begin(self) -> None:
        if self._stopped:
            raise _Stop
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._phase = _HEAD
        self._messages += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase != _HEAD:
            # Trailers of a chunked body: nobody reads them, so nobody shall fill memory with them.
            self._body_bytes += len(name) + len(value)
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        plane = self.plane
        limits = plane.limits
        if self._fed > limits.max_head_bytes or self._read > limits.max_head_bytes:
            # One read may bring many messages, or one long head that the count in `data_received` comes too late for.
            head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head > limits.max_head_bytes:
                self._refuse_message(Refusal(431, "the request's head is too long", close=True))
                raise _Stop
        self._phase = _BODY
        self._fed = 0
        self._body_bytes = 0
        self._body_limit = limits.max_body_bytes
        self._streams = self._large = self._closes = False
        headers = dict(self.headers)
        target = plane.routes.targets.get(self.url)
        version = self.parser.get_http_version()
        refusal = self._wrong_head(headers, version)
        if target is None and refusal is None:
            path = self._path()
            if not path:
                refusal = Refusal(400, "the request's target cannot be read", close=True)
            elif kv2.is_data_path(path):
                target = plane.routes.targets.get(path)
                refusal = self._too_long(headers)
            else:
                self._stream_limit(path, headers)
                refusal = self._too_long(headers)
                if refusal is None:
                    self._to_control(headers)
                    return
        elif refusal is None:
            refusal = self._too_long(headers)
        keep_alive = self.parser.should_keep_alive() and not plane.draining
        exchange = self._exchange(target, headers, refusal, keep_alive)
        exchange.http_1_0 = version == "1.0"
        previous = self.cycle
        self.cycle = exchange
        if previous is None or previous.response_complete:
            self.active = exchange
            exchange.begin()
        else:
            self._queue(exchange)
        if self._stopped:
            raise _Stop

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if type(cycle) is Exchange:
            if cycle.response_complete or cycle.refusal is not None:
                return
            if not cycle.feed(body):
                self._too_large(cycle)
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._body_limit:
            self._refuse_message(Refusal(413, self._limit_text(), close=True))
            raise _Stop
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = _BUSY
        cycle = self.cycle
        if not self._proven:
            self._whole(cycle)
        if type(cycle) is not Exchange:
            super().on_message_complete()
            return
        if cycle.response_complete:
            self._phase = _IDLE
            if self.plane.draining:
                self.transport.close()
            return
        cycle.received = True
        if cycle.turn and cycle.refusal is None:
            cycle.run()

    def _whole(self, cycle: Any) -> None:
        """A message is whole. With a key it proves the connection; else it is our turn, and nothing is shed that is being answered."""
        if type(cycle) is Exchange:
            grant = cycle.grant
        else:
            headers = dict(self.headers)
            grant = self.plane.access.identify(headers.get(b"authorization"), headers.get(b"x-api-key"))
        self._proven = grant is not None
        if self._proven or not cycle.response_complete:
            self.plane.newcomers.remove(self)

    # uvicorn's cycle of requests

    def on_response_complete(self) -> None:
        # As the base class, but for the timer that it sets after every answer: the sweep closes idle connections.
        self.server_state.total_requests += 1
        self.active = None
        self._on_lost = None
        if not self._proven and not self.pipeline and not self.transport.is_closing():
            self._wait_for_proof()
        if self.transport.is_closing() or (self._stopped and not self.pipeline):
            return
        if self.cycle.response_complete:  # and not only one before it
            if self._streams and self._phase == _BODY:
                # Answered before the body was there: who was refused may have terabytes to send.
                self.linger()
                return
            if self._closes:
                self.transport.close()
                return
        if self._phase == _BUSY:
            self._phase = _IDLE
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if type(cycle) is Exchange:
            self.active = cycle
            cycle.begin()
        else:
            self._control = cycle
            super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Graceful stop: what is being answered or received is finished, then the connection closes."""
        if self.cycle is None or self.cycle.response_complete:
            if self._phase in (_IDLE, _BUSY):
                self.transport.close()
        else:
            self.cycle.keep_alive = False

    # The clockwork

    def sweep(self, now: float) -> None:
        """Ends what takes too long; called every second. Time is counted from the sweep that first saw a state, so a limit may be
        exceeded by a second, and a request pays nothing for it."""
        limits = self.plane.limits
        loop_now = self.loop.time()
        if self._linger_until:
            if loop_now >= self._linger_until:
                self.transport.abort()
            return
        if self._writing_paused_at:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self._unsent:
                self._writing_paused_at = loop_now
            self._unsent = unsent
            if loop_now - self._writing_paused_at > limits.stalled_reader_s:
                self.transport.abort()
                return
        # Of a large body, silence counts, and only the client's own: not that nobody reads it now.
        state = (self._messages, self._phase, self._body_bytes if self._large else 0)
        if state != self._swept or (self._large and self.flow.read_paused):
            self._swept, self._swept_at = state, now
            return
        waited = now - self._swept_at
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._phase == _HEAD:
            if waited > limits.head_timeout_s:
                self._refuse_message(Refusal(408, "the request's head took too long", close=True))
        elif self._phase == _BODY:
            if waited > limits.body_timeout_s:
                self._refuse_message(Refusal(408, "the request's body took too long", close=True))
        elif not busy and waited > limits.keep_alive_s:
            self.transport.close()

    # Inside

    def _path(self) -> bytes:
        """The path of a target that is not simply one of ours: with a query, in absolute form, or denied."""
        try:
            return httptools.parse_url(self.url).path or b""
        except httptools.HttpParserInvalidURLError:
            return b""

    def _wrong_head(self, headers: dict[bytes, bytes], version: str) -> Refusal | None:
        """What is wrong with a head that llhttp let through."""
        parser = self.parser
        if parser.should_upgrade():
            return Refusal(400, "this server upgrades to no other protocol", close=True)
        if len(headers) != len(self.headers):
            names = [name for name, _ in self.headers]
            twice = next((name for name in _ONCE if names.count(name) > 1), None)
            if twice is not None:
                return Refusal(400, f"the header {twice.decode()} comes twice", close=True)
        if len(self.headers) > self.plane.limits.max_headers:
            return Refusal(431, "too many headers", close=True)
        if version == "1.1":
            if b"host" not in headers:
                return Refusal(400, "the header host is missing", close=True)
        elif version != "1.0":
            return Refusal(505, "only HTTP/1.1 and HTTP/1.0 are spoken here", close=True)
        elif b"transfer-encoding" in headers:
            return Refusal(400, "HTTP/1.0 knows no transfer-encoding", close=True)
        coding = headers.get(b"transfer-encoding")
        if coding is not None and coding.lower() != b"chunked":
            return Refusal(501, "the only transfer coding spoken here is chunked", close=True)
        expected = headers.get(b"expect")
        if expected is not None and not self.expect_100_continue:
            return Refusal(417, "the only expectation met here is 100-continue", close=True)
        return None

    def _too_long(self, headers: dict[bytes, bytes]) -> Refusal | None:
        """The refusal of a body that says itself that it is larger than allowed. A streamed one is judged by the application."""
        length = headers.get(b"content-length")
        if self._streams or length is None or int(length) <= self._body_limit:
            return None
        return Refusal(413, self._limit_text(), close=True)

    def _stream_limit(self, path: bytes, headers: dict[bytes, bytes]) -> None:
        """Whether the application takes this body piece by piece, and how much of it. Then only silence counts against the client, and a
        connection whose client has shown a good key is not shed before the message is whole, which may take hours."""
        streamed = self.plane.streamed_body(self.parser.get_method(), path, headers)
        if streamed is None:
            return
        self._streams = True
        if streamed:
            self._body_limit = streamed
            self._large = True
            self.plane.newcomers.remove(self)

    def _exchange(self, target: Target | None, headers: dict[bytes, bytes], refusal: Refusal | None, keep_alive: bool) -> Exchange:
        plane = self.plane
        get = headers.get
        grant = plane.access.identify(get(b"authorization"), get(b"x-api-key"))
        op, endpoint = (target.op, target.endpoint) if target is not None else (Op.SERVER, None)
        exchange = Exchange(self, plane, op, endpoint, grant, keep_alive=keep_alive)
        exchange.inbound_trace = get(b"traceparent")
        own_id = get(b"x-request-id")
        if own_id is not None and len(own_id) <= 128 and own_id and _SAFE_ID.issuperset(own_id):
            exchange.client_request_id = own_id
        if refusal is None:
            refusal = self._denied(target, exchange, headers)
        if refusal is None and op is Op.INFER:
            refusal = self._infer_headers(exchange, headers)
        if self.expect_100_continue:
            if refusal is None:
                exchange.expects_continue = True
            else:
                # Whether the client will still send the body cannot be known, so nothing can follow.
                refusal.close = True
        exchange.refusal = refusal
        return exchange

    def _denied(self, target: Target | None, exchange: Exchange, headers: dict[bytes, bytes]) -> Refusal | None:
        if target is not None and target.op in (Op.LIVE, Op.READY):
            return self._method(target.op)
        grant = exchange.grant
        if grant is None:
            carried = b"authorization" in headers or b"x-api-key" in headers
            return Refusal(401, "the API key is not valid" if carried else "an API key is required", headers=_UNAUTHENTICATED)
        if target is None or (target.endpoint is not None and target.endpoint.route is None):
            return Refusal(404, "there is no such path or endpoint")
        wrong = self._method(target.op)
        if wrong is not None:
            return wrong
        if target.endpoint is not None and not grant.may_infer(target.endpoint.name):
            return Refusal(403, f"this key may not call the endpoint {target.endpoint.name}")
        return None

    def _method(self, op: Op) -> Refusal | None:
        if self.parser.get_method() == op.method:
            return None
        return Refusal(405, f"this path answers to {op.method.decode()} only", headers=b"allow: " + op.method + b"\r\n")

    def _infer_headers(self, exchange: Exchange, headers: dict[bytes, bytes]) -> Refusal | None:
        """The headers that few requests carry."""
        coding = headers.get(b"content-encoding")
        if coding is not None and coding.lower() != b"identity":
            return Refusal(415, "bodies are not taken compressed")
        exchange.affinity = headers.get(b"x-headrace-key", b"")
        length = headers.get(b"inference-header-content-length")
        if length is not None:
            if not length.isdigit() or len(length) > 9:
                return Refusal(400, "inference-header-content-length is not a number")
            exchange.json_length = int(length)
        arm = headers.get(b"x-headrace-arm")
        if arm is not None:
            if exchange.grant is None or not exchange.grant.may_choose_arm:
                return Refusal(403, "this key may not choose the arm")
            exchange.override = arm.decode("latin-1")
        return None

    def _to_control(self, headers: dict[bytes, bytes]) -> None:
        """Hands the message to the base class, which wants to see its beginning first."""
        url, own, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, own, expects
        self.scope["headers"] = own
        queued = len(self.pipeline)
        self.scope["extensions"] = {ON_LOST: {"tell": self._tell_when_lost}}
        super().on_headers_complete()
        if self.plane.draining:
            self.cycle.keep_alive = False
        if self._streams:
            # So that the base class leaves the close to `on_response_complete`, which knows whether the client is still sending.
            self._closes = not self.cycle.keep_alive
            self.cycle.keep_alive = True
        if len(self.pipeline) > queued:
            # The base class has stopped reading, which would hide a client that leaves from the request being answered.
            self.flow.resume_reading()
            if len(self.pipeline) > self.plane.limits.max_pipelined:
                self._stopped = True
                self.transport.abort()

    def _tell_when_lost(self, callback: Callable[[], None]) -> None:
        """Calls back once when the connection is lost before the request being answered has its whole answer."""
        self._on_lost = callback

    def _queue(self, exchange: Exchange) -> None:
        """A pipelined request waits for its turn; a client that sends too far ahead is cut off."""
        waiting = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if len(self.pipeline) >= self.plane.limits.max_pipelined or waiting > self.plane.limits.max_body_bytes:
            self._stopped = True
            self.transport.abort()
            raise _Stop
        self.pipeline.appendleft((exchange, self.app))

    def _too_large(self, exchange: Exchange) -> None:
        exchange.body = b""
        exchange.refusal = Refusal(413, self._limit_text(), close=True)
        if exchange.turn:
            exchange.run()
        self._stopped = True
        raise _Stop

    def _limit_text(self) -> str:
        return f"the body is larger than {self._body_limit or self.plane.limits.max_body_bytes} bytes"

    def _refuse_message(self, refusal: Refusal) -> None:
        """The last answer of this connection, behind those that are still being made; nothing more is read."""
        self._stopped = True
        if self.transport.is_closing():
            return
        current = self.cycle
        unfinished = current is not None and not current.response_complete
        if unfinished and self._phase == _BODY and type(current) is Exchange:
            # The message being read has its place in the line already.
            current.refusal = refusal
            if current.turn:
                current.run()
            return
        if unfinished and self._phase == _BODY:
            # A control request is running on what it has of its body: there is no answer to give in its place.
            self.transport.abort()
            return
        exchange = Exchange(self, self.plane, Op.SERVER, None, None, keep_alive=False)
        exchange.refusal = refusal
        self.cycle = exchange
        if unfinished:
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self.active = exchange
            exchange.begin()


def protocol_for(plane: DataPlane) -> type[DataProtocol]:
    """The protocol class for `uvicorn.Config(http=...)`."""
    return type("BoundDataProtocol", (DataProtocol,), {"plane": plane})
