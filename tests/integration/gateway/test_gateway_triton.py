"""The data path before a real Triton: answers under the endpoint's name, bad input in V2's form, rollouts, copies, Triton going away."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import onnx
import pytest
from deployer.adapters.triton import TritonRuntime
from deployer.domain.signature import Signature, Tensor
from gateway.access import KeySpec
from gateway.listener import DataServer
from gateway.plane import DataPlane
from gateway.routes import WHOLE, ArmSpec, GuardKind, GuardSpec, Role, RouteSpec, ShadowSpec
from localstack import server as servers
from onnx import TensorProto, helper
from servicekit.clock import SystemClock

KEY = "hr_0123456789abcdef_" + "k" * 32
SIGNATURE = Signature(
    (Tensor("origin", "BYTES", (-1, 1)), Tensor("distance", "FP32", (-1, 1))),
    (Tensor("score", "FP32", (-1, 1)), Tensor("label", "BYTES", (-1, 1))),
)


def model(factor: float) -> bytes:
    """score = factor * distance; label = origin."""
    made = helper.make_graph(
        [helper.make_node("Mul", ["distance", "factor"], ["score"]), helper.make_node("Identity", ["origin"], ["label"])],
        "g",
        [
            helper.make_tensor_value_info("origin", TensorProto.STRING, ["batch", 1]),
            helper.make_tensor_value_info("distance", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("label", TensorProto.STRING, ["batch", 1]),
        ],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(whole)
    return bytes(whole.SerializeToString())


def body(distance: Any = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "origin", "datatype": "BYTES", "shape": [1, 1], "data": ["JFK"]},
            {"name": "distance", "datatype": "FP32", "shape": [1, 1], "data": [distance], **more},
        ]
    }


def score(answer: httpx.Response) -> float:
    """The order of the outputs is Triton's own, and differs from request to request."""
    return float(next(output["data"][0] for output in answer.json()["outputs"] if output["name"] == "score"))


class Setup:
    """One endpoint on a real Triton, with v1 (factor 1) and v2 (factor 2) loaded."""

    def __init__(self, address: str, client: httpx.AsyncClient, plane: DataPlane, names: tuple[str, str]) -> None:
        self.address = address
        self.client = client
        self.plane = plane
        self.names = names
        self.revision = 0

    def route(self, canary: int = 0, shadow: ShadowSpec | None = None, arms: dict[str, str] | None = None) -> RouteSpec:
        one, two = self.names
        role = Role.SHADOW if shadow else Role.CANARY
        specs = [ArmSpec("v1", Role.BASELINE, "triton", self.address, one, "m", 1, WHOLE - canary, WHOLE)]
        if canary or shadow:
            specs.append(ArmSpec("v2", role, "triton", self.address, two, "m", 2, canary, 0))
        specs = [replace(spec, runtime_model=(arms or {}).get(spec.name, spec.runtime_model)) for spec in specs]
        self.revision += 1
        guards = (GuardSpec("error", GuardKind.ERROR), GuardSpec("latency_ms>2000", GuardKind.LATENCY, 2.0))
        spec = RouteSpec("flights", self.revision, self.revision, arms=tuple(specs), shadow=shadow, guards=guards, in_rollout=True)
        assert self.plane.routes.apply(spec, time.monotonic())
        return spec

    async def infer(self, content: Any = None) -> httpx.Response:
        raw = content if isinstance(content, bytes) else json.dumps(body() if content is None else content).encode()
        return await self.client.post("/v2/models/flights/infer", content=raw)

    def totals(self) -> dict[str, dict[str, int]]:
        sums: dict[str, dict[str, int]] = {}
        for report in self.plane.windows.finish(time.monotonic()):
            for endpoint in report.endpoints:
                for arm in endpoint.arms:
                    total = sums.setdefault(arm.arm, {})
                    for name in ("requests", "errors", "fallbacks", "shadow_compared", "shadow_different", "shadow_errors"):
                        total[name] = total.get(name, 0) + getattr(arm, name)
        return sums


async def no_control(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def on_triton(triton: Any, call: Callable[[TritonRuntime], Awaitable[None]]) -> None:
    runtime = TritonRuntime(triton.grpc, triton.http, triton.secret, SystemClock())
    try:
        await call(runtime)
    finally:
        await runtime.close()


@pytest.fixture(scope="module")
def names(triton: Any) -> Iterator[tuple[str, str]]:
    """Two loaded models, of factor 1 and 2."""
    mark = secrets.token_hex(4)
    loaded = (f"gate-v1-{mark}-g1", f"gate-v2-{mark}-g1")

    async def load(runtime: TritonRuntime) -> None:
        for name, factor in zip(loaded, (1.0, 2.0), strict=True):
            await runtime.load(name, model(factor), SIGNATURE)

    async def unload(runtime: TritonRuntime) -> None:
        for name in loaded:
            await runtime.unload(name)

    asyncio.run(on_triton(triton, load))
    yield loaded
    asyncio.run(on_triton(triton, unload))


@asynccontextmanager
async def before(address: str, names: tuple[str, str]) -> AsyncIterator[Setup]:
    plane = DataPlane([address])
    plane.access.apply(KeySpec("k", 1, hashlib.sha256(KEY.encode()).hexdigest(), "tester", frozenset({"admin"}), frozenset({"*"})))
    server = DataServer(plane, no_control, "127.0.0.1", 0, grace_s=5)
    await server.start()
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=20, trust_env=False) as client:
        yield Setup(address, client, plane, names)
    await server.stop()


@pytest.fixture
async def setup(triton: Any, names: tuple[str, str]) -> AsyncIterator[Setup]:
    async with before(triton.http, names) as one:
        yield one


async def test_triton_answers_under_the_endpoints_name(setup: Setup) -> None:
    setup.route()
    answer = await setup.infer({**body(3.0), "id": 'my "id", "model_name":"x"'})
    assert answer.status_code == 200
    told = answer.json()
    assert (told["model_name"], told["id"]) == ("flights", 'my "id", "model_name":"x"')
    assert {output["name"]: output["data"] for output in told["outputs"]} == {"score": [3.0], "label": ["JFK"]}
    assert (answer.headers["x-headrace-model-version"], answer.headers["x-headrace-arm"]) == ("1", "v1")
    metadata = (await setup.client.get("/v2/models/flights")).json()
    assert (metadata["name"], [one["name"] for one in metadata["inputs"]]) == ("flights", ["origin", "distance"])
    assert (await setup.client.get("/v2/models/flights/ready")).status_code == 200


async def test_one_connection_to_triton_serves_many_requests(setup: Setup) -> None:
    setup.route()
    for number in range(50):
        assert score(await setup.infer(body(float(number)))) == float(number)
    (pool, _) = setup.plane.arms.pools()
    assert pool.opened_total == 1


BAD = {
    "not json": b"{not json",
    "not an object": b"[]",
    "no inputs": {},
    "empty": b"",
    "null in a number": body(None),
    "a text in a number": body("far"),
    "fewer elements than the shape": body(shape=[2, 1]),
    "another shape": {"inputs": [*body()["inputs"][:1], {"name": "distance", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]},
    "another type": body(1, datatype="INT64"),
    "an unknown type": body(datatype="DECIMAL"),
    "an input too few": {"inputs": body()["inputs"][:1]},
    "an input too many": {"inputs": [*body()["inputs"], {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]},
    "a number in a text": {"inputs": [{**body()["inputs"][0], "data": [5]}, body()["inputs"][1]]},
    "an unknown output": {**body(), "outputs": [{"name": "nothing"}]},
    "outputs that are none": {**body(), "outputs": 5},
    "an id that is no text": {**body(), "id": {}},
    "a fraction in an integer": body(1.5, datatype="INT32"),
    "parameters that are none": {**body(), "parameters": []},
    "a parameter of another type": {**body(), "parameters": {"priority": -1}},
    "a parameter of an output of another type": {**body(), "outputs": [{"name": "score", "parameters": {"classification": "a"}}]},
    "shared memory": {**body(), "outputs": [{"name": "score", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}]},
    "a number too large": json.dumps(body()).replace("2.0", "1e999").encode(),
    "half a surrogate pair": {**body(), "id": "\ud800"},
    "deeper than a parser's stack": b"[" * 1_000_000,
    "a tensor deeper than a parser's stack": json.dumps(body()).replace("2.0", "[" * 200_000 + "2.0" + "]" * 200_000).encode(),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_a_400_in_the_protocols_form_and_nobodys_fault(setup: Setup, case: str) -> None:
    setup.route(canary=WHOLE - 1)
    answer = await setup.infer(BAD[case])
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}
    assert "x-headrace-fallback" not in answer.headers
    assert not any(name in answer.text for name in setup.names)
    assert (await setup.infer()).status_code == 200
    totals = setup.totals()
    assert (totals["v2"]["requests"], totals["v2"]["errors"], totals["v1"]["requests"]) == (1, 0, 0)


async def test_a_canary_that_triton_does_not_have_is_answered_by_the_baseline(setup: Setup) -> None:
    setup.route(canary=WHOLE - 1, arms={"v2": "gate-v9-gone-g1"})
    for _ in range(5):
        answer = await setup.infer()
        assert (answer.status_code, answer.headers["x-headrace-fallback"], answer.headers["x-headrace-arm"]) == (200, "v2", "v1")
    totals = setup.totals()
    assert (totals["v2"]["requests"], totals["v2"]["errors"], totals["v2"]["fallbacks"]) == (5, 5, 5)


async def test_a_model_that_is_gone_everywhere_is_unavailable(setup: Setup) -> None:
    setup.route(arms={"v1": "gate-v9-gone-g1"})
    answer = await setup.infer()
    assert (answer.status_code, answer.json()) == (503, {"error": "the model is not loaded"})


async def test_the_canary_gets_its_share_and_the_operator_his_choice(setup: Setup) -> None:
    setup.route(canary=5_000)
    answers = [await setup.infer(body(2.0)) for _ in range(60)]
    assert {(answer.headers["x-headrace-model-version"], score(answer)) for answer in answers} == {("1", 2.0), ("2", 4.0)}
    chosen = await setup.client.post("/v2/models/flights/infer", json=body(), headers={"x-headrace-arm": "canary"})
    assert chosen.headers["x-headrace-arm"] == "v2"


@pytest.mark.parametrize(("tolerance", "different"), [(0.5, 5), (50.0, 0)])
async def test_copies_are_compared(setup: Setup, tolerance: float, different: int) -> None:
    setup.route(shadow=ShadowSpec("v2", WHOLE, tolerance, 5.0))
    for number in range(1, 6):
        answer = await setup.infer(body(float(number)))
        assert answer.headers["x-headrace-arm"] == "v1"
    endpoint = setup.plane.routes.endpoints["flights"]
    assert endpoint.route is not None
    route = endpoint.route
    seen = {"shadow_compared": 0, "shadow_different": 0, "shadow_errors": 0}
    async with asyncio.timeout(20):
        while seen["shadow_compared"] < 5:
            for report in setup.plane.windows.tick(time.monotonic()):
                for arm in (arm for one in report.endpoints for arm in one.arms if arm.arm == "v2"):
                    for name in seen:
                        seen[name] += getattr(arm, name)
            await asyncio.sleep(0.01)
    assert route.shadow_arm is not None
    assert seen == {"shadow_compared": 5, "shadow_different": different, "shadow_errors": 0}


async def test_binary_answers_pass(setup: Setup) -> None:
    setup.route()
    answer = await setup.infer({**body(2.0), "outputs": [{"name": "score", "parameters": {"binary_data": True}}]})
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.content[:length])["model_name"] == "flights"
    assert answer.content[length:] == b"\x00\x00\x00@"


async def test_a_triton_that_was_killed_is_a_bad_gateway_until_it_is_back(own_triton: Any) -> None:
    triton = own_triton()
    name = "gate-v1-dies-g1"
    await on_triton(triton, lambda runtime: runtime.load(name, model(1.0), SIGNATURE))
    async with before(triton.http, (name, "")) as setup:
        setup.route()
        assert (await setup.infer()).status_code == 200
        await asyncio.to_thread(servers.crash, triton)
        assert {(await setup.infer()).status_code for _ in range(15)} <= {502, 503}
        await asyncio.to_thread(servers.restart, triton)
        await on_triton(triton, lambda runtime: runtime.load(name, model(1.0), SIGNATURE))
        end = time.monotonic() + 20
        while (answer := await setup.infer()).status_code != 200:
            assert time.monotonic() < end, answer.text
            await asyncio.sleep(0.05)
