"""A whole evaluator on a real PostgreSQL, a real S3 store and the real sandbox, beside a small tracker.

Its events go through a broker in memory or through Kafka.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import json
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import S3Location
from artifacts.blobs import blob_key
from artifacts.s3 import S3Store
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2, service_pb2_grpc
from contracts.registry.v1 import events_pb2 as registry_pb
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from contracts.tracker.v1 import service_pb2 as tracker_service_pb
from contracts.tracker.v1 import service_pb2_grpc as tracker_grpc
from evaluator.adapters.tables import SCHEMA
from evaluator.bootstrap import MIGRATIONS, build
from evaluator.settings import EvaluatorSettings
from eventing import topics
from eventing.broker import Broker, Partition, Record
from eventing.envelope import Event, decode_headers, encode_headers
from eventing.kafka import KafkaBroker
from eventing.memory import MemoryBroker
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from jobs import Backoff
from pydantic import SecretStr
from servicekit import migrate
from servicekit.access import Caller, Rule, new_service_token
from servicekit.clock import SystemIds
from servicekit.errors import NotFound
from servicekit.rpc import Server, acting_for, channel

DEADLINE_S = 60.0
TRACKER = "headrace.tracker.v1.TrackerService"
ROWS = 500
MODEL = "flight-delays"

_RANDOM = np.random.default_rng(9)
LABELS = (_RANDOM.random(ROWS) < 0.4).astype(np.int8)
X = (LABELS + 0.8 * _RANDOM.normal(size=ROWS)).astype(np.float32)
KINDS = ["late" if one else "other" for one in _RANDOM.random(ROWS) < 0.3]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The tiny models of the unit tests: test folders are not packages, so the module is loaded by its path."""
    name = "evaluator_tiny_onnx"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "unit" / "evaluator" / "tiny_onnx.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


async def eventually(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """What the condition answers as soon as it is true; fails after the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if found := await condition():
                    return found
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {DEADLINE_S:g} s: {what}") from None


class Datasets(tracker_grpc.TrackerServiceServicer):
    """A tracker that knows data sets and nothing else."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], tracker_service_pb.Dataset] = {}

    async def GetDataset(self, request: tracker_service_pb.GetDatasetRequest, context: Any) -> tracker_service_pb.GetDatasetResponse:
        found = self.known.get((request.name, request.version))
        if found is None:
            raise NotFound(f"there is no version {request.version} of {request.name}")
        return tracker_service_pb.GetDatasetResponse(dataset=found)


@dataclass
class Told:
    """An event that the evaluator published, and its message."""

    type: str
    key: str
    sequence: int
    traceparent: str
    message: Any


_MESSAGES: dict[str, Any] = {
    "eval.passed": events_pb2.EvalPassed,
    "eval.failed": events_pb2.EvalFailed,
    "eval.skipped": events_pb2.EvalSkipped,
}


@dataclass
class Evaluator:
    """The running evaluator as its tests see it: give it runs, look at what it tells."""

    settings: EvaluatorSettings
    dsn: str
    broker: Broker
    objects: S3Store
    datasets: Datasets
    tiny: ModuleType
    stub: service_pb2_grpc.EvaluatorServiceStub
    sections: registry_grpc.DeliverySectionServiceStub
    holdout: model_pb2.DatasetRef = field(default_factory=model_pb2.DatasetRef)
    sequences: Counter[tuple[str, str]] = field(default_factory=Counter)
    ids: SystemIds = field(default_factory=SystemIds)

    async def publish(self, topic: str, kind: str, key: str, message: Message, *, traceparent: str = "", again: int = 1) -> None:
        """Puts an event of another service on the broker, `again` times."""
        self.sequences[topic, key] += 1
        event = Event(
            kind,
            topic,
            key,
            self.sequences[topic, key],
            message.SerializeToString(),
            self.ids.uuid7(),
            datetime.now(UTC),
            traceparent=traceparent,
        )
        record = Record(self.settings.topic_prefix + topic, key.encode(), event.payload, encode_headers(event, "/test"), 0)
        producer = self.broker.producer()
        await producer.start()
        try:
            for _ in range(again):
                assert list(await producer.send([record])) == [None]
        finally:
            await producer.stop()

    async def put(self, data: bytes) -> model_pb2.BlobRef:
        sha256 = hashlib.sha256(data).hexdigest()
        await self.objects.put(blob_key(sha256), data, sha256=sha256)
        return model_pb2.BlobRef(sha256=sha256, size_bytes=len(data), key=blob_key(sha256))

    async def push_holdout(self) -> None:
        file = io.BytesIO()
        pq.write_table(pa.table({"x": X, "kind": KINDS, "late": LABELS}), file)
        blob = await self.put(file.getvalue())
        self.holdout = model_pb2.DatasetRef(name="april", version=3, sha256=blob.sha256)
        self.datasets.known["april", 3] = tracker_service_pb.Dataset(ref=self.holdout, blob=blob, holdout=True)

    async def apply(self, revision: int = 1, **section: Any) -> None:
        """A delivery that claims the experiment `flights`."""
        evaluate = {
            "experiment": "flights",
            "holdout": {"dataset": "april", "version": 3, "label": "late"},
            "metric": {"name": "auc", "goal": "maximize", "margin": 0.01},
            "require": ["auc.at_least 0.57", "calibration.at_most 0.5", "parity", "latency_p99_ms < 10000"],
        } | section
        message = registry_pb.DeliveryApplied(
            name="delays",
            revision=revision,
            evaluate_json=json.dumps(evaluate),
            experiment="flights",
            model=MODEL,
            endpoint="delays",
            applied_at=Timestamp(seconds=1),
        )
        await self.publish(topics.DELIVERIES, "delivery.applied", "delays", message)

    async def logged(self, data: bytes, slope: float = 2.0) -> model_pb2.DeliverableModel:
        """A model as the tracker stores what a run logged: its file, its signature, and samples that say what `slope` says."""
        x, kinds = np.array([0.5, -1.0], np.float32), ["late", "other"]
        samples = {
            "inputs": {"x": [[0.5], [-1.0]], "kind": [["late"], ["other"]]},
            "outputs": {"probability": self.tiny.probability(slope, x, kinds).tolist()},
        }
        specs = {
            part: [model_pb2.TensorSpec(name=one["name"], datatype=one["datatype"], shape=[-1, 1]) for one in self.tiny.SIGNATURE[part]]
            for part in ("inputs", "outputs")
        }
        return model_pb2.DeliverableModel(
            name="net",
            format="onnx",
            blob=await self.put(data),
            signature=model_pb2.ModelSignature(**specs),
            samples=await self.put(json.dumps(samples).encode()),
        )

    async def finish_run(self, *models: model_pb2.DeliverableModel, traceparent: str = "", again: int = 1, **changes: Any) -> str:
        """Tells of a finished run and returns its id."""
        run_id = secrets.token_hex(16)
        message = tracker_pb.RunFinished(
            run_id=run_id,
            experiment_name=changes.pop("experiment_name", "flights"),
            user="ada",
            models=models,
            inputs=[model_pb2.DatasetRef(name="2013", version=1, sha256="c" * 64)],
            source=tracker_pb.RunSource(commit="c0ffee"),
            **changes,
        )
        await self.publish(topics.RUNS, "run.finished", run_id, message, traceparent=traceparent, again=again)
        return run_id

    async def complete_deploy(self, version: int, model: model_pb2.DeliverableModel) -> None:
        """Tells that a version has all traffic: it is the champion."""
        rollout = deployer_pb.RolloutRef(rollout_id="o", endpoint="delays", version=registry_pb.VersionRef(model=MODEL, version=version))
        message = deployer_pb.DeployCompleted(rollout=rollout, blob=model.blob)
        await self.publish(topics.DEPLOYS, "deploy.completed", "delays", message)

    async def told(self) -> list[Told]:
        """Everything that the evaluator has published, in order per key."""
        name = self.settings.topic_prefix + topics.EVALS
        partitions = [Partition(name, number) for number in range(topics.topic(topics.EVALS).partitions)]
        ends = await self.broker.offsets(partitions)
        missing = {partition: end for partition, (_, end) in ends.items() if end}
        found: list[Told] = []
        reader = self.broker.reader([name])
        try:
            await reader.start()
            while missing:
                polled = await reader.poll(100, 0.2)
                for partition in polled.assigned or ():
                    reader.seek(partition, 0)
                for record in polled.records:
                    said = decode_headers(record.headers)
                    message = _MESSAGES[said.type].FromString(record.value or b"")
                    found.append(Told(said.type, (record.key or b"").decode(), said.sequence, said.traceparent, message))
                    if record.offset + 1 >= missing.get(record.partition, 0):
                        missing.pop(record.partition, None)
        finally:
            await reader.stop()
        return found

    async def outcome_of(self, run_id: str, number: int = 1) -> Told:
        """The `number`th event about a run, as soon as it is there."""

        async def there() -> Told | None:
            about = [one for one in await self.told() if _run_of(one) == run_id]
            return about[number - 1] if len(about) >= number else None

        told: Told = await eventually(there, f"event {number} about run {run_id}")
        return told

    def asking(self, *roles: str) -> Any:
        """Calls within the block are made by somebody with these roles."""
        return acting_for(Caller("gateway", "ed", frozenset(roles or ("viewer",))))


def _run_of(told: Told) -> str:
    run_id: str = (told.message.journey if told.type == "eval.skipped" else told.message.judgement.journey).run_id
    return run_id


Start = Callable[..., Awaitable[Evaluator]]


@pytest.fixture
async def start(database: Any, stack_servers: Any, tiny: ModuleType, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts an evaluator: with a topic prefix over Kafka, else over a broker in memory. `idle`: only what is around it."""
    stack = AsyncExitStack()
    tokens = {name: new_service_token(name) for name in ("gateway", "registry", "evaluator")}

    async def run(topic_prefix: str = "", *, idle: bool = False, **changes: Any) -> Evaluator:
        datasets = Datasets()  # type: ignore[abstract]  # it serves one method of many
        hashes = ",".join(f"{name}={digest}" for name, (_, digest) in tokens.items())
        tracker_settings = EvaluatorSettings(service_token_hashes=hashes)
        tracker = Server("127.0.0.1:0", tracker_settings, {f"/{TRACKER}/GetDataset": Rule({"evaluator"})})
        tracker.add(tracker_grpc.add_TrackerServiceServicer_to_server, datasets, TRACKER)
        tracker_port = await tracker.start()
        stack.push_async_callback(tracker.stop, 0)
        s3: S3Location = stack_servers.s3
        words: dict[str, Any] = {
            "database_url": database.sqlalchemy,
            "kafka_bootstrap": stack_servers.kafka if topic_prefix else "127.0.0.1:1",
            "topic_prefix": topic_prefix,
            "service_token": SecretStr(tokens["evaluator"][0]),
            "service_token_hashes": hashes,
            "tracker_address": f"127.0.0.1:{tracker_port}",
            "s3_endpoint": s3.endpoint,
            "s3_access_key": s3.access_key,
            "s3_secret_key": SecretStr(s3.secret_key),
            "s3_bucket": s3.bucket,
            "state_dir": tmp_path / "state",
        }
        settings = EvaluatorSettings(**words | changes)
        await migrate.upgrade(settings.database_url, SCHEMA, MIGRATIONS)
        broker: Broker = KafkaBroker(stack_servers.kafka, "test") if topic_prefix else MemoryBroker()
        stack.push_async_callback(broker.close)
        ports: dict[str, int] = {}
        components = [] if idle else build(settings, None if topic_prefix else broker, Backoff(first_s=0.05, most_s=0.1))
        for component in components:
            await component.start()
            stack.push_async_callback(component.stop)
            ports.update(getattr(component, "listening", dict)())

        def stub(kind: Any, service: str) -> Any:
            opened = channel(f"127.0.0.1:{ports.get('grpc', 1)}", EvaluatorSettings(service_token=SecretStr(tokens[service][0])))
            stack.push_async_callback(opened.close)
            return kind(opened)

        made = Evaluator(
            settings,
            database,
            broker,
            S3Store(s3),
            datasets,
            tiny,
            stub(service_pb2_grpc.EvaluatorServiceStub, "gateway"),
            stub(registry_grpc.DeliverySectionServiceStub, "registry"),
        )
        await made.push_holdout()
        return made

    yield run
    await stack.aclose()


@pytest.fixture
async def evaluator(start: Start) -> Evaluator:
    """An evaluator whose events go through memory, and the delivery applied."""
    made = await start()
    await made.apply()
    return made
