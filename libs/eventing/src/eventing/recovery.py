"""What an operator does when the log and the database no longer belong together: publish again, adopt another Kafka cluster.

Both are safe to do while everything runs, and to repeat: what a consumer has applied it drops by its sequence.
"""

# ruff: noqa: S608 - the one thing put into statements is the schema's name, which `schema.tables` has checked

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncEngine

from eventing.schema import tables


async def republish_since(engine: AsyncEngine, schema: str, since: datetime, topic: str | None = None) -> int:
    """Has the relay publish again what was written at `since` or later (of one topic, if given), with the same ids and sequences.

    Returns how many events. Reaches back as far as sent rows are kept.
    """
    where = "created_at >= $1 AND sent_at IS NOT NULL AND ($2::text IS NULL OR topic = $2)"
    async with engine.begin() as conn:
        statement = f"UPDATE {tables(schema).outbox} SET sent_at = NULL WHERE {where}"
        return (await conn.exec_driver_sql(statement, (since, topic))).rowcount


async def adopt_cluster(engine: AsyncEngine, schema: str, cluster_id: str) -> int:
    """After Kafka was replaced or wiped: this schema goes on with the cluster of this id.

    Its consumers begin at the first offset of every partition, and its relay publishes all events that the outbox still has, before any
    new one. Returns how many those are. Events that had left the outbox, and that a consumer had not applied, are lost: that consumer
    stops at the gap and names it.
    """
    made = tables(schema)
    async with engine.begin() as conn:
        await conn.exec_driver_sql(f"UPDATE {made.outbox_cluster} SET cluster_id = $1", (cluster_id,))
        moved = f"UPDATE {made.consumer_offset} SET cluster_id = $1, next_offset = 0 WHERE cluster_id <> $1"
        await conn.exec_driver_sql(moved, (cluster_id,))
        return (await conn.exec_driver_sql(f"UPDATE {made.outbox} SET sent_at = NULL WHERE sent_at IS NOT NULL")).rowcount
