"""Tiny ONNX models for tests of the evaluator: `x` (FP32) and `kind` (BYTES) in, `probability` out. Written node by node, no training."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from evaluator.domain.candidate import Blob, Model, Tensor
from onnx import TensorProto, helper, numpy_helper

SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32"}, {"name": "kind", "datatype": "BYTES"}],
    "outputs": [{"name": "probability", "datatype": "FP32"}],
}


def probability(slope: float, x: np.ndarray[Any, Any], kinds: list[str]) -> np.ndarray[Any, Any]:
    """What `linear` answers, in numpy."""
    shift = np.array([0.5 if kind == "late" else 0.0 for kind in kinds]).reshape(-1, 1)
    answer: np.ndarray[Any, Any] = 1 / (1 + np.exp(-(slope * x.reshape(-1, 1) + shift)))
    return answer


ENDLESS = 2**62


def linear(slope: float, *, breaks_above: float | None = None, spins: int = 0) -> bytes:
    """sigmoid(slope * x + 0.5 if kind is "late"). `breaks_above`: fails at run time for greater x. `spins`: loops so often for nothing."""
    node = helper.make_node
    nodes = [
        node("LabelEncoder", ["kind"], ["shift"], domain="ai.onnx.ml", keys_strings=["late"], values_floats=[0.5], default_float=0.0),
        node("Mul", ["x", "slope"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["logit"]),
        node("Sigmoid", ["logit"], ["plain"]),
    ]
    constants: dict[str, Any] = {"slope": np.float32(slope), "one": np.array(1.0, np.float32)}
    last = "plain"
    if breaks_above is not None:
        constants |= {
            "limit": np.float32(breaks_above),
            "table": np.ones(1, np.float32),
            "flat": np.array([-1]),
            "column": np.array([-1, 1]),
        }
        nodes += [
            node("Greater", ["x", "limit"], ["above"]),
            node("Cast", ["above"], ["index"], to=TensorProto.INT64),
            node("Reshape", ["index", "flat"], ["indices"]),
            node("GatherElements", ["table", "indices"], ["ones"]),
            node("Reshape", ["ones", "column"], ["factor"]),
            node("Mul", [last, "factor"], ["checked"]),
        ]
        last = "checked"
    if spins:
        constants["often"] = np.array(spins, np.int64)
        nodes += [node("Loop", ["often", "", "one"], ["spun"], body=_spin()), node("Mul", [last, "spun"], ["spun_out"])]
        last = "spun_out"
    nodes.append(node("Identity", [last], ["probability"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1]),
            helper.make_tensor_value_info("kind", TensorProto.STRING, ["n", 1]),
        ],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return serialized(graph)


def identity(datatype: int = TensorProto.FLOAT, width: int = 1) -> bytes:
    """One input `x` that is the output `probability`, of any type and width."""
    shape: list[str | int | None] = ["n", width]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["probability"])],
        "identity",
        [helper.make_tensor_value_info("x", datatype, shape)],
        [helper.make_tensor_value_info("probability", datatype, shape)],
    )
    return serialized(graph)


def external() -> bytes:
    """A model that wants its weights from a file beside it."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../../../etc/passwd")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["probability"])],
        "external",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [weight],
    )
    return serialized(graph)


def declared(data: bytes, samples: Blob | None = None, name: str = "model") -> Model:
    """The model as a run logs it, under its blob's key."""
    tensors = {part: tuple(Tensor(one["name"], one["datatype"], (-1, 1)) for one in SIGNATURE[part]) for part in ("inputs", "outputs")}
    return Model(name, "onnx", blob(data), tensors["inputs"], tensors["outputs"], samples)


def blob(data: bytes) -> Blob:
    sha256 = hashlib.sha256(data).hexdigest()
    return Blob(sha256, len(data), f"blobs/sha256/{sha256[:2]}/{sha256}")


def serialized(graph: Any) -> bytes:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 4)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    assert onnx.load_model_from_string(made).graph.output[0].name == "probability"
    return made


def _spin() -> Any:
    info = helper.make_tensor_value_info
    return helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Mul", ["carried", "carried"], ["next"])],
        "spin",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("carried", TensorProto.FLOAT, [])],
        [info("go_on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, [])],
    )
