"""Tells the deployer what this process served: a window when it is decided, and a sign of life every second."""

from __future__ import annotations

import asyncio
import contextlib

from eventing.besteffort import BestEffortProducer
from eventing.topics import TRAFFIC
from servicekit.clock import Clock

from gateway import translate
from gateway.metrics import Metrics
from gateway.plane import DataPlane
from gateway.windows import Report

MEMBERSHIP_S = 1.0
_LEAST_WAIT_S = 0.001


class TrafficPublisher:
    """A component. Messages are numbered without gaps within a boot, so that a lost one is seen."""

    name = "traffic"

    def __init__(self, plane: DataPlane, producer: BestEffortProducer, clock: Clock, instance: str, boot_id: str, metrics: Metrics) -> None:
        self._plane = plane
        self._producer = producer
        self._clock = clock
        self._instance = instance
        self._boot_id = boot_id
        self._metrics = metrics
        self._sequence = 0
        self._sent_at = clock.monotonic()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to report."""
        self._plane.on_route = self._changed.set
        await self._producer.start()
        self._task = asyncio.create_task(self._run(), name="traffic windows")

    async def stop(self) -> None:
        """Says what is left and that this process is leaving, so that nobody waits for it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            now = self._clock.monotonic()
            for report in self._plane.windows.tick(now):
                self._send(report)
            for report in self._plane.windows.finish(now):
                self._send(report)
            self._send(Report(0.0, ()), leaving=True)
        await self._producer.stop()

    async def wait(self) -> None:
        """Raises what made it fail."""
        waits = [self._producer.wait()]
        if self._task is not None:
            waits.append(_joined(self._task))
        await asyncio.gather(*waits)

    async def _run(self) -> None:
        while True:
            now = self._clock.monotonic()
            self._changed.clear()
            for report in self._plane.windows.tick(now, membership=now - self._sent_at >= MEMBERSHIP_S):
                self._send(report)
                self._sent_at = now
            due = min(self._plane.windows.next_due(now), self._sent_at + MEMBERSHIP_S)
            await self._sleep(max(due - now, _LEAST_WAIT_S))

    async def _sleep(self, seconds: float) -> None:
        """Until then, or until a revision is first served: that is acknowledged at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _send(self, report: Report, *, leaving: bool = False) -> None:
        self._sequence += 1
        self._metrics.take(report)
        payload = translate.traffic(report, self._instance, self._boot_id, self._sequence, leaving=leaving)
        self._producer.send(TRAFFIC, self._instance, "traffic.window", payload)


async def _joined(task: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(task)
