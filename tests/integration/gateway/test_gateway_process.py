"""`python -m gateway` as it runs: tables from a real Kafka, windows back to it, the file it starts from, several processes, stopping."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.gateway.v1 import events_pb2 as gateway_pb
from contracts.registry.v1 import events_pb2 as registry_pb
from eventing.besteffort import BestEffortConsumer
from eventing.broker import Record
from eventing.envelope import Event, Received, encode_headers
from eventing.kafka import KafkaBroker
from eventing.topics import ACCESS, ROUTES, TRAFFIC, ensure_topics
from localstack import server as servers
from servicekit.clock import SystemClock, SystemIds

KEY = "hr_0123456789abcdef_" + "k" * 32
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]}).encode()
DEADLINE_S = 60.0


async def eventually(check: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE_S
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"not in time: {what}"
        await asyncio.sleep(0.03)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
async def runtime() -> AsyncIterator[str]:
    """A runtime that answers with the name of the model it was asked for; its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line.split(": ")[1]) for line in head.lower().split("\r\n") if line.startswith("content-length")), 0)
                await reader.readexactly(length)
                name = head.split(" ", 2)[1].split("/")[3]
                status = "500 X" if name == "m-broken-g1" else "200 OK"
                body = json.dumps({"model_name": name, "model_version": "1", "outputs": []}).encode()
                writer.write(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


class World:
    """A Kafka as the deployer and the registry write to it, and what gateways say there."""

    def __init__(self, kafka: str, prefix: str, runtime: str, folder: Path) -> None:
        self.kafka = kafka
        self.prefix = prefix
        self.runtime = runtime
        self.folder = folder
        self.broker = KafkaBroker(kafka, "gateway-test")
        self.messages: list[gateway_pb.TrafficWindow] = []
        self._listener = BestEffortConsumer(self.broker, TRAFFIC, self._heard, prefix)
        self._publication = 0

    async def start(self) -> None:
        await ensure_topics(self.broker, self.prefix)
        await self._listener.start()
        await asyncio.wait_for(self._listener.connected(), DEADLINE_S)

    async def stop(self) -> None:
        await self._listener.stop()
        await self.broker.close()

    async def _heard(self, event: Received) -> None:
        self.messages.append(gateway_pb.TrafficWindow.FromString(event.payload))

    async def _send(self, topic: str, key: str, type: str, payload: bytes) -> None:
        event = Event(type, topic, key, 1, payload, SystemIds().uuid7(), SystemClock().now())
        producer = self.broker.producer()
        await producer.start()
        record = Record(self.prefix + topic, key.encode(), payload, encode_headers(event, "/test"), int(time.time() * 1000))
        outcomes = await producer.send([record])
        await producer.stop()
        assert list(outcomes) == [None]

    async def key(self, revision: int = 1, *, revoked: bool = False) -> None:
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        message = registry_pb.AccessChanged(
            key_id="k", revision=revision, hash=digest, subject="s", inference_endpoints=["*"], revoked=revoked
        )
        await self._send(ACCESS, "k", "access.changed", message.SerializeToString())

    async def route(self, revision: int, *, canary: int = 0, canary_model: str = "m-v2-g1") -> None:
        self._publication += 1
        arms = [
            deployer_pb.Arm(
                arm="v1-g1", role=deployer_pb.ARM_ROLE_BASELINE, runtime="triton", upstream=self.runtime, runtime_model="m-v1-g1",
                model="m", version=1, weight_bps=10_000 - canary, fallback_weight_bps=10_000,
            )
        ]  # fmt: skip
        if canary:
            arms.append(
                deployer_pb.Arm(
                    arm="v2-g1", role=deployer_pb.ARM_ROLE_CANARY, runtime="triton", upstream=self.runtime, runtime_model=canary_model,
                    model="m", version=2, weight_bps=canary,
                )
            )  # fmt: skip
        message = deployer_pb.RouteChanged(
            endpoint="flights", revision=revision, publication=self._publication, arms=arms, assign=deployer_pb.ASSIGN_REQUEST,
            guards=[
                deployer_pb.Guard(id="error", kind=deployer_pb.GUARD_KIND_ERROR),
                deployer_pb.Guard(id="latency_ms>2000", kind=deployer_pb.GUARD_KIND_LATENCY, limit_ms=2000),
            ],
            rollout_id="r1", in_rollout=True, window_ms=250,
        )  # fmt: skip
        await self._send(ROUTES, "flights", "route.changed", message.SerializeToString())

    def environment(self, **more: str) -> dict[str, str]:
        ours = {
            "KAFKA_BOOTSTRAP": self.kafka,
            "TOPIC_PREFIX": self.prefix,
            "TRITON_HTTP": self.runtime,
            "GATEWAY_ADDRESS": "127.0.0.1:0",
            "GATEWAY_INSTANCE": "here",
            "STATE_DIR": str(self.folder / "state"),
            "ANNOUNCE_FILE": str(self.folder / "announce.json"),
            "SERVICE_TOKEN": "gateway.secret",
        } | more
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        return inherited | {f"HEADRACE_{name}": value for name, value in ours.items()}

    @asynccontextmanager
    async def gateway(self, **more: str) -> AsyncIterator[Running]:
        announce = self.folder / "announce.json"
        announce.unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "gateway"], env=self.environment(**more), stdout=log, stderr=log)  # noqa: ASYNC220
        try:
            await eventually(lambda: announce.exists() or process.poll() is not None, "the gateway listens")
            assert process.poll() is None, (self.folder / "log").read_text()[-3000:]
            ports = json.loads(announce.read_text())
            async with httpx.AsyncClient(timeout=20, trust_env=False, headers={"authorization": f"Bearer {KEY}"}) as client:
                yield Running(process, ports["gateway"], ports["http"], client)
        finally:
            if process.poll() is None:
                process.terminate()
            await asyncio.to_thread(process.wait, 30)

    def counted(self, name: str) -> dict[str, int]:
        arms = [arm for message in self.messages for endpoint in message.endpoints for arm in endpoint.arms if arm.arm == name]
        return {
            "requests": sum(arm.requests for arm in arms),
            "errors": sum(arm.bad["error"] for arm in arms),
            "fallbacks": sum(arm.fallbacks for arm in arms),
        }


class Running:
    """A gateway process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, health: int, client: httpx.AsyncClient) -> None:
        self.process = process
        self.port = port
        self.health = health
        self.client = client

    async def infer(self) -> httpx.Response:
        return await self.client.post(f"http://127.0.0.1:{self.port}/v2/models/flights/infer", content=BODY)

    async def answers(self, status: int) -> bool:
        return (await self.infer()).status_code == status

    async def ready(self) -> bool:
        return (await self.client.get(f"http://127.0.0.1:{self.health}/readyz")).status_code == 200

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 30)


@pytest.fixture
async def world(stack_servers: Any, topic_prefix: str, runtime: str, tmp_path: Path) -> AsyncIterator[World]:
    one = World(stack_servers.kafka, topic_prefix, runtime, tmp_path)
    await one.start()
    yield one
    await one.stop()


async def test_routes_and_keys_come_from_kafka_and_windows_go_back(world: World) -> None:
    async with world.gateway() as gateway:
        await eventually(gateway.ready, "readiness")
        assert (await gateway.infer()).status_code == 401
        await world.key()
        await world.route(1)
        await eventually(lambda: gateway.answers(200), "the first answer")
        await eventually(lambda: [one for one in acknowledged(world) if one == 1], "the acknowledgement")
        await world.route(2, canary=5_000, canary_model="m-broken-g1")
        await eventually(lambda: 2 in acknowledged(world), "the acknowledgement of the next revision")
        await eventually(lambda: sum(world.counted(arm)["requests"] for arm in ("v1-g1", "v2-g1")) >= 1, "a window")
        before = {arm: world.counted(arm) for arm in ("v1-g1", "v2-g1")}
        answers = [await gateway.infer() for _ in range(200)]
        assert {answer.status_code for answer in answers} == {200}
        fallbacks = sum("x-headrace-fallback" in answer.headers for answer in answers)
        assert 60 < fallbacks < 140
        await eventually(
            lambda: sum(world.counted(arm)["requests"] - before[arm]["requests"] for arm in ("v1-g1", "v2-g1")) >= 200, "their windows"
        )
        canary = {name: count - before["v2-g1"][name] for name, count in world.counted("v2-g1").items()}
        assert canary == {"requests": fallbacks, "errors": fallbacks, "fallbacks": fallbacks}
        await world.key(2, revoked=True)
        await eventually(lambda: gateway.answers(401), "the revocation")
        assert await gateway.stop() == 0
        await eventually(lambda: world.messages[-1].leaving, "the farewell")
    assert [one.sequence for one in world.messages] == list(range(1, len(world.messages) + 1))
    assert {one.instance for one in world.messages} == {"here-0"}
    assert len({one.boot_id for one in world.messages}) == 1


def acknowledged(world: World) -> list[int]:
    """The revisions in force, message by message."""
    return [message.endpoints[-1].route_revision for message in world.messages if message.endpoints]


async def test_it_serves_from_its_file_when_kafka_is_away(world: World) -> None:
    await world.key()
    await world.route(1)
    async with world.gateway() as gateway:
        await eventually(lambda: gateway.answers(200), "the first answer")
    async with world.gateway(KAFKA_BOOTSTRAP="127.0.0.1:9") as gateway:
        assert (await gateway.infer()).status_code == 200
        await eventually(gateway.ready, "readiness without Kafka")
        refused = await gateway.client.post(
            f"http://127.0.0.1:{gateway.port}/v2/models/flights/infer", content=BODY, headers={"authorization": "x"}
        )
        assert refused.status_code == 401


async def test_without_kafka_and_file_it_is_not_ready_and_denies(world: World) -> None:
    async with world.gateway(KAFKA_BOOTSTRAP="127.0.0.1:9", STATE_DIR=str(world.folder / "none")) as gateway:
        assert (await gateway.infer()).status_code == 401
        assert not await gateway.ready()
        assert (await gateway.client.get(f"http://127.0.0.1:{gateway.port}/v2/health/ready")).status_code == 503
        assert (await gateway.client.get(f"http://127.0.0.1:{gateway.port}/v2/health/live")).status_code == 200


async def test_it_serves_on_while_kafka_is_down_and_hears_what_comes_after(
    own_kafka: Any, topic_prefix: str, runtime: str, tmp_path: Path
) -> None:
    kafka = own_kafka()
    world = World(kafka.bootstrap, topic_prefix, runtime, tmp_path)
    await world.start()
    await world.key()
    await world.route(1)
    async with world.gateway() as gateway:
        await eventually(lambda: gateway.answers(200), "the first answer")
        await asyncio.to_thread(servers.crash, kafka)
        statuses = [(await gateway.infer()).status_code for _ in range(300)]
        assert set(statuses) == {200}
        await asyncio.to_thread(servers.restart, kafka)
        await eventually(lambda: sent(world, revision=2), "the route is published again")

        async def from_the_canary() -> bool:
            answer = await gateway.infer()
            assert answer.status_code == 200
            return answer.headers["x-headrace-arm"] == "v2-g1"

        await eventually(from_the_canary, "the new revision")
    await world.stop()


async def sent(world: World, revision: int) -> bool:
    from servicekit.errors import Transient

    try:
        await world.route(revision, canary=10_000 - 1)
    except (Transient, AssertionError):
        return False
    return True


async def test_several_processes_share_the_port_and_one_that_dies_is_replaced(world: World) -> None:
    await world.key()
    await world.route(1)
    async with world.gateway(GATEWAY_PROCESSES="2") as gateway:
        await eventually(lambda: {one.instance for one in world.messages} == {"here-0", "here-1"}, "both report")
        # Every connection is one process's; all of them know the tables.
        for _ in range(20):
            async with httpx.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {KEY}"}) as client:
                other = Running(gateway.process, gateway.port, gateway.health, client)
                await eventually(lambda other=other: other.answers(200), "an answer")  # type: ignore[misc]  # mypy cannot infer it
        children = children_of(gateway.process.pid)
        boots = {one.boot_id for one in world.messages}
        victim = next(pid for pid in children if b"GATEWAY_INDEX=1" in environment_of(pid))
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: {one.boot_id for one in world.messages if one.instance == "here-1"} - boots, "its successor")
        await eventually(gateway.ready, "readiness")
        assert await gateway.stop() == 0
        for pid in children:
            assert not is_alive(pid)
    leaving = {one.instance for one in world.messages if one.leaving}
    await eventually(
        lambda: {one.instance for one in world.messages if one.leaving} == {"here-0", "here-1"}, f"farewells, not only {leaving}"
    )


async def test_the_processes_end_with_the_first_one(world: World) -> None:
    async with world.gateway(GATEWAY_PROCESSES="2") as gateway:
        children = children_of(gateway.process.pid)
        assert len(children) == 2
        gateway.process.kill()
        await asyncio.to_thread(gateway.process.wait, 30)
        await eventually(lambda: not any(is_alive(pid) for pid in children), "the end of the others")


async def test_the_control_api_is_on_the_same_port_and_knows_the_keys(world: World) -> None:
    await world.key()
    async with world.gateway() as gateway:
        url = f"http://127.0.0.1:{gateway.port}/api/v1/runs"
        assert (await gateway.client.get(url, headers={"authorization": "Bearer hr_no"})).status_code == 401
        assert (await gateway.client.get(f"http://127.0.0.1:{gateway.port}/api/v1/openapi.json")).status_code == 200

        async def known() -> bool:
            # No tracker runs here: what counts is that the key was accepted.
            return (await gateway.client.get(url)).status_code == 503

        await eventually(known, "the key is known to the control API")
