"""The rows that the tracking figures search, written straight into the tables of both servers: random, of the same shape in both."""

from __future__ import annotations

import hashlib

import asyncpg
from localstack.layout import Stack
from localstack.schemas import DATABASE
from tracker.adapters import logged

from tests.bench.plain_http import START_MS

HUNDRED, MILLION = 1_000_001, 1_000_002
"""Experiments with 100,000 and 1,000,000 runs."""

LONG_RUN = hashlib.md5(f"{HUNDRED}-1".encode(), usedforsecurity=False).hexdigest()
"""The run with the long history: the first that is loaded."""

_RUNS = """
    INSERT INTO tracker.run (run_id, experiment_id, name, user_name, status, lifecycle_stage, started_ms, finished_ms, reason,
        parent_run_id, source_commit, source_dirty, source_diff_key, source_command, training_id, lease_seconds, fencing_token,
        event_sequence, deleted_ms)
    SELECT md5($1::bigint || '-' || at), $1, 'run-' || at, 'ada', 'FINISHED', 'active', $3::bigint + at * 1000,
        $3::bigint + at * 1000 + 500, '',
        '', '', false, '', '', '', 0, 0, 1, 0
    FROM generate_series(1, $2::int) AS at
"""
_PARAMS = """
    INSERT INTO tracker.param (run_id, experiment_id, started_ms, key, value)
    SELECT md5($1::bigint || '-' || at), $1, $3::bigint + at * 1000, 'param_' || own.k,
        ((at::bigint * 7919 + own.k * 104729) % 1000003 % (3 + own.k * 5))::text
    FROM generate_series(1, $2::int) AS at, LATERAL (SELECT k FROM generate_series(0, $4::int - 1) AS k) AS own
"""
_METRICS = """
    INSERT INTO tracker.metric_latest (run_id, experiment_id, started_ms, key, step, timestamp_ms, value)
    SELECT md5($1::bigint || '-' || at), $1, $3::bigint + at * 1000, 'metric_' || own.k, 99, $3::bigint + at * 1000, random()
    FROM generate_series(1, $2::int) AS at, LATERAL (SELECT k FROM generate_series(0, $4::int - 1) AS k) AS own
"""
_HISTORY = """
    INSERT INTO tracker.metric_point (run_id, key, step, timestamp_ms, value)
    SELECT $1, 'loss', at, $2::bigint + at * 10, random() FROM generate_series(1, 1000000) AS at
"""
_KEPT = f"""
    INSERT INTO tracker.run_logged (run_id, metrics, params, tags)
    SELECT run.run_id, {logged.METRICS}, {logged.PARAMS}, {logged.TAGS} FROM tracker.run WHERE experiment_id = $1 ORDER BY started_ms
"""

_AT_MLFLOW = (
    """
    INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage, creation_time, last_update_time, workspace)
    VALUES ($1, 'runs', 'mlflow-artifacts:/runs', 'active', 0, 0, 'default')
    """,
    """
    INSERT INTO runs (run_uuid, name, source_type, user_id, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id)
    SELECT md5($1::bigint || '-' || at), 'run-' || at, 'UNKNOWN', 'ada', 'FINISHED', $3::bigint + at * 1000, $3::bigint + at * 1000 + 500,
        'active', 'mlflow-artifacts:/runs/' || at, $1
    FROM generate_series(1, $2::int) AS at
    """,
    """
    INSERT INTO params (run_uuid, key, value)
    SELECT md5($1::bigint || '-' || at), 'param_' || own.k, ((at::bigint * 7919 + own.k * 104729) % 1000003 % (3 + own.k * 5))::text
    FROM generate_series(1, $2::int) AS at, LATERAL (SELECT k FROM generate_series(0, $3::int - 1) AS k) AS own
    """,
    """
    INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan)
    SELECT md5($1::bigint || '-' || at), 'metric_' || own.k, random(), $4::bigint + at * 1000, 99, false
    FROM generate_series(1, $2::int) AS at, LATERAL (SELECT k FROM generate_series(0, $3::int - 1) AS k) AS own
    """,
    """
    INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan)
    SELECT $1, 'loss', random(), $2::bigint + at * 10, at, false FROM generate_series(1, 1000000) AS at
    """,
)


async def load_mlflow(url: str) -> None:
    """Loads 100,000 runs with 20 metrics and params and a history of 1,000,000 points into the database of MLflow's server."""
    connection = await asyncpg.connect(url, command_timeout=None)
    try:
        for setting in ("session_replication_role = replica", "synchronous_commit = off"):
            await connection.execute(f"SET {setting}")
        experiment, runs, params, metrics, history = _AT_MLFLOW
        await connection.execute(experiment, HUNDRED)
        await connection.execute(runs, HUNDRED, 100_000, START_MS)
        await connection.execute(params, HUNDRED, 100_000, 20)
        await connection.execute(metrics, HUNDRED, 100_000, 20, START_MS)
        await connection.execute(history, LONG_RUN, START_MS)
        for table in ("runs", "params", "latest_metrics", "metrics"):
            await connection.execute(f"VACUUM ANALYZE {table}")
    finally:
        await connection.close()


async def load(system: Stack) -> None:
    """Loads the runs. Indexes are made after the rows, as their own definitions say."""
    connection = await asyncpg.connect(f"{system.postgres.dsn.rsplit('/', 1)[0]}/{DATABASE}", command_timeout=None)
    try:
        # Rows that refer to others are as they should be, and the load of a benchmark may be lost.
        for setting in ("session_replication_role = replica", "synchronous_commit = off", "maintenance_work_mem = '256MB'"):
            await connection.execute(f"SET {setting}")
        tables = ("param", "metric_latest")
        rebuild = []
        for table in tables:
            key, key_is = await connection.fetchrow(
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = $1::regclass AND contype = 'p'",
                f"tracker.{table}",
            )
            rebuild.append(f"ALTER TABLE tracker.{table} ADD CONSTRAINT {key} {key_is}")
            others = await connection.fetch(
                "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'tracker' AND tablename = $1 AND indexname <> $2", table, key
            )
            rebuild += [row["indexdef"] for row in others]
            await connection.execute(f"ALTER TABLE tracker.{table} DROP CONSTRAINT {key}")
            for row in others:
                await connection.execute(f"DROP INDEX tracker.{row['indexname']}")
        for experiment, runs, each in ((HUNDRED, 100_000, 20), (MILLION, 1_000_000, 2)):
            await connection.execute(
                "INSERT INTO tracker.experiment (id, name, lifecycle_stage, created_ms, last_update_ms) VALUES ($1, $2, 'active', 0, 0)",
                experiment,
                f"{runs} runs",
            )
            await connection.execute(_RUNS, experiment, runs, START_MS)
            for statement in (_PARAMS, _METRICS):
                await connection.execute(statement, experiment, runs, START_MS, each)
        await connection.execute(_HISTORY, LONG_RUN, START_MS)
        for statement in rebuild:
            await connection.execute(statement)
        for experiment in (HUNDRED, MILLION):
            await connection.execute(_KEPT, experiment)
        for table in ("run", "run_logged", "metric_point", *tables):
            await connection.execute(f"VACUUM ANALYZE tracker.{table}")
    finally:
        await connection.close()
