"""Reading V2 JSON: where the model's name stands, whose fault an error is, and when two answers differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway import kv2
from gateway.compare import Incomparable, differs, first_row_value
from gateway.kv2 import Op, fault, flatten, is_unknown_model, name_span, too_deep
from hypothesis import given
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12) | st.just("model_name"), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=10), JSON, max_size=4), st.text(), st.integers(0, 4), st.booleans(), st.booleans())
def test_the_name_is_found_where_a_json_reader_finds_it(others: dict[str, Any], name: str, place: int, ascii: bool, spaced: bool) -> None:
    others.pop("model_name", None)
    items = list(others.items())
    items.insert(min(place, len(items)), ("model_name", name))
    body = json.dumps(dict(items), ensure_ascii=ascii, separators=None if spaced else (",", ":")).encode("utf-8", "surrogatepass")
    span = name_span(body)
    assert span is not None
    changed = body[: span[0]] + b"new" + body[span[1] :]
    assert json.loads(changed.decode("utf-8", "surrogatepass")) == {**dict(items), "model_name": "new"}


@given(JSON)
def test_no_name_is_found_where_there_is_none(value: Any) -> None:
    if isinstance(value, dict):
        value.pop("model_name", None)
    assert name_span(json.dumps(value).encode()) is None


def test_the_callers_own_text_is_not_taken_for_the_name() -> None:
    body = json.dumps({"id": '","model_name":"x', "outputs": [{"model_name": "y"}], "model_name": "real"}).encode()
    span = name_span(body)
    assert span is not None
    assert body[slice(*span)] == b"real"


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(JSON, st.integers(1, 6), st.booleans())
def test_depth_is_counted_as_a_json_reader_counts_it(value: Any, most: int, ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv2, "HARMLESS", 0)
        patch.setattr(kv2, "MAX_DEPTH", most)
        assert too_deep(body) == (depth(value) > most)


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b"[" * 3000, True),
        (b'{"a":[1,' * 3000, True),
        (b"[" * 65 + b"[]," * 3000, True),
        (b"[" * 63 + b"[]," * 3000, False),
        (b'["' + b"[" * 3000 + b'"]', False),
        (rb'["\"' + b"[" * 3000 + b'"]', False),
        (rb'["\\",' + b"[" * 3000, True),
        (b"[" * 2000, False),  # so few hurt nobody
    ],
)
def test_what_would_overflow_a_parsers_stack_is_found(body: bytes, deep: bool) -> None:
    assert too_deep(body) is deep


@given(st.binary())
def test_any_bytes_can_be_looked_at(body: bytes) -> None:
    too_deep(body * 2000)
    name_span(body)
    fault(body)
    is_unknown_model(body)
    first_row_value(body, "x")


@pytest.mark.parametrize("model", ["flights", "a.b-c_1"])
def test_the_public_paths_of_an_endpoint(model: str) -> None:
    assert kv2.model_paths(model) == {
        f"/v2/models/{model}".encode(): Op.MODEL,
        f"/v2/models/{model}/ready".encode(): Op.MODEL_READY,
        f"/v2/models/{model}/infer".encode(): Op.INFER,
    }


def test_an_unknown_model_is_told_by_the_beginning_of_the_error() -> None:
    assert is_unknown_model(b'{"error":"Request for unknown model: \'m\' is not found"}')
    assert not is_unknown_model(b'{"error":"unexpected input Request for unknown model: x"}')


@given(st.lists(st.lists(st.lists(st.integers(), max_size=3), max_size=3), max_size=3))
def test_nested_tensors_are_read_row_by_row(rows: list[list[list[int]]]) -> None:
    assert flatten(rows) == [element for row in rows for part in row for element in part]


def tensor(data: list[Any], datatype: Any = "FP32", **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": [len(data)], "data": data, **more}


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor([1, 2.5])], [tensor(["a"], "BYTES")], [tensor([True], "BOOL")], [tensor([[1], [2]])],
        [{"name": "x", "datatype": "FP32", "shape": [4], "parameters": {"binary_data_size": 16}}], [tensor([], "INT64")],
        [tensor([float("nan"), float("inf")])], [tensor(["\U0001f600"], "BYTES")],
    ],
)  # fmt: skip
def test_a_well_formed_request_has_no_fault(inputs: list[Any]) -> None:
    assert fault(json.dumps({"inputs": inputs}).encode()) is None


@pytest.mark.parametrize(
    "inputs",
    [
        [], "x", [1], [{}], [tensor([None])], [tensor(["a"])], [tensor([1], "BYTES")], [tensor([1], "FLOAT32")], [tensor([1], shape=[2])],
        [tensor([1.5], "INT64")], [tensor([300], "UINT8")], [tensor([-1], "UINT64")], [tensor([1], parameters=[])],
        [tensor([1], shape=[-1])], [tensor([1], shape="1")], [tensor([1], datatype=None)], [{**tensor([1]), "data": 1}], [tensor([True])],
        [tensor([10**400])], [tensor(["\ud800"], "BYTES")], [tensor([1], parameters={"shared_memory_region": "r"})],
    ],
)  # fmt: skip
def test_a_malformed_request_has_one(inputs: Any) -> None:
    assert fault(json.dumps({"inputs": inputs}).encode())


@pytest.mark.parametrize("shape", [[2] * 100_000, [10**300] * 64, [0] * 64, [-1], [10**300]])
def test_a_shape_of_any_size_is_a_fault_and_takes_no_time(shape: list[int]) -> None:
    told = fault(json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": [1.0]}]}).encode())
    assert told is not None
    assert len(told) < 200


def test_a_number_beyond_every_float_is_a_fault_and_infinity_is_none() -> None:
    body = json.dumps({"inputs": [tensor([0])]})
    assert fault(body.replace("[0]", "[1e999]").encode())
    assert fault(body.replace("[0]", "[-Infinity]").encode()) is None


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"priority": 1, "timeout": 0, "sequence_id": "s", "sequence_start": True, "binary_data_output": False, "mine": None}, False),
        ({"sequence_id": 7}, False),
        *(({name: value}, True) for name in ("priority", "timeout", "classification") for value in (-1, 1.5, "1", None, True, 1 << 64)),
        *(({name: value}, True) for name in ("sequence_start", "binary_data", "binary_data_output") for value in (1, "true", None)),
        *(({"sequence_id": value}, True) for value in (-1, 1.5, None, True)),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 4}, True),
    ],
)
def test_parameters_that_the_runtime_gives_a_meaning_have_its_type(parameters: dict[str, Any], wrong: bool) -> None:
    places: list[dict[str, Any]] = [
        {"inputs": [tensor([1])], "parameters": parameters},
        {"inputs": [tensor([1], parameters=parameters)]},
        {"inputs": [tensor([1])], "outputs": [{"name": "p", "parameters": parameters}]},
    ]
    assert [fault(json.dumps(place).encode()) is not None for place in places] == [wrong] * 3


@pytest.mark.parametrize("more", [{"id": 7}, {"parameters": 1}, {"outputs": "p"}, {"outputs": [{"name": 1}]}, {"outputs": [[]]}])
def test_what_stands_beside_the_inputs_may_be_malformed_too(more: dict[str, Any]) -> None:
    assert fault(json.dumps({"inputs": [tensor([1])], **more}).encode())


def answer(*outputs: dict[str, Any], model: str = "m") -> bytes:
    return json.dumps({"model_name": model, "model_version": "1", "outputs": outputs}).encode()


def out(data: list[Any], name: str = "p", datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": data}


@pytest.mark.parametrize(
    ("left", "right", "different"),
    [
        ([out([0.5])], [out([0.5])], False),
        ([out([0.5])], [out([0.69])], False),
        ([out([0.5])], [out([0.71])], True),
        ([out([0.5, 0.5])], [out([0.5, 0.8])], True),
        ([out([0.5])], [out([0.5, 0.5])], True),
        ([out([[0.5, 0.6]])], [out([0.5, 0.6])], False),
        ([out([0.5])], [out([0.5], "q")], True),
        ([out([0.5])], [], True),
        ([out([None])], [out([0.5])], True),
        # A label that flips because its probability crossed 0.5 by little is no difference of its own.
        ([out([0.49]), out([0], "label", "INT64")], [out([0.51]), out([1], "label", "INT64")], False),
        ([out(["a"], "s", "BYTES")], [out(["a"], "s", "BYTES")], False),
        ([out(["a"], "s", "BYTES")], [out(["b"], "s", "BYTES")], True),
        ([out([1], "n", "INT64")], [out([2], "n", "INT64")], True),
    ],
)
def test_answers_differ_by_their_tensors(left: list[Any], right: list[Any], different: bool) -> None:
    assert differs(answer(*left), answer(*right, model="other"), 0.2) is different


def test_not_a_number_is_a_difference_on_one_side_only() -> None:
    nan, one = answer(out([float("nan")])), answer(out([1.0]))
    assert differs(nan, one, 0.2)
    assert differs(one, nan, 0.2)
    assert not differs(nan, answer(out([float("nan")]), model="n"), 0.2)
    assert not differs(answer(out([float("nan"), 0.5])), answer(out([float("nan"), 0.6])), 0.2)
    infinite = answer(out([float("inf")]))
    assert not differs(infinite, answer(out([float("inf")]), model="n"), 0.2)
    assert differs(infinite, one, 0.2)


def test_a_copy_without_tensors_differs_and_a_primary_without_them_cannot_be_compared() -> None:
    assert differs(answer(out([1.0])), b"\x00\x01", 0.2)
    with pytest.raises(Incomparable):
        differs(b"{}", answer(out([1.0])), 0.2)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_comparison_is_symmetric(left: list[float], right: list[float], tolerance: float) -> None:
    a, b = answer(out(left)), answer(out(right))
    assert differs(a, b, tolerance) == differs(b, a, tolerance)
    assert not differs(a, a, 0.0)


def test_the_first_row_of_an_input_as_text() -> None:
    request = json.dumps(
        {"inputs": [tensor([["UA"], ["AA"]], "BYTES", name="carrier"), tensor([7, 8], "INT64", name="n"), tensor([], name="e")]}
    )
    assert first_row_value(request.encode(), "carrier") == "UA"
    assert first_row_value(request.encode(), "n") == "7"
    assert first_row_value(request.encode(), "e") is None
    assert first_row_value(request.encode(), "missing") is None
