"""Keeps the tables of the data plane up to date from Kafka's compacted topics, and their file from the tables."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from eventing.envelope import Received
from eventing.snapshots import SnapshotReader
from servicekit.clock import Clock
from servicekit.errors import Invalid

from gateway import translate
from gateway.plane import DataPlane
from gateway.state import StateFile

_log = logging.getLogger(__name__)

ROUTE = "route"
KEY = "key"
SAVE_EVERY_S = 1.0
PATIENCE_S = 3.0
"""With tables from the file, the gateway calls itself ready after this time though Kafka does not answer."""


class Feed:
    """A component: reads both topics through the readers given to `attach`, and starts with what the file holds."""

    name = "tables"

    def __init__(self, plane: DataPlane, state: StateFile, clock: Clock) -> None:
        self._plane = plane
        self._state = state
        self._clock = clock
        self._readers: list[SnapshotReader] = []
        self._saver: asyncio.Task[None] | None = None
        self._started_at = clock.monotonic()
        self._from_file = False

    def attach(self, *readers: SnapshotReader) -> None:
        """The readers that call `on_route` and `on_key`; started and stopped with this."""
        self._readers.extend(readers)

    async def start(self) -> None:
        """Serves what the file holds at once; Kafka may be away."""
        for kind, key, payload in self._state.load():
            apply = self._apply_route if kind == ROUTE else self._apply_key
            try:
                self._from_file |= apply(key, payload)
            except Invalid as error:
                _log.error("a %s in the table file is passed over: %s", kind, error)
        self._started_at = self._clock.monotonic()
        for reader in self._readers:
            await reader.start()
        self._saver = asyncio.create_task(self._save_forever(), name="table file")

    async def stop(self) -> None:
        for reader in self._readers:
            await reader.stop()
        if self._saver is not None:
            self._saver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._saver
            await self._save()

    async def wait(self) -> None:
        """Raises when a reader has failed for good."""
        await asyncio.gather(*(reader.wait() for reader in self._readers))

    def ready(self) -> str | None:
        """None once the topics were read to their ends; also when Kafka is away and there are tables from the file."""
        reasons = [reason for reader in self._readers if (reason := reader.ready()) is not None]
        if not reasons or (self._from_file and self._clock.monotonic() - self._started_at > PATIENCE_S):
            return None
        return "; ".join(reasons)

    def on_route(self, key: str, event: Received | None) -> None:
        """For the reader of headrace.routes. Raises Invalid for what is no route."""
        self._take(key, event, "route.changed", self._apply_route)

    def on_key(self, key: str, event: Received | None) -> None:
        """For the reader of headrace.access. Raises Invalid for what is no key."""
        self._take(key, event, "access.changed", self._apply_key)

    def _take(self, key: str, event: Received | None, type: str, apply: Callable[[str, bytes], bool]) -> None:
        if event is None:
            # A tombstone only makes room in the log; that something is gone is said by a snapshot.
            return
        if event.type != type:
            _log.info("event type %s is passed over", event.type)
            return
        apply(key, event.payload)

    def _apply_route(self, key: str, payload: bytes) -> bool:
        spec = translate.route(payload)
        if not self._plane.routes.apply(spec, self._clock.monotonic()):
            return False
        self._state.put(ROUTE, key, payload)
        return True

    def _apply_key(self, key: str, payload: bytes) -> bool:
        if not self._plane.access.apply(translate.key(payload)):
            return False
        self._state.put(KEY, key, payload)
        return True

    async def _save_forever(self) -> None:
        while True:
            await self._clock.sleep(SAVE_EVERY_S)
            await self._save()

    async def _save(self) -> None:
        if not self._state.dirty:
            return
        content = self._state.snapshot()
        try:
            await asyncio.to_thread(self._state.write, content)
        except OSError as error:
            # It serves on: the file is only for the next start.
            _log.error("the table file could not be written: %s", error)
