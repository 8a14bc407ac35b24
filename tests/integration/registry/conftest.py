"""A whole registry on a real PostgreSQL: its events on a broker in memory, the peers that validate sections small and real on port 0."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
import grpc
import httpx
import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.registry.v1 import events_pb2, service_pb2, service_pb2_grpc
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from eventing import topics
from eventing.broker import Partition, Record
from eventing.envelope import Event, decode_headers, encode_headers
from eventing.memory import MemoryBroker
from google.protobuf.message import Message
from pydantic import SecretStr
from registry.bootstrap import MIGRATIONS, build
from registry.settings import RegistrySettings
from servicekit import migrate
from servicekit.access import Caller, Rule, hash_secret, identity_metadata, new_service_token
from servicekit.clock import SystemIds
from servicekit.lifecycle import Component
from servicekit.rpc import Server, acting_for, channel

DEADLINE_S = 20.0
VALIDATION = "headrace.registry.v1.DeliverySectionService"

DELIVERY = """\
apiVersion: headrace/v1
kind: Delivery
metadata: {name: flight-delays}
train:
  command: [python, train.py]
evaluate:
  experiment: flight-delays
promote:
  model: flights
  approvals: {production: 0}
serve:
  endpoint: flights
  rollout:
    steps:
      - {weight: 5%}
      - {weight: 50%}
"""


async def eventually(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """What the condition answers as soon as it is true; fails after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if found := await condition():
                return found
            await asyncio.sleep(0.02)
    raise AssertionError(what)


class Sections(service_pb2_grpc.DeliverySectionServiceServicer):
    """A peer that finds in a section what the test says."""

    def __init__(self) -> None:
        self.violations: list[service_pb2.FieldViolation] = []
        self.loosened: list[str] = []
        self.asked: list[service_pb2.ValidateSectionRequest] = []
        self.judge: Callable[[service_pb2.ValidateSectionRequest], service_pb2.ValidateSectionResponse] | None = None

    async def ValidateSection(self, request: service_pb2.ValidateSectionRequest, context: Any) -> service_pb2.ValidateSectionResponse:
        self.asked.append(request)
        if self.judge is not None:
            return self.judge(request)
        return service_pb2.ValidateSectionResponse(violations=self.violations, loosened=self.loosened)


class Mlflow:
    """MLflow's API, asked in this process. What is no success raises `Answered`."""

    def __init__(self, http: Any, headers: dict[str, str]) -> None:
        self.http = http
        self.headers = headers

    async def send(self, method: str, path: str, **said: Any) -> httpx.Response:
        """The answer, whatever it is; `said` is the query of a GET and else the body."""
        # With escapes for all that is not ASCII, so that half a surrogate pair can be said too.
        sent: dict[str, Any] = {"params": said} if method == "GET" else {"content": json.dumps(said)}
        headers = self.headers | {"content-type": "application/json"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self.http), base_url="http://registry") as client:
            return await client.request(method, f"/api/2.0/mlflow/{path}", headers=headers, **sent)

    async def __call__(self, method: str, path: str, **said: Any) -> Any:
        answer = await self.send(method, path, **said)
        if not answer.is_success:
            raise Answered(answer.status_code, **answer.json())
        return answer.json()

    async def model(self, name: str = "flights", **said: Any) -> Any:
        return (await self("POST", "registered-models/create", name=name, **said))["registered_model"]

    async def version(self, source: str = "runs:/r1/model", name: str = "flights", **said: Any) -> Any:
        return (await self("POST", "model-versions/create", name=name, source=source, **said))["model_version"]

    async def get(self, version: int, name: str = "flights") -> Any:
        return (await self("GET", "model-versions/get", name=name, version=str(version)))["model_version"]

    async def move(self, version: int, stage: str, **said: Any) -> Any:
        asked = {"name": "flights", "version": str(version), "stage": stage, **said}
        return (await self("POST", "model-versions/transition-stage", **asked))["model_version"]


class Answered(Exception):
    """An error as MLflow's API tells it."""

    def __init__(self, status: int, error_code: str, message: str) -> None:
        super().__init__(f"{status} {error_code}: {message}")
        self.code = error_code


@dataclass
class Told:
    """An event that the registry published."""

    type: str
    key: str
    sequence: int
    traceparent: str
    payload: bytes


@dataclass
class Registry:
    """The running registry as its tests see it."""

    DELIVERY: ClassVar[str] = DELIVERY
    settings: RegistrySettings
    dsn: str
    broker: MemoryBroker
    peers: dict[str, Sections]
    servers: dict[str, Server]
    stub: Any
    access: Any
    channel: grpc.aio.Channel
    components: list[Component]
    gateway_token: str
    sequences: Counter[tuple[str, str]] = field(default_factory=Counter)
    ids: SystemIds = field(default_factory=SystemIds)

    def mlflow(self, user: str = "ed", *roles: str, run: str = "") -> Mlflow:
        """MLflow's API as this person reaches it, or the holder of a run's token; without roles an editor."""
        (http,) = [component.http for component in self.components if hasattr(component, "http")]
        caller = Caller("gateway", user, frozenset() if run else frozenset(roles or ("editor",)), run or None)
        return Mlflow(http, {"authorization": f"Bearer {self.gateway_token}", **dict(identity_metadata(caller))})

    @contextmanager
    def user(self, name: str, *roles: str) -> Iterator[None]:
        """Calls within the block are made by this person."""
        with acting_for(Caller("gateway", name, frozenset(roles))):
            yield

    async def apply(self, yaml: str = DELIVERY, *, user: str = "ed", roles: tuple[str, ...] = ("editor",), dry_run: bool = False) -> Any:
        with self.user(user, *roles):
            return await self.stub.ApplyDelivery(service_pb2.ApplyDeliveryRequest(yaml=yaml, dry_run=dry_run))

    def publish(
        self, topic: str, kind: str, key: str, message: Message | bytes, *, sequence: int = 0, traceparent: str = "", again: int = 1
    ) -> UUID:
        """Puts an event of another service on the broker, `again` times."""
        if not sequence:
            self.sequences[topic, key] += 1
            sequence = self.sequences[topic, key]
        payload = message if isinstance(message, bytes) else message.SerializeToString()
        event = Event(kind, topic, key, sequence, payload, self.ids.uuid7(), datetime.now(UTC), traceparent=traceparent)
        for _ in range(again):
            self.broker.append(Record(topic, key.encode(), payload, encode_headers(event, "/test"), 0))
        return event.id

    def told(self, topic: str = topics.MODELS) -> list[Told]:
        """Everything the registry has published to a topic, in order per key."""
        count = topics.topic(topic).partitions
        records = [record for number in range(count) for record in self.broker.log(Partition(topic, number)).records]
        found = []
        for record in records:
            said = decode_headers(record.headers)
            found.append(Told(said.type, (record.key or b"").decode(), said.sequence, said.traceparent, record.value or b""))
        return found

    async def wait_told(self, kind: str, number: int = 1, topic: str = topics.MODELS) -> list[Told]:
        """Waits until so many events of a type were published; all of them."""

        async def there() -> list[Told]:
            found = [told for told in self.told(topic) if told.type == kind]
            return found if len(found) >= number else []

        found: list[Told] = await eventually(there, f"{number} {kind}")
        return found

    async def version(self, number: int, model: str = "flights") -> service_pb2.ModelVersion:
        with self.user("eve", "viewer"):
            response = await self.stub.GetVersion(service_pb2.GetVersionRequest(model=model, version=number))
        found: service_pb2.ModelVersion = response.version
        return found

    async def wait_version(self, number: int, stage: str, reason: str = "") -> service_pb2.ModelVersion:
        """Waits until a version stands in a stage, with words in its reason."""

        async def there() -> service_pb2.ModelVersion | None:
            if not await self.rows("SELECT 1 FROM model_version WHERE number = $1", number):
                return None
            found = await self.version(number)
            return found if found.stage == stage and reason in found.reason else None

        found: service_pb2.ModelVersion = await eventually(there, f"version {number} in {stage}: {reason}")
        return found

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """What the database says."""
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": "registry"})
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows
        finally:
            await connection.close()

    async def wait_rows(self, query: str) -> list[asyncpg.Record]:
        """Waits until the database answers with rows."""
        found: list[asyncpg.Record] = await eventually(lambda: self.rows(query), query)
        return found

    async def caught_up(self) -> None:
        """Waits until the registry has read everything on the broker."""

        async def behind() -> bool:
            partitions = [Partition(topic, n) for topic in (topics.EVALS, topics.DEPLOYS) for n in range(topics.topic(topic).partitions)]
            ends = {(p.topic, p.number): end for p, (_, end) in (await self.broker.offsets(partitions)).items() if end}
            rows = await self.rows("SELECT topic, partition, next_offset FROM consumer_offset")
            return {(r["topic"], r["partition"]): r["next_offset"] for r in rows if r["next_offset"]} == ends

        await eventually(behind, "the registry does not catch up")

    def judgement(
        self, run: str, champion: int = 0, *, revision: int = 1, evaluation: str = "", author: str = "ann"
    ) -> evaluator_pb.Judgement:
        """What the evaluator says of a run's model."""
        return evaluator_pb.Judgement(
            evaluation_id=evaluation or f"eval-{run}-{champion}",
            journey=events_pb2.Journey(journey_id=f"journey-{run}", delivery="flight-delays", delivery_revision=revision, run_id=run),
            model="flights",
            candidate=model_pb2.DeliverableModel(
                name="model",
                format="onnx",
                blob=model_pb2.BlobRef(sha256=hash_secret(run), size_bytes=9, key=f"blobs/{run}"),
                signature=model_pb2.ModelSignature(inputs=[model_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1, 3])]),
                samples=model_pb2.BlobRef(sha256="s", size_bytes=1, key="samples"),
            ),
            champion_version=champion,
            champion_sha256="",
            author=author,
            source=tracker_pb.RunSource(commit="abc", command="python train.py"),
            report_html=model_pb2.BlobRef(key="report.html"),
        )

    def passes(self, run: str, champion: int = 0, *, again: int = 1, traceparent: str = "", **how: Any) -> None:
        message = evaluator_pb.EvalPassed(judgement=self.judgement(run, champion, **how))
        self.publish(topics.EVALS, "eval.passed", "flights", message, again=again, traceparent=traceparent)

    async def rollout(self, version: int) -> deployer_pb.RolloutRef:
        """How the deployer speaks of the rollout of a version."""
        return deployer_pb.RolloutRef(rollout_id=f"rollout-{version}", endpoint="flights", version=(await self.version(version)).ref)

    def deploys(self, kind: str, message: Message, *, again: int = 1) -> UUID:
        return self.publish(topics.DEPLOYS, kind, "flights", message, again=again)

    async def live(self, run: str, version: int, champion: int = 0) -> None:
        """Brings a run's model all the way to production."""
        self.passes(run, champion)
        await self.wait_version(version, "Staging", "rolling out")
        self.deploys("deploy.completed", deployer_pb.DeployCompleted(rollout=await self.rollout(version), first=not champion))
        await self.wait_version(version, "Production")


@pytest.fixture
async def make_registry(database: Any) -> AsyncIterator[Callable[..., Awaitable[Registry]]]:
    """Starts a registry; settings may be given."""
    components: list[Component] = []
    channels: list[grpc.aio.Channel] = []

    async def make(**more: Any) -> Registry:
        registry_token, registry_hash = new_service_token("registry")
        gateway_token, gateway_hash = new_service_token("gateway")
        await migrate.upgrade(database.sqlalchemy, "registry", MIGRATIONS)
        peer_settings = RegistrySettings(service_token_hashes=f"registry={registry_hash}")
        peers, servers, ports = {}, {}, {}
        for section in ("train", "evaluate", "serve"):
            peers[section] = Sections()
            servers[section] = Server("127.0.0.1:0", peer_settings, {f"/{VALIDATION}/ValidateSection": Rule({"registry"})})
            servers[section].add(service_pb2_grpc.add_DeliverySectionServiceServicer_to_server, peers[section], VALIDATION)
            ports[section] = await servers[section].start()
            components.append(servers[section])
        settings = RegistrySettings(
            database_url=database.sqlalchemy,
            service_token=SecretStr(registry_token),
            service_token_hashes=f"gateway={gateway_hash}",
            trainer_address=f"127.0.0.1:{ports['train']}",
            evaluator_address=f"127.0.0.1:{ports['evaluate']}",
            deployer_address=f"127.0.0.1:{ports['serve']}",
            shutdown_grace_s=2,
            **more,
        )
        broker = MemoryBroker()
        await topics.ensure_topics(broker)
        built = build(settings, broker)
        server = built[-1]
        assert isinstance(server, Server)
        for component in built:
            components.append(component)
            await component.start()
        to_registry = channel(
            f"127.0.0.1:{server.listening()['grpc']}", RegistrySettings(service_token=SecretStr(gateway_token), service_token_hashes="")
        )
        channels.append(to_registry)
        return Registry(
            settings,
            str(database),
            broker,
            peers,
            servers,
            service_pb2_grpc.RegistryServiceStub(to_registry),
            service_pb2_grpc.AccessServiceStub(to_registry),
            to_registry,
            list(built),
            gateway_token,
        )

    yield make
    for one in channels:
        await one.close()
    for component in reversed(components):
        await component.stop()


@pytest.fixture
async def registry(make_registry: Callable[..., Awaitable[Registry]]) -> Registry:
    """A registry with the settings of a small installation."""
    return await make_registry()
