"""Use case of the compacted topics: what was told last is told again, so that a log which lost it has it again."""

from __future__ import annotations

from registry.ports import Store

BATCH = 50
"""Snapshots of a kind in one transaction."""


class Snapshots:
    """API keys and deliveries."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def publish_again(self) -> bool:
        """Publishes a batch of those whose turn it is. Whether there may be more. Repeatable: a snapshot says what is so."""
        async with self._store.transaction() as session:
            counts = await session.keys.publish_again(BATCH), await session.deliveries.publish_again(BATCH)
        return max(counts) == BATCH
