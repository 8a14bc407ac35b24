"""One suite for every runtime: what the deployer relies on, against memory and against the real Triton."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from deployer.adapters.memory_runtime import MemoryRuntime
from deployer.adapters.triton import TritonRuntime
from deployer.domain.signature import Rows, Signature, Tensor
from deployer.ports import LoadTooSlow, Refused, Runtime
from onnx import TensorProto, helper
from servicekit.clock import SystemClock
from servicekit.errors import Unavailable

if TYPE_CHECKING:
    from localstack.triton import Triton

SIGNATURE = Signature(
    (Tensor("origin", "BYTES", (-1, 1)), Tensor("distance", "FP32", (-1, 1)), Tensor("month", "INT64", (-1, 1))),
    (Tensor("score", "FP32", (-1, 1)), Tensor("label", "BYTES", (-1, 1))),
)
ROWS: Rows = {"origin": [["JFK"], ["LGA"], ["JFK"]], "distance": [[1.0], [2.0], [0.5]], "month": [[1], [2], [3]]}


def model(factor: float, opset: int = 20) -> bytes:
    """score = factor * distance + month; label = origin. Small enough to read, with every kind of tensor that flights have."""
    nodes = [
        helper.make_node("Mul", ["distance", "factor"], ["scaled"]),
        helper.make_node("Cast", ["month"], ["month_f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["scaled", "month_f"], ["score"]),
        helper.make_node("Identity", ["origin"], ["label"]),
    ]
    types = {"BYTES": TensorProto.STRING, "FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(t.name, types[t.datatype], ["batch", 1]) for t in SIGNATURE.inputs],
        [helper.make_tensor_value_info(t.name, types[t.datatype], ["batch", 1]) for t in SIGNATURE.outputs],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return bytes(made.SerializeToString())


def broken_model() -> bytes:
    """A model that no runtime takes: it uses an operator that does not exist."""
    made = onnx.load_from_string(model(1.0))
    made.graph.node[0].op_type = "Frobnicate"
    return bytes(made.SerializeToString())


def answer(content: bytes, inputs: Rows) -> Rows:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    kinds: dict[str, Any] = {"BYTES": object, "FP32": np.float32, "INT64": np.int64}
    try:
        feed = {tensor.name: np.array(inputs[tensor.name], dtype=kinds[tensor.datatype]) for tensor in SIGNATURE.inputs}
        values = session.run([tensor.name for tensor in SIGNATURE.outputs], feed)
    except Exception as error:
        raise ValueError(str(error)) from error
    return {tensor.name: value.tolist() for tensor, value in zip(SIGNATURE.outputs, values, strict=True)}


def refusal(content: bytes) -> str | None:
    try:
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    return None


@pytest.fixture(params=["memory", "triton"])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[Runtime]:
    made: Runtime
    if request.param == "memory":
        made = MemoryRuntime(answer, refuses=refusal)
    else:
        server = request.getfixturevalue("triton")
        made = TritonRuntime(server.grpc, server.http, server.secret, SystemClock())
    yield made
    for name in await made.models():
        if name.startswith("contract-"):
            await made.unload(name)
    await made.close()


@pytest.fixture
def name() -> str:
    return f"contract-v1-{secrets.token_hex(4)}-g1"


async def test_a_loaded_model_is_listed_and_answers(runtime: Runtime, name: str) -> None:
    assert name not in await runtime.models()
    await runtime.load(name, model(2.0), SIGNATURE)
    assert name in await runtime.models()
    answered = await runtime.infer(name, ROWS, SIGNATURE)
    assert answered["label"] == ROWS["origin"]
    assert answered["score"] == [[3.0], [6.0], [4.0]]


async def test_a_load_may_be_repeated(runtime: Runtime, name: str) -> None:
    await runtime.load(name, model(2.0), SIGNATURE)
    await runtime.load(name, model(2.0), SIGNATURE)
    assert (await runtime.infer(name, ROWS, SIGNATURE))["score"][0] == [3.0]


async def test_a_load_that_takes_too_long_may_be_repeated_by_the_same_name(runtime: Runtime, name: str, triton: Triton) -> None:
    hasty: Runtime
    if isinstance(runtime, MemoryRuntime):
        hasty = runtime
        runtime.slow = 1
    else:
        hasty = TritonRuntime(triton.grpc, triton.http, triton.secret, SystemClock(), load_timeout_s=0.02)
    with pytest.raises(LoadTooSlow, match=f"has not loaded {name}"):
        await hasty.load(name, model(2.0), SIGNATURE)
    await runtime.load(name, model(2.0), SIGNATURE)
    assert (await runtime.infer(name, ROWS, SIGNATURE))["score"][0] == [3.0]
    if hasty is not runtime:
        await hasty.close()


async def test_models_are_apart(runtime: Runtime, name: str) -> None:
    await runtime.load(name, model(1.0), SIGNATURE)
    await runtime.load(f"{name}-b", model(3.0), SIGNATURE)
    assert (await runtime.infer(name, ROWS, SIGNATURE))["score"][0] == [2.0]
    assert (await runtime.infer(f"{name}-b", ROWS, SIGNATURE))["score"][0] == [4.0]
    await runtime.unload(name)
    assert (await runtime.infer(f"{name}-b", ROWS, SIGNATURE))["score"][0] == [4.0]


async def test_an_unloaded_model_is_gone_and_may_be_unloaded_again(runtime: Runtime, name: str) -> None:
    await runtime.load(name, model(1.0), SIGNATURE)
    await runtime.unload(name)
    await runtime.unload(name)
    assert name not in await runtime.models()
    with pytest.raises(Refused):
        await runtime.infer(name, ROWS, SIGNATURE)


@pytest.mark.parametrize("content", [b"this is no model", broken_model()], ids=["not onnx", "unknown operator"])
async def test_a_model_that_cannot_be_loaded_is_refused_with_the_runtimes_words(runtime: Runtime, name: str, content: bytes) -> None:
    with pytest.raises(Refused) as refused:
        await runtime.load(name, content, SIGNATURE)
    assert "Frobnicate" in refused.value.message or "rotobuf" in refused.value.message
    assert "Traceback" not in refused.value.message
    with pytest.raises(Refused):
        await runtime.infer(name, ROWS, SIGNATURE)
    # The refusal harms nobody: the name can be unloaded, and other models load.
    await runtime.unload(name)
    await runtime.load(f"{name}-b", model(1.0), SIGNATURE)
    assert (await runtime.infer(f"{name}-b", ROWS, SIGNATURE))["score"][0] == [2.0]


async def test_a_model_that_fails_on_its_rows_says_so(runtime: Runtime, name: str) -> None:
    await runtime.load(name, model(1.0), SIGNATURE)
    with pytest.raises(Refused):
        await runtime.infer(name, {**ROWS, "distance": [[1.0, 2.0]] * 3}, SIGNATURE)
    assert (await runtime.infer(name, ROWS, SIGNATURE))["score"][0] == [2.0]


async def test_a_runtime_that_is_away_is_unavailable() -> None:
    gone = TritonRuntime("127.0.0.1:9", "127.0.0.1:9", "x", SystemClock(), call_timeout_s=2.0)
    try:
        with pytest.raises(Unavailable):
            await gone.models()
        with pytest.raises(Unavailable):
            await gone.load("contract-v1-0-g1", model(1.0), SIGNATURE)
    finally:
        await gone.close()
    memory = MemoryRuntime(answer, away=True)
    with pytest.raises(Unavailable):
        await memory.models()


async def test_triton_that_was_killed_is_empty_and_takes_models_again(own_triton: Any, name: str) -> None:
    server: Triton = own_triton()
    runtime = TritonRuntime(server.grpc, server.http, server.secret, SystemClock())
    from localstack import server as servers

    try:
        await runtime.load(name, model(2.0), SIGNATURE)
        servers.crash(server)
        with pytest.raises(Unavailable):
            await runtime.models()
        servers.restart(server)
        assert await _models_when_back(runtime) == frozenset()
        await runtime.load(name, model(2.0), SIGNATURE)
        assert (await runtime.infer(name, ROWS, SIGNATURE))["score"][0] == [3.0]
    finally:
        await runtime.close()


async def _models_when_back(runtime: Runtime) -> frozenset[str]:
    """The connection comes back some time after the server."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await runtime.models()
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_the_wrong_secret_opens_nothing(triton: Any, name: str) -> None:
    runtime = TritonRuntime(triton.grpc, triton.http, "not the secret", SystemClock())
    try:
        with pytest.raises(Refused, match="restricted"):
            await runtime.load(name, model(1.0), SIGNATURE)
        assert name not in await runtime.models()
    finally:
        await runtime.close()
