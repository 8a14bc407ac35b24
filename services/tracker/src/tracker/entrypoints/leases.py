"""Looks for runs whose process has died: those whose lease is over are ended as FAILED."""

from __future__ import annotations

import logging

from eventing.background import Background, Backoff
from servicekit import db
from servicekit.errors import Transient

from tracker.handlers import Tracker

_BATCH = 50
_log = logging.getLogger(__name__)


class LeaseWatch(Background):
    """Looks every `every_s` seconds. Every replica runs one; they share the work. Waits while the database is away.

    Nobody can renew a lease while the tracker or its database is down, so it first looks `grace_s` seconds after either is back.
    """

    def __init__(self, tracker: Tracker, every_s: float, grace_s: float) -> None:
        super().__init__("leases")
        self._tracker = tracker
        self._every_s = every_s
        self._grace_s = grace_s

    async def _run(self) -> None:
        backoff = Backoff(most_s=5.0)
        away = True
        while not self._stopping.is_set():
            try:
                if away:
                    await self._tracker.ping()
                    away = False
                    await self._pause(self._grace_s)
                    continue
                ended = await self._tracker.fail_expired(_BATCH)
            except Exception as exc:
                if not isinstance(exc, Transient) and not db.is_transient(exc):
                    raise
                away = True
                _log.warning("cannot look for expired leases: %r", exc)
                await self._pause(backoff.next())
                continue
            backoff.reset()
            if ended:
                _log.info("%d runs have lost their lease", ended)
            if ended < _BATCH:
                await self._pause(self._every_s)
