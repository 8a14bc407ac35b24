"""A deployer on a real PostgreSQL, with broker, object store and runtime in memory, and gateways that do what gateways do."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from artifacts.memory import MemoryStore
from contracts.deployer.v1 import events_pb2 as deploys
from contracts.gateway.v1 import events_pb2 as traffic
from contracts.registry.v1 import events_pb2 as registry
from contracts.tracker.v1 import model_pb2 as models
from deployer.adapters.memory_runtime import MemoryRuntime
from deployer.adapters.tables import SCHEMA
from deployer.bootstrap import MIGRATIONS, World, assemble
from deployer.domain import membership
from deployer.domain.signature import Rows
from deployer.settings import DeployerSettings
from eventing import topics
from eventing.besteffort import BestEffortProducer
from eventing.broker import Broker, Record
from eventing.envelope import Event, Received, decode_headers, encode_headers
from eventing.memory import MemoryBroker
from eventing.snapshots import SnapshotReader
from servicekit import migrate
from servicekit.clock import SystemClock, SystemIds
from servicekit.lifecycle import Closing, Component
from servicekit.rpc import Server

ENDPOINT = "flights"
MODEL_ID = "0190a000-0000-7000-8000-000000000001"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

SERVE: dict[str, Any] = {
    "endpoint": ENDPOINT,
    "rollout": {
        "window": "50ms",
        "shadow": {"share": 1.0, "requests": 40},
        "steps": [{"weight": "10%", "requests": 40}, {"weight": "50%", "requests": 100}],
        "guards": [
            {"bad": "error", "margin": "40%", "at_most": "60%"},
            {"bad": "shadow_difference", "compare": "tolerance(0.3)", "at_most": "50%"},
        ],
        "deadline": "2m",
    },
}


def serve(**rollout: Any) -> dict[str, Any]:
    """The serve section with other rollout fields."""
    return {**SERVE, "rollout": {**SERVE["rollout"], **rollout}}


async def eventually(check: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """Wait until a check (perhaps a coroutine) gives something true, and return that."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                found = check()
                if isinstance(found, Awaitable):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {within_s:g} s: {what}") from None


@dataclass
class Content:
    """Bytes that stand for a model file: what MemoryRuntime makes of them."""

    factor: float = 2.0
    mark: str = ""
    other_samples: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        return json.dumps({"factor": self.factor, "mark": self.mark}).encode()

    @property
    def samples(self) -> dict[str, Any]:
        return self.other_samples or {"inputs": {"x": [[1.0], [3.0]]}, "outputs": {"y": [[self.factor], [self.factor * 3]]}}


def answer(content: bytes, inputs: Rows) -> Rows:
    """y = factor * x."""
    factor = json.loads(content)["factor"]
    return {"y": [[factor * row[0]] for row in inputs["x"]]}


class Gateway:
    """Serves the routes it hears of, and reports windows about traffic that it makes up. `bad` by model version."""

    def __init__(self, broker: Broker, name: str = "gateway-1", per_window: int = 40, prefix: str = "") -> None:
        self.name = name
        self.boot = uuid4().hex
        self.per_window = per_window
        self.bad: dict[int, float] = {}
        self.differing: dict[int, float] = {}
        self.deaf = False
        self.routes: dict[str, deploys.RouteChanged] = {}
        self.served: dict[int, int] = {}
        self._sequence = itertools.count(1)
        self._random = random.Random(7)
        self._reader = SnapshotReader(broker, topics.ROUTES, self._heard, prefix)
        self._producer = BestEffortProducer(broker, prefix)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._reader.start()
        await self._producer.start()
        self._task = asyncio.create_task(self._report())

    async def stop(self, leaving: bool = True) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if leaving:
            self._send([], leaving=True)
        await self._producer.stop()
        await self._reader.stop()

    def skip_windows(self, count: int = 1) -> None:
        """Lose the next windows."""
        for _ in range(count):
            next(self._sequence)

    def route(self) -> deploys.RouteChanged:
        return self.routes.get(ENDPOINT, deploys.RouteChanged())

    def weights(self) -> dict[int, int]:
        return {arm.version: arm.weight_bps for arm in self.route().arms}

    def _heard(self, key: str, event: Received | None) -> None:
        if event is None or self.deaf:
            return
        route = deploys.RouteChanged.FromString(event.payload)
        assert route.deleted or sum(arm.weight_bps for arm in route.arms) == 10_000
        known = self.routes.get(key)
        if known is None or (route.revision, route.publication) > (known.revision, known.publication):
            self.routes[key] = route

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self._send([self._window(route) for route in self.routes.values() if not route.deleted])

    def _send(self, endpoints: Sequence[traffic.EndpointWindow], leaving: bool = False) -> None:
        window = traffic.TrafficWindow(
            instance=self.name,
            boot_id=self.boot,
            sequence=next(self._sequence),
            duration_ms=50,
            endpoints=endpoints,
            leaving=leaving,
        )
        self._producer.send(topics.TRAFFIC, self.name, "traffic.window", window.SerializeToString())

    def _window(self, route: deploys.RouteChanged) -> traffic.EndpointWindow:
        arms = []
        for arm in route.arms:
            requests = self.per_window * arm.weight_bps // 10_000
            self.served[arm.version] = self.served.get(arm.version, 0) + requests
            bad = sum(self._random.random() < self.bad.get(arm.version, 0.0) for _ in range(requests))
            report = traffic.ArmWindow(arm=arm.arm, requests=requests, bad={"error": bad} if requests else {}, errors=bad)
            if route.HasField("shadow") and route.shadow.arm == arm.arm:
                compared = self.per_window * route.shadow.share_bps // 10_000
                report.shadow_sent = report.shadow_compared = compared
                report.shadow_different = round(compared * self.differing.get(arm.version, 0.0))
            arms.append(report)
        return traffic.EndpointWindow(endpoint=route.endpoint, route_revision=route.revision, rollout_id=route.rollout_id, arms=arms)


class Registry:
    """Says what a registry says, in its order."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._sequences: dict[str, int] = {}

    def applied(self, section: dict[str, Any], revision: int = 1, deleted: bool = False) -> Record:
        """delivery.applied"""
        serve_json = json.dumps(section)
        message = registry.DeliveryApplied(name="flights", revision=revision, deleted=deleted, serve_json=serve_json, endpoint=ENDPOINT)
        return self._record(topics.DELIVERIES, "delivery.applied", "flights", message.SerializeToString())

    async def promoted(
        self,
        store: ArtifactStore,
        version: int,
        data: bytes,
        samples: dict[str, Any],
        *,
        stored: bytes | None = None,
        revision: int = 1,
        model_format: str = "onnx",
        endpoint: str = ENDPOINT,
        champion: int = 0,
        override: bool = False,
    ) -> Record:
        """model.promoted, its file stored first."""
        sha256 = hashlib.sha256(data).hexdigest()
        if stored != b"":
            await store.put(blob_key(sha256), data if stored is None else stored)
        rows = await store.put(f"samples/{sha256}.json", json.dumps(samples).encode())
        message = registry.ModelPromoted(
            version=registry.VersionRef(model_id=MODEL_ID, model="flight delays", version=version),
            journey=registry.Journey(
                journey_id=f"journey-{version}", delivery="flights", delivery_revision=revision, run_id=f"{version:032x}"
            ),
            endpoint=endpoint,
            evaluation_id=f"evaluation-{version}-{champion}",
            champion_version=champion,
            override=override,
            model=models.DeliverableModel(
                name="model",
                format=model_format,
                blob=models.BlobRef(sha256=sha256, size_bytes=len(data), key=blob_key(sha256)),
                signature=models.ModelSignature(
                    inputs=[models.TensorSpec(name="x", datatype="FP32", shape=[-1, 1])],
                    outputs=[models.TensorSpec(name="y", datatype="FP32", shape=[-1, 1])],
                ),
                samples=models.BlobRef(sha256=rows.sha256, size_bytes=rows.size, key=rows.key),
            ),
        )
        return self._record(topics.MODELS, "model.promoted", MODEL_ID, message.SerializeToString())

    def _record(self, topic: str, kind: str, key: str, payload: bytes) -> Record:
        self._sequences[topic] = sequence = self._sequences.get(topic, 0) + 1
        now = SystemClock().now()
        event = Event(kind, topic, key, sequence, payload, SystemIds().uuid7(), now, traceparent=TRACEPARENT)
        return Record(self._prefix + topic, key.encode(), payload, encode_headers(event, "/headrace/registry"), 0)


@dataclass
class Stand:
    """One deployer (or several) and the world around it."""

    url: str
    endpoint: str = ENDPOINT
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    artifacts: MemoryStore = field(default_factory=MemoryStore)
    runtime: MemoryRuntime = field(default_factory=lambda: MemoryRuntime(answer))
    running: list[Sequence[Component]] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    registry: Registry = field(default_factory=Registry)
    samples: dict[str, Any] = field(default_factory=dict)
    """Sample rows of the versions promoted from now on; empty: the right ones."""

    def settings(self) -> DeployerSettings:
        return DeployerSettings(database_url=self.url, reconcile_s=0.2)

    async def start(self) -> Sequence[Component]:
        """Start a deployer."""
        components = assemble(self.settings(), World(self.broker, self.artifacts, self.runtime, SystemClock(), SystemIds()))
        for component in components:
            await component.start()
        self.running.append(components)
        return components

    async def stop(self, components: Sequence[Component]) -> None:
        """Stop a deployer in good order."""
        self.running.remove(components)
        for component in reversed(components):
            await component.stop()

    async def crash(self, components: Sequence[Component]) -> None:
        """Have a deployer die where it stands: its tasks end without a word, and its connections break."""
        self.running.remove(components)
        # Again and again: a time-out that ends at the same moment may swallow a cancellation, and a worker begin another job.
        while tasks := {task for component in components for task in _tasks(component) if not task.done()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.1)
        for component in components:
            if isinstance(component, Server):
                await component.stop(0)
        (closing,) = [component for component in components if isinstance(component, Closing)]
        *_, dispose_engine = closing._closes
        await dispose_engine()

    def content(self, version: int) -> Content:
        """The file of a version that was promoted without another."""
        return Content(mark=f"v{version}", other_samples=self.samples)

    async def some_rollout(self, which: Callable[[Any], bool]) -> Any:
        """The newest rollout of which something is true."""
        return next((r.rollout for r in await self.deployer().rollouts("", 20, "") if which(r.rollout)), None)

    def sequences_of(self, topic: str) -> list[int]:
        return [decode_headers(record.headers).sequence for record in self.records(topic)]

    async def gateway(self, name: str = "gateway-1", per_window: int = 40) -> Gateway:
        gateway = Gateway(self.broker, name, per_window)
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.stop()
        for components in list(self.running):
            await self.stop(components)

    async def publish(self, record: Record) -> None:
        await topics.ensure_topics(self.broker)
        self.broker.append(record)

    async def apply(self, section: dict[str, Any] | None = None, revision: int = 1, deleted: bool = False) -> None:
        """delivery.applied"""
        await self.publish(self.registry.applied(SERVE if section is None else section, revision, deleted))

    async def promote(self, version: int, *, stored: bytes | None = None, **told: Any) -> None:
        """model.promoted, with its file in the object store (or, with `stored`, other bytes; b"": none).

        Judged against the champion of the moment, unless another is named.
        """
        told.setdefault("champion", self.champion())
        content = self.content(version)
        await self.publish(await self.registry.promoted(self.artifacts, version, content.data, content.samples, stored=stored, **told))

    def events(self, topic: str = topics.DEPLOYS) -> list[tuple[str, Any]]:
        """What was published, as (type, message)."""
        kinds: dict[str, Any] = {
            "deploy.canary": deploys.DeployCanary,
            "deploy.advanced": deploys.DeployAdvanced,
            "deploy.completed": deploys.DeployCompleted,
            "deploy.rolled_back": deploys.DeployRolledBack,
            "deploy.superseded": deploys.DeploySuperseded,
            "deploy.reverted": deploys.DeployReverted,
            "deploy.alarmed": deploys.DeployAlarmed,
            "route.changed": deploys.RouteChanged,
        }
        found = []
        for record in self.records(topic):
            kind = decode_headers(record.headers).type
            found.append((kind, kinds[kind].FromString(record.value or b"")))
        return found

    def records(self, topic: str) -> list[Any]:
        partitions = [partition for partition in self.broker._logs if partition.topic == topic]
        return [record for partition in partitions for record in self.broker.log(partition).records]

    def champion(self) -> int:
        """The version that is live by what was published, 0 for none."""
        live = 0
        for kind, message in self.events():
            if kind == "deploy.completed":
                live = message.rollout.version.version
            elif kind == "deploy.reverted":
                live = message.to_version
        return live

    def story(self, version: int) -> list[str]:
        """The types of events about one version."""
        return [kind for kind, message in self.events() if message.rollout.version.version == version]

    def event(self, kind: str, version: int) -> Any:
        return next((message for k, message in self.events() if k == kind and message.rollout.version.version == version), None)

    async def ended(self, version: int, kind: str, within_s: float = 40.0) -> Any:
        """Wait for an event about a version and return it."""
        return await eventually(
            lambda: self.event(kind, version), f"{kind} of version {version}; there was {self.story(version)}", within_s
        )

    async def live(self, version: int = 1) -> Gateway:
        """Bring a first version live, with one gateway, and return that."""
        await self.apply()
        await self.promote(version)
        gateway = self.gateways[0] if self.gateways else await self.gateway()
        await self.ended(version, "deploy.completed")
        return gateway

    def deployer(self) -> Any:
        """The handlers of the first running deployer, for what gRPC would ask."""
        for component in self.running[0]:
            found = getattr(component, "_deployer", None)
            if found is not None:
                return found
        raise LookupError("no deployer runs")

    async def held(self) -> Any:
        """Wait until the rollout that runs is held, and return it."""

        async def look() -> Any:
            running = [record.rollout for record in await self.deployer().rollouts("", 10, "") if record.rollout.hold]
            return running[0] if running else None

        return await eventually(look, "a rollout that is held")

    def weights_published(self) -> dict[int, int]:
        """Of the newest route."""
        route = self.events(topics.ROUTES)[-1][1]
        return {arm.version: arm.weight_bps for arm in route.arms}

    async def windows(self, count: int) -> None:
        """Wait until gateways have reported so many windows more."""
        before = len(self.records(topics.TRAFFIC))
        await eventually(lambda: len(self.records(topics.TRAFFIC)) >= before + count, f"{count} windows")

    def serve(self, **rollout: Any) -> dict[str, Any]:
        return serve(**rollout)

    async def eventually(self, check: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
        return await eventually(check, what, within_s)

    def leaders(self) -> list[Any]:
        return [c for components in self.running for c in components if type(c).__name__ == "Leader" and getattr(c, "epoch", None)]


def _tasks(component: Any) -> list[asyncio.Task[Any]]:
    """The tasks of one component, whatever it calls them."""
    found = [getattr(component, name, None) for name in ("_task", "_loop_task")]
    found += [running.task for running in getattr(component, "_running", {}).values()]
    return [task for task in found if isinstance(task, asyncio.Task)]


@pytest.fixture
async def make_stand(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[str], Awaitable[Stand]]]:
    """Makes stands on databases given by their SQLAlchemy URLs."""
    # These gateways report every 50 ms, so all of them are soon known.
    monkeypatch.setattr(membership, "SETTLE_S", 0.3)
    made: list[Stand] = []

    async def make(url: str) -> Stand:
        await migrate.upgrade(url, SCHEMA, MIGRATIONS)
        made.append(Stand(url))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture
async def stand(database: Any, make_stand: Callable[[str], Awaitable[Stand]]) -> Stand:
    return await make_stand(database.sqlalchemy)


@pytest.fixture
def stand_parts() -> tuple[type[Gateway], type[Registry], Callable[..., dict[str, Any]], Callable[..., Awaitable[Any]]]:
    """The parts of a stand, for a deployer that is a process."""
    return Gateway, Registry, serve, eventually
