"""The use case of the audit log: reading it. Nothing else can be done with it."""

from __future__ import annotations

from collections.abc import Sequence

from registry.ports import AuditRow, Store


class AuditTrail:
    """Reads the audit log."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def page(self, target: str, below: int, limit: int) -> Sequence[AuditRow]:
        """Rows of a target and what lies under it (empty: all), newest first, with ids below `below` (0: all)."""
        async with self._store.transaction() as session:
            return await session.audit.read(target, below, limit)
