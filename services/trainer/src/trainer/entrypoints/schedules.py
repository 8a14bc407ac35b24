"""Looks at the cron triggers of deliveries, and starts what is due."""

from __future__ import annotations

import logging

from eventing.background import Background
from servicekit import db
from servicekit.errors import Transient

from trainer.handlers import Trainer

EVERY_S = 10.0
_log = logging.getLogger(__name__)


class Schedules(Background):
    """Looks every `every_s` seconds. Every replica runs one: the same training is never started twice. Waits while the database is away."""

    def __init__(self, trainer: Trainer, every_s: float = EVERY_S) -> None:
        super().__init__("schedules")
        self._trainer = trainer
        self._every_s = every_s

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._trainer.start_scheduled()
            except Exception as exc:
                if not isinstance(exc, Transient) and not db.is_transient(exc):
                    raise
                _log.warning("cannot look for what is due: %r", exc)
            await self._pause(self._every_s)
