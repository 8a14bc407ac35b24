"""What is read off an ONNX file, and one file made of several: compared with what the onnx package makes and reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from artifacts.onnxfile import check_one_file
from artifacts.onnxgraph import DATATYPES, GraphValue, read_graph
from artifacts.onnxpack import RAW_DATA, external_files, pack
from onnx import TensorProto, helper, numpy_helper
from servicekit.errors import Invalid


def model(*, weights: int = 4, batch: int | str | None = "n", kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(2 * weights, dtype=np.float32).reshape(2, weights), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", kind, [batch, 2]), helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, weights])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weights])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved(folder: Path, made: onnx.ModelProto, **how: Any) -> Path:
    path = folder / "model.onnx"
    onnx.save_model(made, str(path), **how)
    return path


def test_inputs_and_outputs_are_those_that_callers_give_and_get(tmp_path: Path) -> None:
    inputs, outputs = read_graph(saved(tmp_path, model()))
    assert inputs == (GraphValue("x", "FP32", (-1, 2)),)
    assert outputs == (GraphValue("y", "FP32", (-1, 4)),)


@pytest.mark.parametrize(("batch", "length"), [(None, -1), ("batch", -1), (1, 1), (0, -1)])
def test_lengths_are_numbers_or_any(tmp_path: Path, batch: Any, length: int) -> None:
    assert read_graph(saved(tmp_path, model(batch=batch)))[0][0].shape == (length, 2)


@pytest.mark.parametrize(("number", "name"), [(number, name) for name, number in TensorProto.DataType.items() if number])
def test_datatypes_are_those_of_onnx(tmp_path: Path, number: int, name: str) -> None:
    words = {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "STRING": "BYTES"}
    plain = name if name in {"BOOL", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))} else ""
    assert read_graph(saved(tmp_path, model(kind=number)))[0][0].datatype == words.get(name, plain)


def test_the_words_are_those_of_the_protocol() -> None:
    assert set(DATATYPES.values()) == {"BOOL", "BYTES", "FP16", "FP32", "FP64", *(f"{s}INT{b}" for s in ("", "U") for b in (8, 16, 32, 64))}
    assert RAW_DATA == TensorProto.RAW_DATA_FIELD_NUMBER


def test_what_is_no_tensor_has_no_datatype_and_what_has_no_shape_none(tmp_path: Path) -> None:
    made = model()
    del made.graph.output[:]
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    made.graph.output.append(helper.make_value_info("y", sequence))
    made.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert read_graph(saved(tmp_path, made))[1] == (GraphValue("y", "", None), GraphValue("z", "FP32", None))


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x3a\x05ab"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(Invalid, match="no ONNX model"):
        read_graph(path)
    with pytest.raises(Invalid, match="no ONNX model"):
        external_files(path)


def test_a_model_of_two_files_becomes_one_that_is_the_same(tmp_path: Path) -> None:
    made = model(weights=1000)
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [600])],
        [numpy_helper.from_array(np.ones(600, np.float32), "c")],
    )
    made.graph.node.append(helper.make_node("If", ["condition"], ["branched"], then_branch=body, else_branch=body))
    whole = made.SerializeToString(deterministic=True)
    path = saved(tmp_path, made, save_as_external_data=True, location="weights.bin", size_threshold=100)
    assert path.stat().st_size < 2_000
    with pytest.raises(Invalid, match="in another file"):
        check_one_file(path)
    assert external_files(path) == {"weights.bin"}
    target = tmp_path / "whole.onnx"
    pack(path, {"weights.bin": tmp_path / "weights.bin"}, target)
    check_one_file(target)
    assert external_files(target) == frozenset()
    assert onnx.load(str(target), load_external_data=False) == onnx.ModelProto.FromString(whole)


def test_a_model_that_is_whole_stays_as_it_is(tmp_path: Path) -> None:
    path, target = saved(tmp_path, model()), tmp_path / "whole.onnx"
    pack(path, {}, target)
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "weights.bin", "offset": "4000", "length": "5000"}, "lies outside the file"),
        ({"location": "weights.bin", "offset": "9000"}, "lies outside the file"),
        ({"location": "weights.bin", "offset": "-1"}, "no place in its file"),
        ({"location": "weights.bin", "length": "1e3"}, "no place in its file"),
        ({"offset": "0"}, "does not say in which"),
    ],
)
def test_a_tensor_that_is_not_in_its_file_is_refused(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    made = model()
    tensor = made.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    (tmp_path / "weights.bin").write_bytes(bytes(8000))
    with pytest.raises(Invalid, match=says):
        pack(path, {"weights.bin": tmp_path / "weights.bin"}, tmp_path / "whole.onnx")
