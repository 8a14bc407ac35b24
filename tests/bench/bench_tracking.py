"""What training scripts and people wait for at the tracking store, by plain HTTP through the gateway: logging, searching, histories.

A whole system of its own. Runs to search are loaded into its database in bulk: 100,000 in one experiment with 20 metrics and 20 params
each, and 1,000,000 in another with 2 and 2; and one history of 1,000,000 points. Each read is timed alone and again while 50 clients log.
Writes are timed at MLflow's own server too, its newest on PostgreSQL, in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import statistics
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg
from localstack.layout import Stack
from localstack.schemas import DATABASE
from localstack.throwaway import ThrowawayServers
from tracker.adapters import logged

from tests.bench.mlflow_server import mlflow_server
from tests.bench.run import Figure

LOGS = 600
BATCHES = 25
CLIENTS = 4
READS = 25
WRITERS = 50
WRITES_PER_S = 2.0
"""Of each writer."""

_HUNDRED, _MILLION = 1_000_001, 1_000_002
"""Experiments with 100,000 and 1,000,000 runs."""

_LONG_RUN = hashlib.md5(f"{_HUNDRED}-1".encode(), usedforsecurity=False).hexdigest()
"""The run with the long history: the first that is loaded."""
_START_MS = 1_700_000_000_000

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

Target = tuple[str, Mapping[str, str]]
"""`host:port`, and headers."""


async def figures(servers: ThrowawayServers) -> list[Figure]:
    """Measures on a whole system; takes about four minutes."""
    system = servers.system
    target: Target = (system.addresses.gateway, {"authorization": f"Bearer {system.addresses.admin_key}"})
    measured = await asyncio.to_thread(_writes, target)
    with TemporaryDirectory() as folder:
        servers.postgres.sql("CREATE DATABASE mlflow")
        reference = await asyncio.to_thread(_reference, f"{servers.postgres.dsn.rsplit('/', 1)[0]}/mlflow", Path(folder))
    began = time.monotonic()
    await _load(system)
    print(f"loaded in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    alone = await asyncio.to_thread(_reads, target)
    with _writing(target):
        beside = await asyncio.to_thread(_reads, target)
    names = {"log_metric": ("ms", 2.0, True), "log_batch": ("metrics/s", 30_000.0, False)}
    made = [
        _figure(f"tracking: {_TOLD[name]}", measured[name], unit, aim, lower, reference[name]) for name, (unit, aim, lower) in names.items()
    ]
    made += [_figure(f"tracking: {_TOLD[name]}", alone[name], "ms", _AIMS[name], True, None) for name in _AIMS]
    busy = f"while {WRITERS} clients log {WRITERS * WRITES_PER_S:g} metrics/s"
    return made + [_figure(f"tracking: {_TOLD[name]}, {busy}", beside[name], "ms", _AIMS[name], True, None) for name in _AIMS]


_TOLD = {
    "log_metric": "log_metric, one client, p50",
    "log_batch": f"log-batch of 1,000 metrics, {CLIENTS} clients",
    "ordered": "search 1,000 of 100,000 runs by a metric, 20 metrics and 20 params each, p50",
    "filtered": "search by a param and a metric, first 100 of 1,000,000 runs, p50",
    "sampled": "bulk-interval of 500 of 1,000,000 points, p50",
}
_AIMS = {"ordered": 120.0, "filtered": 60.0, "sampled": 50.0}


def _figure(name: str, value: float, unit: str, aim: float, lower_is_better: bool, reference: float | None) -> Figure:
    return {
        "name": name,
        "value": round(value, 2),
        "unit": unit,
        "aim": aim,
        "lower_is_better": lower_is_better,
        "reference": None if reference is None else round(reference, 2),
    }


class _Client:
    """One connection that is kept."""

    def __init__(self, target: Target) -> None:
        self._headers = {**target[1], "content-type": "application/json"}
        self._connection = http.client.HTTPConnection(target[0], timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        self._connection.request(method, f"/api/2.0/mlflow{path}", body, self._headers)
        answer = self._connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {told[:300]!r}")
        return told

    def post(self, path: str, body: Any) -> Any:
        return json.loads(self.call("POST", path, json.dumps(body).encode()))

    def new_run(self) -> str:
        return str(self.post("/runs/create", {"experiment_id": "0", "start_time": _START_MS})["run"]["info"]["run_id"])

    def close(self) -> None:
        self._connection.close()


def _writes(target: Target) -> dict[str, float]:
    client = _Client(target)
    run_id = client.new_run()
    times = []
    for step in range(LOGS):
        body = json.dumps({"run_id": run_id, "key": "loss", "value": step / 7, "timestamp": _START_MS + step, "step": step}).encode()
        began = time.perf_counter()
        client.call("POST", "/runs/log-metric", body)
        times.append(time.perf_counter() - began)
    client.close()
    return {"log_metric": statistics.median(times[LOGS // 10 :]) * 1000, "log_batch": _batches(target)}


def _batches(target: Target) -> float:
    """Metrics per second: batches of 100 steps of 10 metrics."""

    def bodies(client: _Client) -> list[bytes]:
        run_id = client.new_run()
        made = []
        for batch in range(BATCHES + 1):
            steps = range(batch * 100, batch * 100 + 100)
            metrics = [
                {"key": f"metric_{key}", "value": step / (key + 1), "timestamp": _START_MS + step, "step": step}
                for step in steps
                for key in range(10)
            ]
            made.append(json.dumps({"run_id": run_id, "metrics": metrics}).encode())
        return made

    clients = [_Client(target) for _ in range(CLIENTS)]
    work = [bodies(client) for client in clients]
    failed: list[BaseException] = []

    def run(client: _Client, batches: list[bytes]) -> None:
        try:
            for body in batches:
                client.call("POST", "/runs/log-batch", body)
        except BaseException as error:
            failed.append(error)
            raise

    for client, batches in zip(clients, work, strict=True):
        run(client, batches[:1])
    threads = [threading.Thread(target=run, args=(client, batches[1:])) for client, batches in zip(clients, work, strict=True)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    for client in clients:
        client.close()
    if failed:
        raise failed[0]
    return CLIENTS * BATCHES * 1_000 / took


def _reads(target: Target) -> dict[str, float]:
    ordered = {"experiment_ids": [str(_HUNDRED)], "order_by": ["metrics.`metric_3` DESC"], "max_results": 1_000}
    filtered = {"experiment_ids": [str(_MILLION)], "filter": "params.param_0 = '1' AND metrics.metric_1 < 0.5", "max_results": 100}
    sampled = urllib.parse.urlencode({"run_ids": _LONG_RUN, "metric_key": "loss", "max_results": 500})
    client = _Client(target)

    def timed(method: str, path: str, body: Any, name: str, count: int) -> float:
        wire = None if body is None else json.dumps(body).encode()
        times = []
        for _ in range(READS + 3):
            began = time.perf_counter()
            told = client.call(method, path, wire)
            times.append(time.perf_counter() - began)
        if len(json.loads(told)[name]) != count:
            raise RuntimeError(f"{path} answered {len(json.loads(told)[name])} {name}, not {count}")
        return statistics.median(times[3:]) * 1000

    found = {
        "ordered": timed("POST", "/runs/search", ordered, "runs", 1_000),
        "filtered": timed("POST", "/runs/search", filtered, "runs", 100),
        "sampled": timed("GET", f"/metrics/get-history-bulk-interval?{sampled}", None, "metrics", 500),
    }
    client.close()
    return found


@contextlib.contextmanager
def _writing(target: Target) -> Iterator[None]:
    """Has WRITERS clients log metrics of runs of their own, at an even pace, as long as it is open."""
    over = threading.Event()
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            client = _Client(target)
            run_id = client.new_run()
            step = 0
            over.wait(number / WRITERS / WRITES_PER_S)
            while not over.is_set():
                began = time.monotonic()
                client.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 1.0, "timestamp": _START_MS, "step": step})
                step += 1
                over.wait(max(0.0, 1 / WRITES_PER_S - (time.monotonic() - began)))
            client.close()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def _reference(database_url: str, folder: Path) -> dict[str, float]:
    with mlflow_server(database_url, folder) as server:
        return _writes((f"{server.host}:{server.port}", {}))


async def _load(system: Stack) -> None:
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
        for experiment, runs, each in ((_HUNDRED, 100_000, 20), (_MILLION, 1_000_000, 2)):
            await connection.execute(
                "INSERT INTO tracker.experiment (id, name, lifecycle_stage, created_ms, last_update_ms) VALUES ($1, $2, 'active', 0, 0)",
                experiment,
                f"{runs} runs",
            )
            await connection.execute(_RUNS, experiment, runs, _START_MS)
            for statement in (_PARAMS, _METRICS):
                await connection.execute(statement, experiment, runs, _START_MS, each)
        await connection.execute(_HISTORY, _LONG_RUN, _START_MS)
        for statement in rebuild:
            await connection.execute(statement)
        await connection.execute(_KEPT, _HUNDRED)
        for table in ("run", "run_logged", "metric_point", *tables):
            await connection.execute(f"VACUUM ANALYZE tracker.{table}")
    finally:
        await connection.close()
