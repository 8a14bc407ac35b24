"""Signatures, sample rows, artifact paths and data set schemas: what is right and what is told when it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracker.domain import artifact as artifacts
from tracker.domain.errors import Rejected
from tracker.domain.model import MAX_TENSORS, Signature, TensorSpec, check_samples, check_signature

SIGNATURE = Signature(
    inputs=(TensorSpec("carrier", "BYTES", (-1, 1)), TensorSpec("distance", "FP32", (-1, 2))),
    outputs=(TensorSpec("late", "FP32", (-1,)),),
)
GOOD: dict[str, Any] = {"inputs": {"carrier": [["AA"], ["DL"]], "distance": [[1.5, 2], [3, 4]]}, "outputs": {"late": [0.1, 0.9]}}


def rejected(document: Any) -> list[str]:
    with pytest.raises(Rejected) as caught:
        check_samples(document if isinstance(document, bytes) else json.dumps(document).encode(), SIGNATURE)
    return [problem.field for problem in caught.value.problems]


def test_samples_that_fit_are_counted() -> None:
    assert check_signature(SIGNATURE) == []
    assert check_samples(json.dumps(GOOD).encode(), SIGNATURE) == 2


@pytest.mark.parametrize(
    ("document", "fields"),
    [
        (b"\xff\xfe", ["samples"]),
        (b"{not json", ["samples"]),
        (b'{"inputs": {}, "outputs": {"late": [NaN]}}', ["samples"]),
        (b"[" * 100_000, ["samples"]),
        ([], ["samples"]),
        ({"inputs": {}}, ["samples"]),
        ({**GOOD, "inputs": []}, ["samples.inputs"]),
        ({**GOOD, "outputs": {}}, ["samples.outputs.late"]),
        ({**GOOD, "outputs": {"late": [0.1, 0.9], "more": [1, 2]}}, ["samples.outputs.more"]),
        ({**GOOD, "outputs": {"late": 0.1}}, ["samples.outputs.late"]),
        ({**GOOD, "outputs": {"late": [0.1]}}, ["samples"]),
        ({**GOOD, "outputs": {"late": [0.1, "0.9"]}}, ["samples.outputs.late[1]"]),
        ({**GOOD, "outputs": {"late": [0.1, [0.9]]}}, ["samples.outputs.late[1]"]),
        ({**GOOD, "inputs": {**GOOD["inputs"], "distance": [[1, 2], [3]]}}, ["samples.inputs.distance[1]"]),
        ({**GOOD, "inputs": {**GOOD["inputs"], "carrier": [["AA"], [1]]}}, ["samples.inputs.carrier[1]"]),
        ({"inputs": {"carrier": [], "distance": []}, "outputs": {"late": []}}, ["samples"]),
    ],
)
def test_what_does_not_fit_is_named(document: Any, fields: list[str]) -> None:
    assert rejected(document) == fields


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("BOOL", True, 1),
        ("INT8", -128, 128),
        ("UINT8", 255, -1),
        ("INT64", 2**63 - 1, 2**63),
        ("UINT64", 2**64 - 1, 2**64),
        ("INT32", 5, 5.0),
        ("FP16", 1, True),
        ("FP64", 1.5, "1.5"),
        ("FP16", 65504.0, 65536),
        ("FP32", -3.4028235e38, -3.5e38),
        ("FP64", 1.7976931348623157e308, 10**400),
        ("BYTES", "x", 1),
    ],
)
def test_values_are_of_their_datatype(datatype: str, good: Any, bad: Any) -> None:
    signature = Signature((TensorSpec("x", datatype, (-1,)),), (TensorSpec("y", "FP32", (-1,)),))
    assert check_samples(json.dumps({"inputs": {"x": [good]}, "outputs": {"y": [1]}}).encode(), signature) == 1
    with pytest.raises(Rejected, match=r"samples.inputs.x\[0\]"):
        check_samples(json.dumps({"inputs": {"x": [bad]}, "outputs": {"y": [1]}}).encode(), signature)


def test_what_is_wrong_with_a_signature_is_told_at_once() -> None:
    odd = TensorSpec("x", "FLOAT", (0,))
    problems = check_signature(Signature((odd, odd), ()))
    assert [problem.field for problem in problems] == [
        "signature.inputs[0].datatype",
        "signature.inputs[0].shape",
        "signature.inputs[1].name",
        "signature.inputs[1].datatype",
        "signature.inputs[1].shape",
        "signature.outputs",
    ]


@pytest.mark.parametrize("name", ["", "x" * 251, "nul\x00"])
def test_a_tensor_needs_a_name(name: str) -> None:
    output = (TensorSpec("y", "FP32", (-1,)),)
    problems = check_signature(Signature((TensorSpec(name, "FP32", (-1,)),), output))
    assert [problem.field for problem in problems] == ["signature.inputs[0].name"]


def test_too_many_tensors_are_told_once() -> None:
    many = tuple(TensorSpec("same", "none", ()) for _ in range(MAX_TENSORS + 1))
    problems = check_signature(Signature((TensorSpec("x", "FP32", (-1,)),), many))
    assert [(problem.field, problem.message) for problem in problems] == [("signature.outputs", f"at most {MAX_TENSORS} tensors")]


def test_a_value_has_the_length_that_its_shape_says() -> None:
    pairs = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1,)),))
    assert check_samples(json.dumps({"inputs": {"x": [[1, 2]]}, "outputs": {"y": [1]}}).encode(), pairs) == 1
    with pytest.raises(Rejected) as caught:
        check_samples(json.dumps({"inputs": {"x": [[1, 2, 3]]}, "outputs": {"y": [1]}}).encode(), pairs)
    assert [problem.message for problem in caught.value.problems] == ["3 values where the shape says 2"]


@settings(deadline=None)  # a machine may be busy
@given(st.integers(min_value=1, max_value=20), st.data())
def test_samples_made_from_a_signature_fit_it(rows: int, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(min_value=1, max_value=3), max_size=2).map(lambda tail: (-1, *tail))
    values = {
        "FP32": st.floats(allow_nan=False, allow_infinity=False, width=32),
        "BYTES": st.text(),
        "INT16": st.integers(-(2**15), 2**15 - 1),
    }
    specs = [TensorSpec(name, data.draw(st.sampled_from(sorted(values))), data.draw(shapes)) for name in ("a", "b", "c")]

    def fill(shape: tuple[int, ...], datatype: str) -> Any:
        if not shape:
            return data.draw(values[datatype])
        return [fill(shape[1:], datatype) for _ in range(shape[0])]

    made = {spec.name: fill((rows, *spec.shape[1:]), spec.datatype) for spec in specs}
    signature = Signature(tuple(specs[:2]), tuple(specs[2:]))
    document = {"inputs": {"a": made["a"], "b": made["b"]}, "outputs": {"c": made["c"]}}
    assert check_samples(json.dumps(document).encode(), signature) == rows


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\nb", "nul\x00", "x" * 501])
def test_a_path_stays_in_its_run(path: str) -> None:
    assert artifacts.check_path(path)
    with pytest.raises(Rejected):
        artifacts.target("u", "a" * 32, path, "", 1, "0" * 64)


def test_each_upload_has_a_place_of_its_own() -> None:
    run = "a" * 32
    first, second = (artifacts.target(upload, run, "model/model.onnx", "", 5, "0" * 64).key for upload in ("u1", "u2"))
    assert first != second
    assert first.startswith(f"runs/{run}/artifacts/")
    assert first.endswith("/model/model.onnx")
    assert artifacts.target("u3", "", "", "flights", 5, "0" * 64).key.startswith("datasets/flights/")


@pytest.mark.parametrize(
    ("run", "path", "dataset", "size", "sha256"),
    [
        ("", "", "", 1, "0" * 64),
        ("a" * 32, "x", "flights", 1, "0" * 64),
        ("", "x", "flights", 1, "0" * 64),
        ("", "", "Flights!", 1, "0" * 64),
        ("", "", "flights", -1, "0" * 64),
        ("", "", "flights", 1, "0" * 63),
        ("", "", "flights", 1, "A" * 64),
    ],
)
def test_an_upload_goes_to_one_place_and_says_what_comes(run: str, path: str, dataset: str, size: int, sha256: str) -> None:
    with pytest.raises(Rejected):
        artifacts.target("u", run, path, dataset, size, sha256)


def test_a_schema_is_a_list_of_named_columns() -> None:
    assert artifacts.check_schema("") == ""
    assert artifacts.check_schema('[ {"type": "int64", "name": "a"} ]') == '[{"type":"int64","name":"a"}]'


@pytest.mark.parametrize(
    "schema",
    ["{", "{}", '["a"]', '[{"name": "a"}]', '[{"name": "", "type": "x"}]', '[{"name": "a", "type": 1}]'],
)
def test_a_schema_that_is_none_is_rejected(schema: str) -> None:
    with pytest.raises(Rejected):
        artifacts.check_schema(schema)
    with pytest.raises(Rejected, match="there twice"):
        artifacts.check_schema('[{"name": "a", "type": "x"}, {"name": "a", "type": "x"}]')
