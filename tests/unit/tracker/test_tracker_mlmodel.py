"""What is read of the files that MLflow's client writes beside a model, and what refuses them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tracker.domain.errors import Rejected
from tracker.domain.mlmodel import MlModel, read_mlmodel, sample_inputs
from tracker.domain.model import Signature, TensorSpec

ONE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 1)),))
TWO = Signature((TensorSpec("a", "FP32", (-1, 1)), TensorSpec("b", "INT64", (-1,))), (TensorSpec("y", "FP32", (-1, 1)),))


def test_the_file_and_the_example_are_named() -> None:
    text = b"flavors: {onnx: {data: model.onnx}}\nsaved_input_example_info: {serving_input_path: serving.json}\n"
    assert read_mlmodel(text) == MlModel("model.onnx", "serving.json", ("onnx",))
    assert read_mlmodel(b"flavors: {onnx: {data: model.onnx}}") == MlModel("model.onnx", "", ("onnx",))
    assert read_mlmodel(b"flavors: {sklearn: {}, python_function: {}}") == MlModel("", "", ("sklearn",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"flavors: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: &x [1]\nb: *x\n", "aliases"),
        (b"a: " + b"[" * 60 + b"]" * 60, "nested deeper"),
        (b"[]", "names no flavors"),
        (b"flavors: {}", "names no flavors"),
        (b"flavors: {onnx: {data: ../model.onnx}}", "its ONNX file has no path that is right"),
        (b"flavors: {onnx: {data: 5}}", "its ONNX file has no path that is right"),
        (b"flavors: {onnx: {data: m}}\nsaved_input_example_info: {serving_input_path: /etc/passwd}", "its input example has no path"),
    ],
)
def test_what_is_no_model_to_deliver_says_why(text: bytes, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        read_mlmodel(text)


@pytest.mark.parametrize(
    ("example", "signature", "inputs"),
    [
        ({"inputs": [[1, 2], [3, 4]]}, ONE, {"x": [[1, 2], [3, 4]]}),
        ({"instances": {"x": [[1, 2]]}}, ONE, {"x": [[1, 2]]}),
        ({"dataframe_split": {"columns": ["p", "q"], "data": [[1, 2]]}}, ONE, {"x": [[1, 2]]}),
        ({"dataframe_split": {"columns": ["b", "a"], "data": [[7, 0.5]]}}, TWO, {"a": [[0.5]], "b": [7]}),
    ],
)
def test_an_example_becomes_rows_by_the_inputs_names(example: Any, signature: Signature, inputs: Any) -> None:
    assert json.loads(sample_inputs(json.dumps(example).encode(), signature)) == {"inputs": inputs, "outputs": {}}


@pytest.mark.parametrize(
    ("example", "signature", "says"),
    [
        ("{", ONE, "it is not JSON"),
        ('{"inputs": [[NaN, 1]]}', ONE, "it is not JSON"),
        ("[" * 100_000, ONE, "it is not JSON"),
        ("[]", ONE, "it is no object"),
        ("{}", ONE, "neither inputs nor dataframe_split"),
        ('{"inputs": [[1]]}', TWO, "does not name the model's inputs, which are a, b"),
        ('{"dataframe_split": {"columns": ["a", "b"], "data": [1]}}', TWO, "its rows are no lists"),
        ('{"dataframe_split": {"columns": ["a", "b"], "data": [[1]]}}', TWO, "its rows have different lengths"),
        ('{"inputs": {"x": 5}}', ONE, "samples"),
    ],
)
def test_an_example_that_does_not_fit_says_why(example: str, signature: Signature, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        sample_inputs(example.encode(), signature)
