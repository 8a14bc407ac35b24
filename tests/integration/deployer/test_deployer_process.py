"""The deployer as it is run: a process of its own on real PostgreSQL, Kafka, S3 and Triton, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
from artifacts.s3 import S3Store
from contracts.deployer.v1 import events_pb2 as deploys
from contracts.deployer.v1 import service_pb2 as pb
from contracts.deployer.v1 import service_pb2_grpc
from contracts.eventing.v1 import service_pb2 as dead
from contracts.eventing.v1 import service_pb2_grpc as dead_grpc
from contracts.registry.v1 import service_pb2 as sections
from contracts.registry.v1 import service_pb2_grpc as sections_grpc
from deployer.bootstrap import MIGRATIONS
from eventing import topics
from eventing.broker import Record
from eventing.kafka import KafkaBroker
from onnx import TensorProto, helper
from pydantic import SecretStr
from servicekit import migrate, rpc
from servicekit.access import Caller, hash_secret
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound
from servicekit.settings import ServiceSettings

TOKENS = {name: f"{name}.{secrets.token_urlsafe(24)}" for name in ("gateway", "registry")}
ANN = Caller("gateway", "ann", frozenset({"editor"}))
VICTOR = Caller("gateway", "victor", frozenset({"viewer"}))


def model(factor: float) -> bytes:
    """y = factor * x, as a real ONNX file."""
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    shape: list[str | int | None] = ["batch", 1]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


@dataclass
class Process:
    """A deployer's environment, and the process that runs in it now."""

    env: dict[str, str]
    announce: Path
    running: asyncio.subprocess.Process | None = None
    channels: list[Any] = field(default_factory=list)

    async def start(self) -> None:
        self.announce.unlink(missing_ok=True)
        self.running = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "deployer", "--announce", str(self.announce), env=self.env, stdout=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(60):
            while not self.announce.exists():
                assert self.running.returncode is None, "the deployer ended while it started"
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.running is not None
        self.running.kill()
        await self.running.wait()
        await self.close()

    async def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self.running is not None
        self.running.send_signal(signal.SIGTERM)
        await self.close()
        return await self.running.wait()

    def channel(self, service: str = "gateway") -> Any:
        """A channel as this service."""
        port = json.loads(self.announce.read_text())["grpc"]
        settings = ServiceSettings(service_token=SecretStr(TOKENS[service]))
        self.channels.append(rpc.channel(f"127.0.0.1:{port}", settings))
        return self.channels[-1]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()
        self.channels.clear()


@pytest.fixture
async def process(database: Any, stack_servers: Any, triton: Any, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Process]:
    await migrate.upgrade(database.sqlalchemy, "deployer", MIGRATIONS)
    s3 = stack_servers.s3
    settings = {
        "DATABASE_URL": database.sqlalchemy,
        "KAFKA_BOOTSTRAP": stack_servers.kafka,
        "TOPIC_PREFIX": topic_prefix,
        "S3_ENDPOINT": s3.endpoint,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "S3_BUCKET": s3.bucket,
        "TRITON_GRPC": triton.grpc,
        "TRITON_HTTP": triton.http,
        "TRITON_SECRET": triton.secret,
        "SERVICE_TOKEN_HASHES": ",".join(f"{name}={hash_secret(token)}" for name, token in TOKENS.items()),
    }
    env = {**os.environ, **{f"HEADRACE_{name}": value for name, value in settings.items()}}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    made = Process(env, tmp_path / "announce.json")
    yield made
    await made.close()
    if made.running is not None and made.running.returncode is None:
        made.running.kill()
        await made.running.wait()


async def publish(broker: KafkaBroker, record: Record) -> None:
    producer = broker.producer()
    await producer.start()
    try:
        assert await producer.send([record]) == [None]
    finally:
        await producer.stop()


async def state_of(process: Process, version: int) -> str:
    """The state of the newest rollout of a version; empty when there is none."""
    return (await rollout_of(process, version)).state


async def alarm_of(process: Process, version: int) -> str:
    """What the watch of a version showed."""
    return (await rollout_of(process, version)).alarm


async def rollout_of(process: Process, version: int) -> pb.Rollout:
    """The newest rollout of a version; an empty one when there is none."""
    with rpc.acting_for(VICTOR):
        answer = await service_pb2_grpc.DeployerServiceStub(process.channel()).ListRollouts(pb.ListRolloutsRequest())
    return next((found for found in answer.rollouts if found.ref.version.version == version), pb.Rollout())


ROWS = {"inputs": {"x": [[1.0], [3.0]]}, "outputs": {"y": [[2.0], [6.0]]}}


@contextlib.asynccontextmanager
async def serving(
    process: Process, stand_parts: Any, stack_servers: Any, topic_prefix: str
) -> AsyncIterator[tuple[KafkaBroker, S3Store, Any, Any]]:
    """The deployer with version 1 live, and its world: broker, object store, what the registry and one gateway tell."""
    gateway_class, registry_class, serve, eventually = stand_parts
    broker = KafkaBroker(stack_servers.kafka, "test")
    store = S3Store(stack_servers.s3)
    await topics.ensure_topics(broker, topic_prefix)
    registry = registry_class(topic_prefix)
    gateway = gateway_class(broker, prefix=topic_prefix)
    await process.start()
    try:
        await gateway.start()
        await publish(broker, registry.applied(serve()))
        await publish(broker, await registry.promoted(store, 1, model(2.0), ROWS))
        await eventually(lambda: gateway.weights() == {1: 10_000}, "version 1 to be routed")
        yield broker, store, registry, gateway
    finally:
        await gateway.stop()
        await broker.close()
        await store.stop()


async def test_a_rollout_on_real_servers_survives_sigkill(
    process: Process, stand_parts: Any, stack_servers: Any, triton: Any, topic_prefix: str
) -> None:
    *_, eventually = stand_parts
    async with serving(process, stand_parts, stack_servers, topic_prefix) as (broker, store, registry, gateway):
        gateway.per_window = 0  # so that version 2 goes no further than its shadow stage at first
        rows = {"inputs": {"x": [[1.0], [3.0]]}, "outputs": {"y": [[2.001], [6.003]]}}
        await publish(broker, await registry.promoted(store, 2, model(2.001), rows, champion=1))
        for wanted in ("preparing warming shadowing", "stepping completing", "completing completed"):

            async def there(states: str = wanted) -> bool:
                return await state_of(process, 2) in states.split()

            await eventually(there, f"version 2 to be {wanted}", within_s=60)
            if gateway.per_window == 0:
                # This one waits behind it, judged against a version that is not live any more when its turn comes.
                await publish(broker, await registry.promoted(store, 3, model(2.002), rows, champion=1))
                await eventually(lambda: state_of(process, 3), "version 3 to wait", within_s=60)
                gateway.per_window = 40
            await process.kill()
            await process.start()

        async def completed() -> bool:
            return await state_of(process, 2) == "completed"

        await eventually(completed, "version 2 to be completed", within_s=60)

        async def superseded() -> bool:
            return await state_of(process, 3) == "superseded"

        await eventually(superseded, "version 3 to be evaluated again", within_s=60)
        assert gateway.weights() == {2: 10_000}

        # What the route names really answers.
        (arm,) = gateway.route().arms
        assert arm.upstream == triton.http
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1000.0]}]}
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"http://{arm.upstream}/v2/models/{arm.runtime_model}/infer", json=body)
        assert answer.json()["outputs"][0]["data"] == pytest.approx([2001.0], rel=1e-4)

        await check_calls(process)
        # A watch outlives its deployer, too.
        await process.kill()
        gateway.bad[2] = 0.95
        await process.start()
        await eventually(lambda: alarm_of(process, 2), "an alarm about version 2", within_s=60)
        assert gateway.weights() == {2: 10_000}
        assert await process.terminate() == 0


class Callers:
    """One who asks, request after request, the arm that has all traffic, and counts answers: `right`, and everything else."""

    def __init__(self, gateway: Any) -> None:
        self.right = 0
        self.others: list[str] = []
        self._gateway = gateway

    async def __aenter__(self) -> Callers:
        self._task = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _ask(self) -> None:
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [3.0]}]}
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                (arm,) = [arm for arm in self._gateway.route().arms if arm.weight_bps == 10_000]
                answer = await client.post(f"http://{arm.upstream}/v2/models/{arm.runtime_model}/infer", json=body)
                if answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [6.0]:
                    self.right += 1
                else:
                    self.others.append(answer.text)


async def test_a_model_that_triton_refuses_is_rolled_back_with_its_words_and_callers_notice_nothing(
    process: Process, stand_parts: Any, stack_servers: Any, topic_prefix: str
) -> None:
    *_, eventually = stand_parts
    async with serving(process, stand_parts, stack_servers, topic_prefix) as (broker, store, registry, gateway):

        async def ended(version: int, state: str) -> bool:
            return await state_of(process, version) == state

        await eventually(lambda: ended(1, "completed"), "version 1 to be completed", within_s=60)
        broken = onnx.load_from_string(model(2.0))
        broken.graph.node[0].op_type = "Frobnicate"
        async with Callers(gateway) as callers:
            await eventually(lambda: callers.right > 0, "callers to be answered")
            await publish(broker, await registry.promoted(store, 2, broken.SerializeToString(), ROWS, champion=1))
            await eventually(lambda: ended(2, "rolled_back"), "version 2 to be rolled back", within_s=60)
            answered = callers.right
            await eventually(lambda: callers.right > answered, "callers to be answered still")
        refused = await rollout_of(process, 2)
        assert refused.cause == deploys.END_CAUSE_RUNTIME
        assert "Frobnicate" in refused.reason
        assert gateway.weights() == {1: 10_000}
        assert 2 not in gateway.served
        assert callers.others == []


async def check_calls(process: Process) -> None:
    """What the gateway and the registry ask, and what they are refused."""
    stub = service_pb2_grpc.DeployerServiceStub(process.channel())
    with rpc.acting_for(VICTOR):
        endpoints = (await stub.ListEndpoints(pb.ListEndpointsRequest())).endpoints
        assert [(found.name, found.live_version, found.delivery) for found in endpoints] == [("flights", 2, "flights")]
        one = (await stub.GetEndpoint(pb.GetEndpointRequest(name="flights"))).endpoint
        assert [arm.version for arm in one.route.arms] == [2]
        first = await stub.ListRollouts(pb.ListRolloutsRequest(endpoint="flights", page_size=1))
        rest = await stub.ListRollouts(pb.ListRolloutsRequest(endpoint="flights", page_token=first.next_page_token))
        assert [found.ref.version.version for found in (*first.rollouts, *rest.rollouts)] == [3, 2, 1]
        assert [found.stale for found in (*first.rollouts, *rest.rollouts)] == [True, False, False]
        assert rest.next_page_token == ""
        rollout_id = rest.rollouts[0].ref.rollout_id
        explained = await stub.ExplainRollout(pb.ExplainRolloutRequest(rollout_id=rollout_id))
        few = await stub.ExplainRollout(pb.ExplainRolloutRequest(rollout_id=rollout_id, page_size=2))
        further = await stub.ExplainRollout(pb.ExplainRolloutRequest(rollout_id=rollout_id, page_token=few.next_page_token))
        assert [*few.decisions, *further.decisions] == list(explained.decisions)
        assert (len(few.decisions), further.next_page_token) == (2, "")
        with pytest.raises(Invalid, match="not a page token"):
            await stub.ExplainRollout(pb.ExplainRolloutRequest(rollout_id=rollout_id, page_token="x"))
        assert explained.decisions[0].to_state == "waiting"
        assert explained.decisions[-1].to_state == "completed"
        windows = [json.loads(row.evidence_json) for row in explained.decisions if row.evidence_json]
        assert windows[-1]["guards"]["error"]["proven"]
        assert explained.rollout.guards[0].canary_requests > 0
        with pytest.raises(NotFound):
            await stub.GetEndpoint(pb.GetEndpointRequest(name="nobody"))
        with pytest.raises(Invalid):
            await stub.GetRollout(pb.GetRolloutRequest(rollout_id="1"))
        with pytest.raises(Forbidden):
            await stub.AbortRollout(pb.AbortRolloutRequest(rollout_id=rollout_id))
    with rpc.acting_for(ANN):
        for command in (
            stub.PauseRollout(pb.PauseRolloutRequest(rollout_id=rollout_id)),
            stub.AbortRollout(pb.AbortRolloutRequest(rollout_id=rollout_id)),
        ):
            with pytest.raises(Conflict):
                await command
        letters = await dead_grpc.DeadLetterServiceStub(process.channel()).ListDeadLetters(dead.ListDeadLettersRequest())
        assert list(letters.dead_letters) == []

    validator = sections_grpc.DeliverySectionServiceStub(process.channel("registry"))
    wrong = {"endpoint": "e", "rollout": {"steps": [{"weight": "5%", "requests": 1}, {"weight": "90%", "requests": 1}]}}
    answered = await validator.ValidateSection(sections.ValidateSectionRequest(section="serve", section_json=json.dumps(wrong)))
    assert [violation.field for violation in answered.violations] == ["serve.rollout.steps[1].weight"]
    strict = {"endpoint": "e", "rollout": {"guards": [{"bad": "error", "margin": "1%"}]}}
    loose = {"endpoint": "e", "rollout": {"guards": [{"bad": "error", "margin": "2%"}]}}
    request = sections.ValidateSectionRequest(section="serve", section_json=json.dumps(loose), previous_json=json.dumps(strict))
    answered = await validator.ValidateSection(request)
    assert (list(answered.violations), list(answered.loosened)) == ([], ["serve.rollout.guards[0].margin"])
    for broken in ("{", "[]"):
        request = sections.ValidateSectionRequest(section="serve", section_json=broken)
        with contextlib.suppress(Invalid):
            assert (await validator.ValidateSection(request)).violations[0].field == "serve"
    with pytest.raises(Invalid):
        await validator.ValidateSection(sections.ValidateSectionRequest(section="train", section_json="{}"))
