"""Histories of metrics in PostgreSQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tracker.domain.run import Metric
from tracker.domain.search import Place
from tracker.histories import OfRun

COUNTED = 10_000
"""Points of a run that are counted for a sample; a longer history is looked into at places spread evenly over its steps."""

_MISSING = text(
    """
    SELECT given.run_id FROM unnest(CAST(:run_ids AS text[])) AS given (run_id)
    WHERE NOT EXISTS (SELECT 1 FROM tracker.run WHERE run.run_id = given.run_id)
    """
)

_PAGE = """
    SELECT step, timestamp_ms, value FROM tracker.metric_point WHERE run_id = :run_id AND key = :key {after}
    ORDER BY timestamp_ms, step, value LIMIT :most
"""
_FIRST_PAGE = text(_PAGE.format(after=""))
_LATER_PAGE = text(
    _PAGE.format(after="AND (timestamp_ms, step, value) > (CAST(:time AS bigint), CAST(:step AS bigint), CAST(:value AS double precision))")
)

_OF_RUNS = text(
    """
    SELECT run_id, step, timestamp_ms, value FROM tracker.metric_point WHERE run_id = ANY (CAST(:run_ids AS text[])) AND key = :key
    ORDER BY run_id, timestamp_ms, step, value LIMIT :most
    """
)

_LONG = text(
    """
    SELECT given.run_id FROM unnest(CAST(:run_ids AS text[])) AS given (run_id)
    WHERE (SELECT count(*) FROM (
        SELECT FROM tracker.metric_point AS own
        WHERE own.run_id = given.run_id AND own.key = :key AND own.step BETWEEN :first AND :last LIMIT :counted + 1
    ) AS counted) > :counted
    """
)

# The rule of MLflow: the history is cut into as many parts of the same number of points as are asked for, of each the first is taken,
# and the last of all takes the place of the last.
_SHORT = text(
    """
    WITH point AS (
        SELECT run_id, step, timestamp_ms, value, ntile(:points) OVER own AS part, row_number() OVER own AS place,
            count(*) OVER (PARTITION BY run_id) AS total
        FROM tracker.metric_point WHERE run_id = ANY (CAST(:run_ids AS text[])) AND key = :key AND step BETWEEN :first AND :last
        WINDOW own AS (PARTITION BY run_id ORDER BY step, timestamp_ms, value)
    ), first AS (
        SELECT DISTINCT ON (run_id, part) * FROM point ORDER BY run_id, part, place
    )
    SELECT run_id, step, timestamp_ms, value FROM first WHERE part < :points OR place = total
    UNION ALL
    SELECT run_id, step, timestamp_ms, value FROM point
    WHERE place = total AND NOT EXISTS (SELECT FROM first WHERE first.run_id = point.run_id AND first.place = total)
    ORDER BY run_id, step, timestamp_ms, value
    """
)

_OWN = "own.run_id = :run_id AND own.key = :key"

# Numeric, since the distance of two steps may be more than 64 bits hold.
_BY_STEP = text(
    f"""
    WITH span AS (
        SELECT min(step)::numeric AS low, max(step)::numeric AS high FROM tracker.metric_point AS own
        WHERE {_OWN} AND step BETWEEN :first AND :last
    )
    SELECT DISTINCT at.step, at.timestamp_ms, at.value
    FROM span, generate_series(0, CAST(:points AS int) - 1) AS part, LATERAL (
        SELECT step, timestamp_ms, value FROM tracker.metric_point AS own
        WHERE {_OWN} AND step >= CAST(low + floor((high - low + 1) * part / :points) AS bigint) AND step <= :last
        ORDER BY step, timestamp_ms, value LIMIT 1
    ) AS at
    """  # noqa: S608 - of constants
)

_BY_TIME = text(
    f"""
    SELECT DISTINCT at.step, at.timestamp_ms, at.value
    FROM unnest(CAST(:steps AS bigint[])) AS given (step),
    LATERAL (
        SELECT min(timestamp_ms)::numeric AS low, max(timestamp_ms)::numeric AS high FROM tracker.metric_point AS own
        WHERE {_OWN} AND own.step = given.step
    ) AS span,
    generate_series(0, CAST(:parts AS int) - 1) AS part, LATERAL (
        SELECT step, timestamp_ms, value FROM tracker.metric_point AS own
        WHERE {_OWN} AND own.step = given.step AND timestamp_ms >= CAST(low + floor((high - low + 1) * part / :parts) AS bigint)
        ORDER BY timestamp_ms, value LIMIT 1
    ) AS at
    """  # noqa: S608 - of constants
)

_LAST = text(
    f"""
    SELECT step, timestamp_ms, value FROM tracker.metric_point AS own WHERE {_OWN} AND step BETWEEN :first AND :last
    ORDER BY step DESC, timestamp_ms DESC, value DESC LIMIT 1
    """  # noqa: S608 - of constants
)

_EVERY_STEP = (-(2**63), 2**63 - 1)

_Point = tuple[int, int, float]
"""(step, time, value)."""


class SqlHistories:
    """Implements `histories.HistoryStore`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def missing(self, run_ids: Sequence[str]) -> Sequence[str]:
        async with self._engine.connect() as conn:
            return list((await conn.execute(_MISSING, {"run_ids": list(run_ids)})).scalars())

    async def page(self, run_id: str, key: str, after: Place | None, limit: int) -> Sequence[Metric]:
        values: dict[str, Any] = {"run_id": run_id, "key": key, "most": limit}
        if after is not None:
            values |= dict(zip(("time", "step", "value"), after, strict=True))
        async with self._engine.connect() as conn:
            rows = await conn.execute(_FIRST_PAGE if after is None else _LATER_PAGE, values)
            return [Metric(key, value, timestamp_ms, step) for step, timestamp_ms, value in rows]

    async def of_runs(self, run_ids: Sequence[str], key: str, limit: int) -> Sequence[OfRun]:
        async with self._engine.connect() as conn:
            rows = await conn.execute(_OF_RUNS, {"run_ids": list(run_ids), "key": key, "most": limit})
            return [(run_id, Metric(key, value, timestamp_ms, step)) for run_id, step, timestamp_ms, value in rows]

    async def sampled(self, run_ids: Sequence[str], key: str, steps: tuple[int, int] | None, points: int) -> Sequence[OfRun]:
        first, last = steps or _EVERY_STEP
        asked: dict[str, Any] = {"key": key, "first": first, "last": last}
        found: dict[str, list[_Point]] = defaultdict(list)
        async with self._engine.connect() as conn:
            long = (await conn.execute(_LONG, {**asked, "run_ids": list(run_ids), "counted": COUNTED})).scalars().all()
            short = [run_id for run_id in run_ids if run_id not in long]
            for run_id, *point in await _rows(conn, _SHORT, {**asked, "run_ids": short, "points": points}):
                found[run_id].append(tuple(point))
            for run_id in long:
                found[run_id] = await _spread(conn, {**asked, "run_id": run_id}, points)
        return [
            (run_id, Metric(key, value, timestamp_ms, step))
            for run_id in dict.fromkeys(run_ids)
            for step, timestamp_ms, value in found[run_id]
        ]


async def _spread(conn: AsyncConnection, asked: dict[str, Any], points: int) -> list[_Point]:
    """At most `points` of one long history, at even distances of its steps; of few steps at even distances of time within each."""
    found = [tuple(row) for row in await _rows(conn, _BY_STEP, {**asked, "points": points})]
    parts = points // len(found) if found else 0
    if parts > 1:
        of = {"run_id": asked["run_id"], "key": asked["key"], "steps": [step for step, _, _ in found], "parts": parts}
        found = [tuple(row) for row in await _rows(conn, _BY_TIME, of)]
    # NaN is no number to compare by, and the largest to PostgreSQL.
    found.sort(key=lambda point: (point[0], point[1], point[2] != point[2], point[2]))
    last = tuple((await _rows(conn, _LAST, asked))[0])
    if repr(found[-1]) == repr(last):
        return found
    return [*found[: points - 1], last]


async def _rows(conn: AsyncConnection, statement: TextClause, values: dict[str, Any]) -> Sequence[Any]:
    return (await conn.execute(statement, values)).all()
