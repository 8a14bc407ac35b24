"""One point of a metric in one round trip: what a training script sends at every step, and waits for."""

from __future__ import annotations

from typing import Any

from servicekit import db
from sqlalchemy.ext.asyncio import AsyncEngine

from tracker.domain.run import INT64, Metric

# The same as a batch of one does in a transaction (adapters.runs), if the run is one to which its token, or anybody, may log. The run is
# held against its end: who waits for it here looks at it again after that, and finds nothing.
_POINT = """
    WITH held AS MATERIALIZED (
        SELECT run_id, experiment_id, started_ms FROM tracker.run
        WHERE run_id = $1 AND status = 'RUNNING' AND lifecycle_stage = 'active' AND fencing_token <= $6
        FOR SHARE
    ), kept AS (
        INSERT INTO tracker.metric_point (run_id, key, step, timestamp_ms, value)
        SELECT run_id, $2, $3, $4, $5 FROM held
        ON CONFLICT DO NOTHING
    ), whole AS (
        DELETE FROM tracker.run_logged WHERE run_id IN (SELECT run_id FROM held)
    ), newest AS (
        INSERT INTO tracker.metric_latest AS latest (run_id, key, step, timestamp_ms, value, experiment_id, started_ms)
        SELECT run_id, $2, $3, $4, $5, experiment_id, started_ms FROM held
        ON CONFLICT (run_id, key) DO UPDATE
            SET step = excluded.step, timestamp_ms = excluded.timestamp_ms, value = excluded.value
            WHERE (latest.step, latest.timestamp_ms, latest.value) < (excluded.step, excluded.timestamp_ms, excluded.value)
    )
    SELECT count(*) FROM held
"""


class QuickLog:
    """Logs single points. Its engine need not test connections before it uses them: what fails here is done again in a transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def point(self, run_id: str, metric: Metric, fencing_token: int | None) -> bool:
        """Whether the point is stored. False for a run that does not run, belongs to a newer attempt, or is not there, and when the
        database cannot be asked: a transaction tells which. Repeatable."""
        newest = INT64.stop - 1 if fencing_token is None else fencing_token
        async with self._engine.connect() as conn:
            link: Any = (await conn.get_raw_connection()).driver_connection
            try:
                stored = await link.fetchval(_POINT, run_id, metric.key, metric.step, metric.timestamp_ms, metric.value, newest)
            except Exception as error:
                if not db.is_transient(error):
                    raise
                await conn.invalidate()
                return False
        return bool(stored)
