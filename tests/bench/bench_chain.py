"""What the chain itself takes: from the end of a run to its verdict, and from the promotion to the first request that the canary answers.

A whole system of its own carries run after run, under callers, up to the first canary request; then the rollout is aborted, so that
every run finds the same champion. Times come from the events (ce_time, and when a reader of the topic has them), from the records of the
long work (the evaluator's and the deployer's jobs, the evaluation, the rollout's decision log) and from the callers' answers. All is on
one machine, so its clock is the same everywhere. The long work is taken out and told beside.
"""

from __future__ import annotations

import asyncio
import http.client
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import asyncpg
from contracts.evaluator.v1 import events_pb2 as evaluator_events
from contracts.registry.v1 import events_pb2 as registry_events
from contracts.tracker.v1 import events_pb2 as tracker_events
from eventing import topics
from eventing.envelope import Received
from eventing.kafka import KafkaBroker
from eventing.records import receive
from headrace.cli.rollouts import explained
from localstack.layout import Stack
from localstack.schemas import DATABASE
from localstack.throwaway import ThrowawayServers

from tests.bench.run import Figure
from tests.e2e.world import GOOD, World, model_bytes, request_body

RUNS = 12
RATE = 100.0
"""Requests per second of the callers: at a share of 50 % the first one for a canary is 20 ms away on average."""
_NAME = "bench-chain"
_PATIENCE_S = 60.0
_RUN_ID = {
    "run.finished": lambda payload: tracker_events.RunFinished.FromString(payload).run_id,
    "eval.passed": lambda payload: evaluator_events.EvalPassed.FromString(payload).judgement.journey.run_id,
    "eval.failed": lambda payload: evaluator_events.EvalFailed.FromString(payload).judgement.journey.run_id,
    "model.promoted": lambda payload: registry_events.ModelPromoted.FromString(payload).journey.run_id,
}
_SERVE = """serve:
  endpoint: {name}
  runtime: triton
  assign: request
  rollout:
    window: 250ms
    shadow: {{share: 1.0, requests: 20}}
    steps: [{{weight: 50%, requests: 1000000}}]
    guards:
      - {{bad: error, margin: 20%, at_most: 60%}}
    deadline: 10m
    on_deadline: abort
"""


@dataclass(frozen=True)
class Passage:
    """Where the time of one run went, in seconds. The first three are the chain's own, the next three the work that it waits for."""

    to_verdict: float
    to_promotion: float
    to_canary: float
    evaluating: float
    loading: float
    shadowing: float
    whole: float


async def figures(servers: ThrowawayServers) -> list[Figure]:
    """Measures on a whole system; takes about two minutes."""
    system = servers.system
    events = _Events(system.addresses.kafka)
    await events.start()
    try:
        world = World(system, _NAME)
        try:
            await asyncio.to_thread(_first_version, world)
            with _Callers(system.addresses.gateway, world.key, _NAME) as callers:
                passages = [await _pass(world, system, events, callers, seed) for seed in range(1, RUNS + 1)]
        finally:
            world.close()
    finally:
        await events.stop()
    return _figures(passages)


def _first_version(world: World) -> None:
    text = world.delivery()
    world.apply(text[: text.index("serve:")] + _SERVE.format(name=_NAME))
    world.arrives(world.finish_run(model_bytes(GOOD)), "completed")


def _figures(passages: list[Passage]) -> list[Figure]:
    def figure(name: str, value: float, aim: float | None) -> Figure:
        return {"name": f"chain: {name}", "value": round(value, 3), "unit": "s", "aim": aim, "lower_is_better": True, "reference": None}

    made: list[Figure] = []
    own = (
        ("to_verdict", "run.finished to eval.passed, evaluating left out", 1.0),
        ("to_promotion", "eval.passed to model.promoted", None),
        ("to_canary", "model.promoted to first canary request, loading, warming up and shadowing left out", 1.0),
    )
    for field, name, aim in own:
        values = [getattr(passage, field) for passage in passages]
        made += [figure(f"{name}, median", statistics.median(values), aim), figure(f"{name}, max", max(values), aim)]
    rest = (
        ("evaluating", "evaluating, median"),
        ("loading", "loading and warming up, median"),
        ("shadowing", "shadowing 20 requests, median"),
        ("whole", "run.finished to first canary request, everything, median"),
    )
    return made + [figure(name, statistics.median(getattr(passage, field) for passage in passages), None) for field, name in rest]


async def _pass(world: World, system: Stack, events: _Events, callers: _Callers, seed: int) -> Passage:
    """One run through the chain, up to its first canary request."""
    run = await asyncio.to_thread(world.finish_run, model_bytes(GOOD, seed=seed))
    finished = await events.of("run.finished", run)
    passed = await events.of("eval.passed", run)
    promoted = await events.of("model.promoted", run)
    version = registry_events.ModelPromoted.FromString(promoted.payload).version.version
    answered = await callers.first(version)
    rollout = (await asyncio.to_thread(world.journey, run))["rollout_id"]
    told = await asyncio.to_thread(explained, world.client, rollout)
    moves = {decision["to_state"]: _time(decision["at"]) for decision in reversed(told["decisions"])}
    await asyncio.to_thread(_take_back, world, rollout)
    async with _connected(system) as database:
        evaluation = await database.fetchrow(
            "SELECT started_at, finished_at FROM evaluator.evaluation JOIN evaluator.job ON key = evaluation_id WHERE run_id = $1",
            run,
        )
        load = await database.fetchrow("SELECT started_at FROM deployer.job WHERE key = $1", rollout)
    if evaluation is None or load is None:
        raise RuntimeError(f"run {run} went through, but its jobs are not recorded")
    stepped = moves["stepping(0)"]
    passage = Passage(
        to_verdict=_s(finished.time, evaluation["started_at"]) + _s(evaluation["finished_at"], passed.seen),
        to_promotion=_s(passed.time, promoted.time),
        to_canary=_s(promoted.time, load["started_at"]) + _s(stepped, answered),
        evaluating=_s(evaluation["started_at"], evaluation["finished_at"]),
        loading=_s(load["started_at"], moves["shadowing"]),
        shadowing=_s(moves["shadowing"], stepped),
        whole=_s(finished.time, answered),
    )
    print(" ", {field.name: round(getattr(passage, field.name), 3) for field in fields(passage)}, file=sys.stderr)
    return passage


def _take_back(world: World, rollout: str) -> None:
    world.client.post(f"/api/v1/rollouts/{rollout}/abort", {"reason": "measured"})
    deadline = time.monotonic() + _PATIENCE_S
    while world.client.get(f"/api/v1/rollouts/{rollout}")["rollout"]["state"] != "rolled_back":
        if time.monotonic() > deadline:
            raise RuntimeError(f"rollout {rollout} does not end")
        time.sleep(0.05)


def _connected(system: Stack) -> Any:
    return asyncpg.create_pool(f"{system.postgres.dsn.rsplit('/', 1)[0]}/{DATABASE}", min_size=1, max_size=1)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _s(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()


@dataclass(frozen=True)
class _Told:
    """An event: when it says that it was written, and when a reader of its topic had it."""

    time: datetime
    seen: datetime
    payload: bytes


class _Events:
    """Reads the chain's topics as they grow, as a consuming service does."""

    def __init__(self, bootstrap: str) -> None:
        self._broker = KafkaBroker(bootstrap, "bench-chain")
        self._told: dict[tuple[str, str], _Told] = {}
        self._changed = asyncio.Condition()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._read())

    async def stop(self) -> None:
        self._stopping = True
        if self._task is not None:
            await self._task
        await self._broker.close()

    async def of(self, kind: str, run: str) -> _Told:
        """Waits for this event of a run's journey. Raises RuntimeError when the run failed its evaluation, or nothing comes."""

        def known() -> bool:
            return (kind, run) in self._told or ("eval.failed", run) in self._told or (self._task is not None and self._task.done())

        async with asyncio.timeout(_PATIENCE_S), self._changed:
            await self._changed.wait_for(known)
        if self._task is not None and self._task.done():
            await self._task
        if (kind, run) not in self._told:
            failed = evaluator_events.EvalFailed.FromString(self._told["eval.failed", run].payload)
            raise RuntimeError(f"run {run} failed its evaluation: {failed.reason}")
        return self._told[kind, run]

    async def _read(self) -> None:
        reader = self._broker.reader([topics.RUNS, topics.EVALS, topics.MODELS])
        try:
            await reader.start()
            while not self._stopping:
                polled = await reader.poll(1000, 0.25)
                for partition in polled.assigned or ():
                    reader.seek(partition, 0)
                seen = datetime.now(UTC)
                for record in polled.records:
                    await self._take(receive(record, record.partition.topic, ""), seen)
        finally:
            await reader.stop()
            async with self._changed:
                self._changed.notify_all()

    async def _take(self, event: Received, seen: datetime) -> None:
        if event.type in _RUN_ID:
            async with self._changed:
                self._told[event.type, _RUN_ID[event.type](event.payload)] = _Told(event.time, seen, event.payload)
                self._changed.notify_all()


class _Callers:
    """A client application in a thread of its own: a steady rate of requests, and when each version first answered one."""

    def __init__(self, gateway: str, key: str, endpoint: str) -> None:
        self._gateway, self._path = gateway, f"/v2/models/{endpoint}/infer"
        self._headers: Mapping[str, str] = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._first: dict[int, datetime] = {}
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def first(self, version: int) -> datetime:
        """Waits until this version has answered; returns when it first did. Raises RuntimeError when a request failed."""
        async with asyncio.timeout(_PATIENCE_S):
            while version not in self._first:
                if self._failure is not None:
                    raise RuntimeError("a request failed") from self._failure
                await asyncio.sleep(0.02)
        return self._first[version]

    def _run(self) -> None:
        try:
            self._send()
        except Exception as failure:
            self._failure = failure

    def _send(self) -> None:
        connection = http.client.HTTPConnection(self._gateway, timeout=30)
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / RATE, time.monotonic() - 1)
            connection.request("POST", self._path, request_body(), dict(self._headers))
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {body[:200]!r}")
            self._first.setdefault(int(answer.headers["x-headrace-model-version"]), datetime.now(UTC))
        connection.close()
