"""The data plane of one process: its tables, its connections, its windows, and the clockwork that none of its requests pays for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from time import monotonic
from typing import TYPE_CHECKING

from gateway.access import AccessTable
from gateway.arms import ArmLimits, ArmStates
from gateway.callers import CallerBook
from gateway.kv2 import FIXED_PATHS
from gateway.newcomers import Newcomers
from gateway.routes import Endpoint, Route, RouteTable
from gateway.shadow import ShadowLimits, Shadows
from gateway.tracing import Spans, sampling_bound
from gateway.upstream import Pool
from gateway.windows import WindowBook

if TYPE_CHECKING:
    from gateway.server import DataProtocol

_log = logging.getLogger(__name__)

UPSTREAM_SWEEP_S = 0.25
MAX_UPSTREAM_CONNECTIONS = 16_384
LATE_S = 0.1
"""An event loop that is this late is overloaded: copies are dropped first."""


StreamedBody = Callable[[bytes, bytes, Mapping[bytes, bytes]], "int | None"]
"""(method, path, headers) of a request that is not the data path's -> None: its body has the limits of all others. Else the application
takes it piece by piece and refuses what is too long itself; so many bytes are let through, 0: as many as of any other."""


def _no_stream(method: bytes, path: bytes, headers: Mapping[bytes, bytes]) -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of the data path; bytes and seconds."""

    max_body_bytes: int = 8 * 1024 * 1024
    max_head_bytes: int = 32 * 1024
    max_headers: int = 100
    max_pipelined: int = 16
    max_connections: int = 4096
    newcomers_share: float = 0.25
    """Of the connections: what one address may hold without having sent a whole request with a valid key."""
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    stalled_reader_s: float = 30.0
    linger_s: float = 2.0
    stream_above: int = 1024 * 1024
    connect_timeout_s: float = 1.0
    upstream_idle_s: float = 30.0
    arm: ArmLimits = field(default_factory=ArmLimits)
    shadow: ShadowLimits = field(default_factory=ShadowLimits)


class DataPlane:
    """Everything that the data path of a process reads. Lives on one event loop; `start` and `stop` it there."""

    def __init__(
        self,
        upstreams: Iterable[str],
        limits: Limits | None = None,
        spans: Spans | None = None,
        sample_ratio: float = 0.0,
        not_ready: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`upstreams`: the configured runtimes, `host:port`. `not_ready` says why requests should go elsewhere, or None."""
        self.limits = limits or Limits()
        self.spans = spans or Spans()
        self.sampling_bound = sampling_bound(sample_ratio)
        self.not_ready = not_ready
        self.access = AccessTable()
        self.arms = ArmStates(self._make_pool, self.limits.arm)
        self.routes = RouteTable(upstreams, self.arms.of, FIXED_PATHS, self._route_changed)
        self.windows = WindowBook()
        self.callers = CallerBook()
        self.shadows = Shadows(self.limits.shadow, self.spans)
        self.connections: set[DataProtocol] = set()
        self.newcomers: Newcomers[DataProtocol] = Newcomers(max(1, int(self.limits.max_connections * self.limits.newcomers_share)))
        self.draining = False
        self.streamed_body: StreamedBody = _no_stream
        """Set once, before `start`, by who serves requests whose bodies are passed on while they come."""
        self.on_route: Callable[[], None] | None = None
        """Told when a revision is first served, so that it is acknowledged at once."""
        self.plain_tail = b""
        self._timer: asyncio.TimerHandle | None = None
        self._expected = 0.0
        self._ticks = 0
        self._date()

    def start(self) -> None:
        """Starts the sweeps."""
        self._expected = monotonic() + UPSTREAM_SWEEP_S
        self._timer = asyncio.get_running_loop().call_later(UPSTREAM_SWEEP_S, self._tick)

    def drain(self) -> None:
        """From now on every answer closes its connection."""
        self.draining = True
        self.shadows.drop_waiting()

    def stop(self) -> None:
        """Stops the sweeps and drops the connections to the runtimes."""
        if self._timer is not None:
            self._timer.cancel()
        for pool in self.arms.pools():
            pool.close()

    def _make_pool(self, upstream: str, shadow: bool) -> Pool:
        limits = self.limits
        host, _, port = upstream.rpartition(":")
        # Arms that share a runtime share its pool, and one that hangs must not use up what the others need: it is the arms
        # that are limited, each for itself.
        connections = limits.shadow.in_flight if shadow else MAX_UPSTREAM_CONNECTIONS
        return Pool(
            host.strip("[]"),
            int(port),
            max_connections=connections,
            max_waiting=connections + limits.shadow.waiting,
            connect_timeout_s=limits.connect_timeout_s,
            idle_timeout_s=limits.upstream_idle_s,
            stream_above=limits.stream_above,
        )

    def _route_changed(self, endpoint: Endpoint, old: Route | None, new: Route | None) -> None:
        self.windows.switch(endpoint.name, new, monotonic())
        if new is None or not new.counts_callers:
            self.callers.forget(endpoint.name)
        self.arms.keep(endpoint.name, [] if new is None else [arm.spec for arm in new.arms.values()])
        if self.on_route is not None:
            self.on_route()

    def _tick(self) -> None:
        now = monotonic()
        # First of all, so that an error in a sweep is logged and does not end the clockwork.
        self._timer = asyncio.get_running_loop().call_later(UPSTREAM_SWEEP_S, self._tick)
        self.shadows.overloaded = now - self._expected > LATE_S
        self._expected = now + UPSTREAM_SWEEP_S
        for pool in self.arms.pools():
            pool.sweep(now)
        self._ticks += 1
        if self._ticks % 4 == 0:
            self._date()
            self.routes.expire(now)
            for connection in list(self.connections):
                connection.sweep(now)

    def _date(self) -> None:
        # The headers that end every plain answer; the date costs nothing when it is written once per second.
        self.plain_tail = b"\r\ndate: " + formatdate(usegmt=True).encode() + b"\r\ncontent-length: "
