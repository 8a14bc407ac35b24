"""One request on the data path, from its headers to the answer: the object that takes the place of uvicorn's request cycle.

It is assigned an arm, sends its bytes to a runtime over a kept connection, and writes the answer, without a task, a future or
a call to another service. `run` is called when the request is whole and all answers before it on its connection are written.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway import kv2
from gateway.assign import pick
from gateway.kv2 import Op
from gateway.routes import Arm, Endpoint, Route
from gateway.tracing import Trace
from gateway.upstream import Connection, Failure

if TYPE_CHECKING:
    from gateway.access import Grant
    from gateway.callers import Account
    from gateway.plane import DataPlane
    from gateway.server import DataProtocol

REQUEST_FAULTS: Final = frozenset({400, 413, 415, 422})
"""Statuses of a runtime that blame the request: given to the caller, and not counted against the arm. When a canary says so, the
baseline is asked too: what it accepts was no fault of the request."""

_STATUS_OF: Final = {Failure.TIMEOUT: 504, Failure.CONNECT: 502, Failure.CLOSED: 502, Failure.PROTOCOL: 502, Failure.SATURATED: 503}
_SPAN_NAMES: Final = {
    Op.INFER: "POST /v2/models/{endpoint}/infer",
    Op.MODEL: "GET /v2/models/{endpoint}",
    Op.MODEL_READY: "GET /v2/models/{endpoint}/ready",
    Op.SERVER: "GET /v2",
    Op.LIVE: "GET /v2/health/live",
    Op.READY: "GET /v2/health/ready",
}
_JSON: Final = b"application/json"


class _NoEvent:
    """Stands for the event by which uvicorn wakes a request cycle's task; there is no task here."""

    def set(self) -> None:
        """Nobody waits."""


class Refusal(Exception):
    """An answer without asking a runtime. `close`: the rest of what the client sends is not wanted."""

    def __init__(self, status: int, message: str, *, close: bool = False, headers: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.close = close
        self.headers = headers


class Exchange:
    """A `Receiver` of the upstream pool, and what uvicorn's protocol expects of its current cycle."""

    # Read by uvicorn's connection and its graceful shutdown.
    response_complete = False
    disconnected = False
    message_event = _NoEvent()

    # Defaults that most requests never change: an attribute set here costs a request nothing.
    wire = b""
    deadline = 0.0
    connection: Connection | None = None
    body: bytes | bytearray = b""
    received = False
    turn = False
    refusal: Refusal | None = None
    expects_continue = False
    http_1_0 = False
    override: str | None = None
    affinity = b""
    json_length: int | None = None
    inbound_trace: bytes | None = None
    client_request_id: bytes | None = None
    arrived = 0.0
    asking = False
    """A runtime is at work on it."""
    counts: Account | None = None
    retried = False
    fell_back = False
    doubted = False
    """The canary blames the request; the baseline is asked whether it does too."""
    streaming = False
    chunked = False
    stream_elapsed = 0.0
    failure: str | None = None
    served = b""
    """Which version and arm answer, as headers; empty while none does."""

    # Set on the way; what reads them comes later on it.
    endpoint: Endpoint
    ids: Trace
    route: Route
    assigned: Arm
    serving: Arm

    def __init__(
        self, server: DataProtocol, plane: DataPlane, op: Op, endpoint: Endpoint | None, grant: Grant | None, *, keep_alive: bool
    ) -> None:
        self.server = server
        self.plane = plane
        self.op = op
        if endpoint is not None:
            self.endpoint = endpoint
        self.grant = grant
        self.keep_alive = keep_alive

    # What the server tells

    def feed(self, data: bytes) -> bool:
        """More of the body. False when it is more than is allowed."""
        if not self.body:
            self.body = data
        elif type(self.body) is bytes:
            self.body = bytearray(self.body) + data
        else:
            self.body += data
        return len(self.body) <= self.plane.limits.max_body_bytes

    def begin(self) -> None:
        """Every answer before this one on the connection is written."""
        self.turn = True
        if self.received or self.refusal is not None:
            self.run()
        elif self.expects_continue:
            self.server.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def run(self) -> None:
        """Answers the request, at once or when the runtime has."""
        self.ids = Trace(self.plane.sampling_bound, self.inbound_trace)
        try:
            if self.refusal is not None:
                raise self.refusal
            if self.op is Op.INFER:
                self._infer()
            else:
                self._ask()
        except Refusal as refusal:
            self._refuse(refusal)

    def abandon(self) -> None:
        """The client is gone: what runs for it is dropped."""
        if self.disconnected or self.response_complete:
            return
        self.disconnected = True
        if not self.asking:
            return
        state = self.serving.state
        state.gave_up()
        state.pool.cancel(self)
        if self.counts is not None:
            self.counts.left(self.route, monotonic() - self.arrived)
        if self.ids.sampled:
            self._span(499, None)

    # Asking

    def _infer(self) -> None:
        endpoint = self.endpoint
        route = endpoint.route
        if route is None:
            raise _unknown(endpoint.name)
        if len(self.body) > kv2.HARMLESS and kv2.too_deep(bytes(self.body[: self.json_length])):
            raise Refusal(400, f"the body is nested more than {kv2.MAX_DEPTH} deep")
        self.route = route
        now = monotonic()
        if self.override is None:
            subject = self.grant.subject_bytes if self.grant is not None else b""
            arm = route.single or pick(route, subject, self.affinity)
            if route.counts_callers:
                may_name = self.grant is not None and self.grant.may_name_callers
                self.counts = self.plane.callers.account(route, arm, subject, self.affinity, now, may_name=may_name)
            else:
                self.counts = counts = arm.counts
                counts.requests += 1
                counts.pending += 1
        else:
            chosen = route.named(self.override)
            if chosen is None:
                raise Refusal(400, f"endpoint {endpoint.name} has no arm {self.override}")
            arm = chosen
        self.assigned = arm
        self.arrived = now
        self._send(arm, now)

    def _ask(self) -> None:
        """The paths that are not inference: answered here, or by the baseline's runtime."""
        op = self.op
        if op is Op.LIVE:
            self._answer(200, b"{}")
        elif op is Op.READY:
            reason = self.plane.not_ready()
            if reason is not None:
                raise Refusal(503, reason)
            self._answer(200, b"{}")
        elif op is Op.SERVER:
            self._answer(200, kv2.SERVER_METADATA)
        else:
            route = self.endpoint.route
            if route is None:
                raise _unknown(self.endpoint.name)
            self.route = route
            self.arrived = monotonic()
            self.assigned = self.route.baseline
            self._send(self.assigned, self.arrived)

    def _send(self, arm: Arm, now: float) -> None:
        route = self.route
        state = arm.state
        if not state.admit(now):
            self.served = b""
            self._attempt_failed(503, "the arm takes no more requests now", final_headers=b"retry-after: 1\r\n")
            return
        self.serving = arm
        self.asking = True
        self.served = arm.served_headers
        self.deadline = now + route.timeout_s
        if self.op is Op.INFER:
            body = self.body
            head = arm.infer_head
            if self.json_length is not None:
                head = head.replace(
                    b"application/json\r\ncontent-length: ",
                    b"application/octet-stream\r\ninference-header-content-length: %d\r\ncontent-length: " % self.json_length,
                )
            self.wire = b"".join((head, b"%d" % len(body), b"\r\ntraceparent: ", self.ids.traceparent, b"\r\n\r\n", body))
        else:
            head = arm.model_head if self.op is Op.MODEL else arm.ready_head
            self.wire = b"".join((head, b"traceparent: ", self.ids.traceparent, b"\r\n\r\n"))
        state.pool.submit(self)

    # What the upstream tells

    def answered(self, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
        arm, route, endpoint = self.serving, self.route, self.endpoint
        self.asking = False
        arm.state.succeeded()
        if status != 200:
            self._judge(status, fields, body)
            return
        counts = self.counts
        if counts is not None:
            elapsed = monotonic() - self.arrived
            if self.fell_back:
                assert self.assigned is not None  # noqa: S101
                counts.failed(route, self.assigned.name, elapsed, fallback=True)
            else:
                counts.answered(route, elapsed)
        span = kv2.name_span(body, b"model_name" if self.op is Op.INFER else b"name")
        ids = self.ids
        if fields.get(b"content-type") == _JSON:
            head, extra = arm.answer_head, b""
        else:
            head, extra = self._unusual_head(arm, fields, span)
        if span is not None:
            body = b"".join((body[: span[0]], endpoint.name_bytes, body[span[1] :]))
        self.server.transport.write(
            b"".join((head, ids.request_id, b"\r\ntraceparent: ", ids.traceparent, extra, self._tail(), b"%d\r\n\r\n" % len(body), body))
        )
        request = self.body
        self._finish()
        if ids.sampled or self.fell_back:
            self._span(200, self.failure)
        if route.shadow is not None and counts is not None and arm is route.baseline:
            self.plane.shadows.offer(route, request, body, ids, self.json_length)

    def crashed(self) -> None:
        # A fault of ours says nothing about the arm.
        if self.counts is not None and not self.response_complete:
            self.counts.not_counted()
            self.counts = None
        self.server.transport.abort()

    def failed(self, failure: Failure, *, stale: bool) -> None:
        arm = self.serving
        if stale and not self.retried:
            # The runtime closed the kept connection while the request was on its way: nothing of it was answered, and a V2
            # inference may be repeated.
            self.retried = True
            arm.state.pool.submit(self, fresh=True)
            return
        self.asking = False
        arm.state.failed(failure, monotonic())
        if self.streaming:
            self._stream_broken(failure)
            return
        self._attempt_failed(_STATUS_OF[failure], failure.value)

    def stream_started(self, status: int, fields: dict[bytes, bytes], body: bytes) -> bool:
        arm, endpoint = self.serving, self.endpoint
        if status != 200:
            self.asking = False
            arm.state.succeeded()
            self._attempt_failed(502, "the runtime's error is too long")
            return False
        self.streaming = True
        self.stream_elapsed = monotonic() - self.arrived
        span = kv2.name_span(body, b"model_name" if self.op is Op.INFER else b"name")
        length = fields.get(b"content-length")
        head, extra = self._unusual_head(arm, fields, span)
        change = 0
        if span is not None:
            change = len(endpoint.name_bytes) - (span[1] - span[0])
            body = body[: span[0]] + endpoint.name_bytes + body[span[1] :]
        if length is not None:
            framing = b"content-length: %d" % (int(length) + change)
        elif self.http_1_0:
            self.keep_alive = False
            framing = b"connection: close"
        else:
            self.chunked = True
            framing = b"transfer-encoding: chunked"
        tail = self._tail().removesuffix(b"content-length: ")
        self.server.transport.write(
            b"".join((head, self.ids.request_id, b"\r\ntraceparent: ", self.ids.traceparent, extra, tail, framing, b"\r\n\r\n"))
        )
        self.stream_continued(body)
        return True

    def stream_continued(self, data: bytes) -> None:
        if self.disconnected:
            return
        if self.connection is not None:
            self.connection.deadline = monotonic() + self.route.timeout_s
        self.server.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def stream_ended(self) -> None:
        arm, route = self.serving, self.route
        self.asking = False
        arm.state.succeeded()
        if self.chunked:
            self.server.transport.write(b"0\r\n\r\n")
        if self.counts is not None:
            if self.fell_back:
                self.counts.failed(route, self.assigned.name, self.stream_elapsed, fallback=True)
            else:
                self.counts.answered(route, self.stream_elapsed)
        self._finish()
        if self.ids.sampled or self.fell_back:
            self._span(200, self.failure)

    def pause_stream(self) -> None:
        """The client reads slower than the runtime writes."""
        if self.streaming and self.connection is not None:
            self.connection.pause()
            self.connection.deadline = float("inf")

    def resume_stream(self) -> None:
        if self.streaming and self.connection is not None:
            self.connection.deadline = monotonic() + self.route.timeout_s
            self.connection.resume()

    # Outcomes

    def _judge(self, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
        """An answer that is not 200: whose fault is it?"""
        if self.op is not Op.INFER:
            self._pass_on(status, body)
            return
        unknown = status == 404 or (status in REQUEST_FAULTS and kv2.is_unknown_model(body))
        if status in REQUEST_FAULTS and not unknown:
            if self._may_fall_back() and self.assigned is not self.route.baseline and self._fault() is None:
                self.doubted = True
                self._attempt_failed(status, "", body=body)
            else:
                self._blame_request(status, body)
            return
        if unknown or status >= 500:
            wrong = self._fault()
            if wrong is not None:
                self._blame_request(400, kv2.error_body(wrong))
                return
        if unknown:
            self._attempt_failed(503, "the model is not loaded", unknown_model=True)
        elif status >= 500 or status == 429:
            self._attempt_failed(status, f"the runtime answered {status}", body=body)
        else:
            self._attempt_failed(502, f"the runtime answered {status}")

    def _fault(self) -> str | None:
        """What is wrong with the request in itself. Bytes of tensors behind its JSON are not looked at; there may be no JSON at all."""
        return None if self.json_length == 0 else kv2.fault(bytes(self.body[: self.json_length]))

    def _blame_request(self, status: int, body: bytes) -> None:
        if self.counts is not None:
            self.counts.not_counted()
        self.fell_back = False
        self._pass_on(status, body)

    def _pass_on(self, status: int, body: bytes) -> None:
        """A runtime's own words, with the endpoint's name in place of the runtime's."""
        self._answer(status, body.replace(self.serving.runtime_model, self.endpoint.name_bytes))

    def _may_fall_back(self) -> bool:
        return self.op is Op.INFER and not self.fell_back and self.override is None

    def _attempt_failed(
        self, status: int, message: str, *, body: bytes | None = None, unknown_model: bool = False, final_headers: bytes = b""
    ) -> None:
        """The serving arm failed before the first byte: the stand-in answers, or else the error does."""
        route, assigned = self.route, self.assigned
        self.failure = self.failure or ("unknown_model" if unknown_model else str(status))
        if self._may_fall_back() and (assigned is not route.baseline or unknown_model):
            other = route.stand_in(assigned)
            if other is not None:
                self.fell_back = True
                self._send(other, monotonic())
                return
        if self.counts is not None:
            if self.doubted:
                # The canary blamed the request and the baseline could not say: no evidence.
                self.counts.not_counted()
            else:
                self.counts.failed(route, assigned.name, monotonic() - self.arrived, fallback=False)
        if body is not None:
            self._pass_on(status, body)
        else:
            self._answer(status, kv2.error_body(message), final_headers)

    def _stream_broken(self, failure: Failure) -> None:
        """The answer ended in its middle: the client must not take what it has for the whole."""
        if self.counts is not None:
            self.counts.failed(self.route, self.assigned.name, self.stream_elapsed, fallback=False)
            self.counts = None
        self._span(502, failure.name.lower())
        self.response_complete = True
        self.server.transport.abort()

    # Writing

    def _refuse(self, refusal: Refusal) -> None:
        if refusal.close:
            self.keep_alive = False
        self._answer(refusal.status, kv2.error_body(refusal.message), refusal.headers, linger=refusal.close)

    def _answer(self, status: int, body: bytes, headers: bytes = b"", *, linger: bool = False) -> None:
        """Writes an answer that is not a runtime's 200."""
        extra = headers.removesuffix(b"\r\n")
        extra = b"\r\n" + extra if extra else b""
        self.server.transport.write(
            b"".join(
                (
                    STATUS_LINE[status],
                    b"content-type: application/json\r\n",
                    self.served,
                    b"x-request-id: ",
                    self.ids.request_id,
                    b"\r\ntraceparent: ",
                    self.ids.traceparent,
                    extra,
                    self._tail(),
                    b"%d\r\n\r\n" % len(body),
                    body,
                )
            )
        )
        self._finish(linger=linger)
        if self.ids.sampled or status >= 500:
            self._span(status, self.failure or (str(status) if status >= 500 else None))

    def _tail(self) -> bytes:
        """The headers behind traceparent, up to the value of content-length."""
        if not self.fell_back and self.client_request_id is None and not self.http_1_0 and self.keep_alive:
            return self.plane.plain_tail
        parts = [b"\r\n"]
        if self.fell_back:
            parts += [b"x-headrace-fallback: ", self.assigned.name.encode(), b"\r\n"]
        if self.client_request_id is not None:
            parts += [b"x-client-request-id: ", self.client_request_id, b"\r\n"]
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        elif self.http_1_0:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(self.plane.plain_tail.removeprefix(b"\r\n"))
        return b"".join(parts)

    def _unusual_head(self, arm: Arm, fields: dict[bytes, bytes], span: tuple[int, int] | None) -> tuple[bytes, bytes]:
        """Head and extra header of an answer that is not plain JSON: binary tensors, whose JSON part has its length in a header."""
        content_type = fields.get(b"content-type", _JSON)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: " + content_type + b"\r\n" + arm.named_headers
        length = fields.get(b"inference-header-content-length")
        if length is None or not length.isdigit():
            return head, b""
        change = 0
        if span is not None:
            change = len(self.endpoint.name_bytes) - (span[1] - span[0])
        return head, b"\r\ninference-header-content-length: %d" % (int(length) + change)

    def _finish(self, *, linger: bool = False) -> None:
        self.response_complete = True
        # An idle connection keeps its last exchange, which must not keep the bytes.
        self.body = self.wire = b""
        server = self.server
        if linger:
            server.linger()
        elif not self.keep_alive:
            server.transport.close()
        server.on_response_complete()

    def _span(self, status: int, error: str | None) -> None:
        attributes: dict[str, Any] = {
            "http.request.method": self.op.method.decode(),
            "http.response.status_code": status,
            "headrace.request_id": self.ids.request_id.decode(),
        }
        if self.arrived:
            route, assigned = self.route, self.assigned
            attributes["headrace.endpoint"] = self.endpoint.name
            attributes["headrace.route_revision"] = route.spec.revision
            attributes["headrace.assigned_arm"] = assigned.name
            if route.spec.rollout_id:
                attributes["headrace.rollout_id"] = route.spec.rollout_id
        if self.grant is not None:
            attributes["headrace.key_id"] = self.grant.key_id
        if self.served:
            arm = self.serving.spec
            attributes["headrace.arm"] = arm.name
            attributes["headrace.model"] = arm.model
            attributes["headrace.model_version"] = arm.version
            attributes["headrace.fallback"] = self.fell_back
            attributes["server.address"] = arm.upstream
        elapsed = monotonic() - self.arrived if self.arrived else 0.0
        self.plane.spans.record(self.ids, _SPAN_NAMES[self.op], elapsed, attributes, error=error)


def _unknown(endpoint: str) -> Refusal:
    return Refusal(404, f"there is no endpoint {endpoint}")
