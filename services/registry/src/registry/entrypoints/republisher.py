"""The component that publishes newest snapshots again when it is their turn."""

from __future__ import annotations

import logging

from eventing.background import Background
from servicekit import db

from registry.handlers.snapshots import Snapshots

POLL_S = 5.0

_log = logging.getLogger(__name__)


class Republisher(Background):
    """Looks whose turn it is. Several replicas share the work."""

    name = "republisher"

    def __init__(self, snapshots: Snapshots) -> None:
        super().__init__("republisher")
        self._snapshots = snapshots

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                while not self._stopping.is_set() and await self._snapshots.publish_again():
                    pass
            except Exception as error:
                if not db.is_transient(error):
                    raise
                _log.warning("snapshots cannot be published again now: the database is not available")
            await self._pause(POLL_S)
