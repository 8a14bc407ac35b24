"""Shadow copies: requests that a caller has had answered are sent once more, to the shadow arm, and the answers compared.

A copy begins when the caller's answer is written. It has its own connections, its own deadline and a bounded queue, and it is
what is dropped first when the gateway is busy; so it can delay, fail or reorder nothing. What is dropped is counted.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import Any

from opentelemetry.trace import SpanKind

from gateway.compare import Incomparable, differs, first_row_value
from gateway.routes import WHOLE, Arm, Route, ShadowSpec
from gateway.tracing import Spans, Trace
from gateway.upstream import Connection, Failure

_log = logging.getLogger(__name__)
_random = random.random


@dataclass(frozen=True, slots=True)
class ShadowLimits:
    """Copies in flight and waiting per process, their bytes together, the largest body worth a comparison, and the callers'
    requests in flight on an arm above which copies are dropped."""

    in_flight: int = 16
    waiting: int = 256
    max_bytes: int = 32 * 1024 * 1024
    max_body_bytes: int = 1024 * 1024
    busy_above: int = 64


class _Copy:
    """One copy; a `Receiver` of the shadow pool."""

    __slots__ = ("arm", "arrived", "connection", "deadline", "ids", "primary", "shadow", "shadows", "size", "wire")

    def __init__(self, shadows: Shadows, arm: Arm, shadow: ShadowSpec, wire: bytes, primary: bytes, ids: Trace, deadline: float) -> None:
        self.shadows = shadows
        self.arm = arm
        self.shadow = shadow
        self.wire = wire
        self.primary = primary
        self.ids = ids
        self.arrived = 0.0
        self.deadline = deadline
        self.size = len(wire) + len(primary)
        self.connection: Connection | None = None

    def answered(self, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
        counts = self.arm.counts
        different: bool | None = None
        if status != 200:
            counts.shadow_errors += 1
        else:
            try:
                different = differs(self.primary, body, self.shadow.tolerance)
            except Incomparable:
                _log.debug("the caller's answer has no JSON tensors to compare with")
            else:
                counts.shadow_compared += 1
                counts.shadow_different += different
        self.shadows.ended(self, str(status) if status != 200 else None, different)

    def stream_started(self, status: int, fields: dict[bytes, bytes], body: bytes) -> bool:
        # Longer than anything that is kept for comparison: the primary answer was not.
        self.arm.counts.shadow_errors += 1
        self.shadows.ended(self, "too_long", None)
        return False

    def stream_continued(self, data: bytes) -> None:
        """Never called: `stream_started` refuses."""

    def stream_ended(self) -> None:
        """Never called: `stream_started` refuses."""

    def crashed(self) -> None:
        self.shadows.ended(self, "crashed", None)

    def failed(self, failure: Failure, *, stale: bool) -> None:
        if stale:
            self.arm.state.shadow_pool.submit(self, fresh=True)
            return
        self.arm.counts.shadow_errors += 1
        self.shadows.ended(self, failure.name.lower(), None)


class Shadows:
    """The copies of this process: which requests get one, and how many are under way."""

    def __init__(self, limits: ShadowLimits, spans: Spans) -> None:
        self._limits = limits
        self._spans = spans
        self._waiting: deque[_Copy] = deque()
        self._in_flight = 0
        self._bytes = 0
        self.overloaded = False
        """Set by the plane while the event loop runs late."""

    def offer(self, route: Route, request: bytes | bytearray, answer: bytes, ids: Trace, json_length: int | None) -> None:
        """A request that its caller has had answered: a copy is made if the route asks for it and there is room."""
        shadow, arm = route.shadow, route.shadow_arm
        if shadow is None or arm is None or (shadow.share < WHOLE and _random() * WHOLE >= shadow.share):
            return
        if shadow.only_input and first_row_value(bytes(request), shadow.only_input) not in shadow.only_values:
            return
        limits = self._limits
        size = len(request) + len(answer)
        if (
            self.overloaded
            or json_length is not None
            or size > limits.max_body_bytes
            or self._bytes + size > limits.max_bytes
            or len(self._waiting) >= limits.waiting
            or route.baseline.state.in_flight > limits.busy_above
        ):
            arm.counts.shadow_shed += 1
            return
        if ids.sampled:
            ids = ids.child()
        wire = b"".join((arm.infer_head, b"%d" % len(request), b"\r\ntraceparent: ", ids.traceparent, b"\r\n\r\n", request))
        copy = _Copy(self, arm, shadow, wire, answer, ids, monotonic() + shadow.deadline_s)
        self._bytes += copy.size
        if self._in_flight < limits.in_flight:
            self._send(copy)
        else:
            self._waiting.append(copy)

    def _send(self, copy: _Copy) -> None:
        self._in_flight += 1
        copy.arrived = monotonic()
        copy.arm.counts.shadow_sent += 1
        copy.arm.state.shadow_pool.submit(copy)

    def ended(self, copy: _Copy, error: str | None, different: bool | None) -> None:
        """A copy is done; the next one that is still worth sending goes."""
        self._in_flight -= 1
        self._bytes -= copy.size
        if copy.ids.sampled:
            self._record(copy, error, different)
        if self._waiting:
            self._next()

    def _next(self) -> None:
        now = monotonic()
        while self._waiting and self._in_flight < self._limits.in_flight:
            copy = self._waiting.popleft()
            if now < copy.deadline:
                self._send(copy)
                return
            self._bytes -= copy.size
            copy.arm.counts.shadow_shed += 1

    def drop_waiting(self) -> None:
        """Drops the copies that have not been sent."""
        while self._waiting:
            copy = self._waiting.popleft()
            self._bytes -= copy.size
            copy.arm.counts.shadow_shed += 1

    def _record(self, copy: _Copy, error: str | None, different: bool | None) -> None:
        attributes: dict[str, Any] = {
            "headrace.arm": copy.arm.name,
            "headrace.model": copy.arm.spec.model,
            "headrace.model_version": copy.arm.spec.version,
            "headrace.request_id": copy.ids.request_id.decode(),
            "server.address": copy.arm.spec.upstream,
        }
        if different is not None:
            attributes["headrace.shadow_different"] = different
        self._spans.record(copy.ids, "shadow copy", monotonic() - copy.arrived, attributes, error=error, kind=SpanKind.CLIENT)
