"""Signatures, sample rows and names: what is accepted, what counts as the same answer, and what Triton is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deployer.adapters.triton import configuration
from deployer.domain.errors import SignatureInvalid
from deployer.domain.signature import MOST_ROWS, Signature, Tensor, differences, read_samples, zeros
from deployer.domain.version import Blob, Journey, Version, arm_id, runtime_model

X = Tensor("x", "FP32", (-1, 2))
NAME = Tensor("name", "BYTES", (-1, 1))
Y = Tensor("y", "FP32", (-1, 1))
SIGNATURE = Signature((X, NAME), (Y,))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((), "no input"),
        ((X, X), "same name"),
        ((Tensor("", "FP32", (-1,)),), "no name"),
        ((Tensor("x", "FLOAT", (-1,)),), "unknown datatype 'FLOAT'"),
        ((Tensor("x", "FP32", ()),), "not one of a batch"),
        ((Tensor("x", "FP32", (-1, 0)),), "not one of a batch"),
        ((Tensor("x", "FP32", (-2,)),), "not one of a batch"),
    ],
)
def test_a_signature_that_no_runtime_can_be_told_is_refused(inputs: tuple[Tensor, ...], says: str) -> None:
    with pytest.raises(SignatureInvalid, match=says):
        Signature(inputs, (Y,)).check()
    with pytest.raises(SignatureInvalid):
        Signature((X,), inputs).check()


def document(**changes: Any) -> bytes:
    return json.dumps({"inputs": {"x": [[1, 2]], "name": [["a"]]}, "outputs": {"y": [[0.5]]}} | changes).encode()


def test_samples_are_read_up_to_a_number_of_rows() -> None:
    SIGNATURE.check()
    many = MOST_ROWS + 1
    text = document(inputs={"x": [[1, 2]] * many, "name": [["a"]] * many}, outputs={"y": [[0.5]] * many})
    samples = read_samples(text, SIGNATURE)
    assert len(samples.inputs["x"]) == len(samples.outputs["y"]) == MOST_ROWS


def test_samples_may_have_no_outputs() -> None:
    samples = read_samples(document(outputs={}), SIGNATURE)
    assert samples.outputs == {}
    assert differences(samples.outputs, {"y": [[1]]}) == []


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[]",
        b'{"inputs": {}}',
        document(inputs={"x": 3}),
        document(inputs={"x": [[1, 2]]}),
        document(outputs={"z": [[1]]}),
        document(outputs={"y": []}),
        document(outputs={"y": [[1], [2]]}),
    ],
)
def test_samples_that_do_not_fit_are_refused(text: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        read_samples(text, SIGNATURE)


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ([[1.0], [2.0]], [[1.005], [2.0]], True),
        ([[1.0]], [[1.1]], False),
        ([[1000.0]], [[1009.0]], True),
        ([[1000.0]], [[1011.0]], False),
        ([[None]], [[float("nan")]], True),
        ([[None]], [[0.0]], False),
        ([[1.0]], [[float("nan")]], False),
        ([["late"]], [["late"]], True),
        ([["late"]], [["on time"]], False),
        ([[True]], [[True]], True),
        ([[True]], [[1]], True),
        ([[1]], [[False]], False),
        ([[1.0]], [[None]], False),
        ([[1.0]], [], False),
        ([[{}]], [[1.0]], False),
    ],
)
def test_answers_are_compared_as_numbers_within_a_tolerance_and_else_exactly(wanted: list[Any], got: list[Any], same: bool) -> None:
    assert (differences({"y": wanted}, {"y": got}) == []) is same


def test_an_output_that_is_missing_differs() -> None:
    assert differences({"y": [[1.0]]}, {}) == ["y: 0 values where 1 were expected"]


def test_a_row_of_nothing_fits_the_signature() -> None:
    samples = zeros(Signature((X, NAME, Tensor("flag", "BOOL", (-1,)), Tensor("grid", "FP32", (-1, -1, 2))), (Y,)))
    assert samples.inputs == {"x": [[0, 0]], "name": [[""]], "flag": [False], "grid": [[[0, 0]]]}
    assert differences(samples.outputs, {"y": [[3.0]]}) == []


def test_triton_is_told_that_the_batch_may_have_any_length() -> None:
    told = json.loads(configuration("m-v1-0-g1", Signature((Tensor("x", "FP32", (8, 2)), NAME), (Y,)), "python"))
    assert told["backend"] == "python"
    assert told["max_batch_size"] == 0
    assert told["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 2]},
        {"name": "name", "data_type": "TYPE_STRING", "dims": [-1, 1]},
    ]


@pytest.mark.parametrize(
    ("model", "expected"),
    [("flight delays", "flight-delays-v3-abcdef01-g7"), ("../x/ü", "x-v3-abcdef01-g7"), ("--", "model-v3-abcdef01-g7")],
)
def test_names_in_a_runtime_are_plain(model: str, expected: str) -> None:
    version = Version("id", model, 3, Journey("j", "d", 1, "r"), "onnx", Blob("abcdef01" * 8, 1, "k"), SIGNATURE)
    assert runtime_model(version, 7) == expected
    assert arm_id(3, 7) == "v3-g7"
