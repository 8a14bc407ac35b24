"""What scripts and people wait for at the tracking store, through the gateway: logging, searching, histories, files; and its memory.

A whole system of its own. Runs to search are loaded into its database in bulk: 100,000 in one experiment with 20 metrics and 20 params
each, and 1,000,000 in another with 2 and 2; and one history of 1,000,000 points. Each read is timed alone and again while 50 clients log.
MLflow's newest server on PostgreSQL does the same in the same run, without the million runs and without the 50 clients.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from localstack import api
from localstack.layout import Stack
from localstack.throwaway import ThrowawayServers

from tests.bench import tracking_files
from tests.bench.mlflow_server import mlflow_server
from tests.bench.plain_http import START_MS, Client, Target
from tests.bench.run import Figure
from tests.bench.tracking_load import HUNDRED, LONG_RUN, MILLION, load, load_mlflow
from tests.bench.tracking_writers import writing
from tests.mlflow import clients

LOGS = 600
BATCHES = 25
CLIENTS = 4
READS = 25
MLFLOW_READS = 7
WRITERS = 50
WRITES_PER_S = 2.0
"""Of each writer."""

_SERVICES = ("gateway", "tracker", "registry")
_MIB = 2**20


async def figures(servers: ThrowawayServers) -> list[Figure]:
    """Measures on a whole system; takes about seven minutes."""
    system = servers.system
    target: Target = (system.addresses.gateway, {"authorization": f"Bearer {system.addresses.admin_key}"})
    idle = {row.name: row.rss_bytes / _MIB for row in api.status(system.paths.state) if row.name in _SERVICES}
    ours = await asyncio.to_thread(_writes, target)
    with TemporaryDirectory() as folder:
        servers.postgres.sql("CREATE DATABASE mlflow")
        theirs, their_memory = await _mlflow(f"{servers.postgres.dsn.rsplit('/', 1)[0]}/mlflow", Path(folder))
    await _timed("loaded", load(system))
    ours |= await asyncio.to_thread(_reads, target, READS)
    ours["filtered"] = await asyncio.to_thread(_filtered, target, MILLION, READS)
    beside = await asyncio.to_thread(_beside, target)
    made = [_figure(name, ours[name], theirs.get(name)) for name in _TOLD]
    made += [_figure(name, beside[name], None, f", while {WRITERS} clients log {WRITERS * WRITES_PER_S:g} metrics/s") for name in beside]
    made += await _files(system, target)
    return made + [_row(f"memory of the {name}, idle", idle[name], "MiB", 150.0, reference=their_memory) for name in _SERVICES]


_TOLD: Mapping[str, tuple[str, str, float | None]] = {
    "log_metric": ("log_metric, one client, p50", "ms", 2.0),
    "client_log": ("log_metric by the mlflow client, p50", "ms", None),
    "log_batch": (f"log-batch of 1,000 metrics, {CLIENTS} clients", "metrics/s", 30_000.0),
    "ordered": ("search 1,000 of 100,000 runs by a metric, 20 metrics and 20 params each, p50", "ms", 120.0),
    "filtered_hundred": ("search by a param and a metric, first 100 of 100,000 runs, p50", "ms", 60.0),
    "filtered": ("search by a param and a metric, first 100 of 1,000,000 runs, p50", "ms", 60.0),
    "sampled": ("bulk-interval of 500 of 1,000,000 points, p50", "ms", 50.0),
}


def _figure(name: str, value: float, reference: float | None, beside: str = "") -> Figure:
    told, unit, aim = _TOLD[name]
    return _row(told + beside, value, unit, aim, lower_is_better=unit == "ms", reference=reference)


def _row(name: str, value: float, unit: str, aim: float | None, *, lower_is_better: bool = True, reference: float | None = None) -> Figure:
    return {
        "name": f"tracking: {name}",
        "value": round(value, 2),
        "unit": unit,
        "aim": aim,
        "lower_is_better": lower_is_better,
        "reference": None if reference is None else round(reference, 2),
    }


async def _timed(what: str, work: Any) -> None:
    began = time.monotonic()
    await work
    print(f"{what} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


async def _mlflow(database_url: str, folder: Path) -> tuple[dict[str, float], float]:
    """The same at MLflow's server, and its memory before, in MiB."""
    with mlflow_server(database_url, folder) as server:
        target: Target = (f"{server.host}:{server.port}", {})
        memory = server.memory_bytes() / _MIB
        found = await asyncio.to_thread(_writes, target)
        await _timed("loaded for MLflow", load_mlflow(database_url))
        return found | await asyncio.to_thread(_reads, target, MLFLOW_READS), memory


def _beside(target: Target) -> dict[str, float]:
    with writing(target, WRITERS, WRITES_PER_S):
        found = _reads(target, READS) | {"filtered": _filtered(target, MILLION, READS)}
    return {name: found[name] for name in ("ordered", "filtered", "sampled")}


async def _files(system: Stack, target: Target) -> list[Figure]:
    put_url, get_url = await tracking_files.urls(system)
    found = await asyncio.to_thread(tracking_files.speeds, system, target, put_url, get_url)
    ways = (
        ("upload of 1 GiB through the gateway", found.upload, found.store_upload),
        ("download of 1 GiB through the gateway", found.download, found.store_download),
        ("download of 1 GiB by a presigned URL", found.presigned, found.store_download),
    )
    made = []
    for told, speed, straight in ways:
        made.append(_row(told, speed / 1e6, "MB/s", None, lower_is_better=False, reference=straight / 1e6))
        made.append(_row(f"{told}, share of the object store's own speed", 100 * speed / straight, "%", 80.0, lower_is_better=False))
    most = found.memory.items()
    return made + [_row(f"memory of the {name}, most while 1 GiB goes through", size / _MIB, "MiB", 200.0) for name, size in most]


def _writes(target: Target) -> dict[str, float]:
    client = Client(target)
    run_id = client.new_run()
    times = []
    for step in range(LOGS):
        body = json.dumps({"run_id": run_id, "key": "loss", "value": step / 7, "timestamp": START_MS + step, "step": step}).encode()
        began = time.perf_counter()
        client.call("POST", "/runs/log-metric", body)
        times.append(time.perf_counter() - began)
    client.close()
    return {
        "log_metric": statistics.median(times[LOGS // 10 :]) * 1000,
        "client_log": _client_logs(target),
        "log_batch": _batches(target),
    }


def _client_logs(target: Target) -> float:
    """The median in ms of an unmodified client."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://{target[0]}", "MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "*"}
    if token := target[1].get("authorization", "").removeprefix("Bearer "):
        environment["MLFLOW_TRACKING_TOKEN"] = token
    script = Path(clients.HERE) / "logs.py"
    command = [str(clients.python("current")), str(script), str(LOGS // 2)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _batches(target: Target) -> float:
    """Metrics per second: batches of 100 steps of 10 metrics."""

    def bodies(client: Client) -> list[bytes]:
        run_id = client.new_run()
        made = []
        for batch in range(BATCHES + 1):
            steps = range(batch * 100, batch * 100 + 100)
            metrics = [
                {"key": f"metric_{key}", "value": step / (key + 1), "timestamp": START_MS + step, "step": step}
                for step in steps
                for key in range(10)
            ]
            made.append(json.dumps({"run_id": run_id, "metrics": metrics}).encode())
        return made

    callers = [Client(target) for _ in range(CLIENTS)]
    work = [bodies(client) for client in callers]
    failed: list[BaseException] = []

    def run(client: Client, batches: list[bytes]) -> None:
        try:
            for body in batches:
                client.call("POST", "/runs/log-batch", body)
        except BaseException as error:
            failed.append(error)
            raise

    for client, batches in zip(callers, work, strict=True):
        run(client, batches[:1])
    threads = [threading.Thread(target=run, args=(client, batches[1:])) for client, batches in zip(callers, work, strict=True)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    for client in callers:
        client.close()
    if failed:
        raise failed[0]
    return CLIENTS * BATCHES * 1_000 / took


def _reads(target: Target, rounds: int) -> dict[str, float]:
    ordered = {"experiment_ids": [str(HUNDRED)], "order_by": ["metrics.`metric_3` DESC"], "max_results": 1_000}
    sampled = urllib.parse.urlencode({"run_ids": LONG_RUN, "metric_key": "loss", "max_results": 500})
    return {
        "ordered": _median(target, rounds, "POST", "/runs/search", ordered, "runs", 1_000),
        "filtered_hundred": _filtered(target, HUNDRED, rounds),
        "sampled": _median(target, rounds, "GET", f"/metrics/get-history-bulk-interval?{sampled}", None, "metrics", 500),
    }


def _filtered(target: Target, experiment: int, rounds: int) -> float:
    body = {"experiment_ids": [str(experiment)], "filter": "params.param_0 = '1' AND metrics.metric_1 < 0.5", "max_results": 100}
    return _median(target, rounds, "POST", "/runs/search", body, "runs", 100)


def _median(target: Target, rounds: int, method: str, path: str, body: Any, name: str, count: int) -> float:
    """In ms, after two requests that are not counted. Raises RuntimeError when there are fewer than `count` things in the answer."""
    client = Client(target)
    wire = None if body is None else json.dumps(body).encode()
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        told = client.call(method, path, wire, api="/ajax-api/2.0/mlflow")  # where MLflow serves histories for charts
        times.append(time.perf_counter() - began)
    client.close()
    if len(json.loads(told)[name]) < count:
        raise RuntimeError(f"{path} answered {len(json.loads(told)[name])} {name}, not {count}")
    return statistics.median(times[2:]) * 1000
