"""What the predicting process does with a model and its rows, called here in the test's own process: no jail, no limits."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluator import worker
from onnx import TensorProto

KINDS = ["late", "other", "late"]
X = np.array([0.5, -1.0, 2.0], np.float32)


def prepare(folder: Path, model: bytes, rows: dict[str, Any], samples: dict[str, Any] | None = None) -> tuple[Path, Path]:
    inside, outside = folder / "in", folder / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / worker.MODEL).write_bytes(model)
    table = pa.table(rows)
    with pa.OSFile(str(inside / worker.ROWS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    if samples is not None:
        (inside / worker.SAMPLES).write_text(json.dumps(samples))
    return inside, outside


def task(tiny: ModuleType, **changes: Any) -> dict[str, Any]:
    return {"signature": tiny.SIGNATURE, "samples": False, "latency_rows": 0} | changes


ROWS = {"x": X, "kind": KINDS, "not asked for": [1, 2, 3]}


def test_scores_samples_and_latency(tiny: ModuleType, tmp_path: Path) -> None:
    samples = {"x": [[1.0], [0.0]], "kind": [["late"], ["b"]]}
    inside, outside = prepare(tmp_path, tiny.linear(2.0), ROWS, samples)
    result = worker.run(inside, outside, task(tiny, samples=True, latency_rows=100))
    np.testing.assert_allclose(np.load(outside / worker.SCORES), tiny.probability(2.0, X, KINDS)[:, 0], rtol=1e-6)
    assert result["samples"] == ["probability"]
    expected = tiny.probability(2.0, np.array([1.0, 0.0]), ["late", "b"])
    np.testing.assert_allclose(np.load(outside / "sample-0.npy"), expected, rtol=1e-6)
    assert result["latency"]["rows"] == 3
    assert 0 < result["latency"]["p50_ms"] <= result["latency"]["p99_ms"]


def test_more_rows_than_a_batch_stay_in_order(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_BATCH", 7)
    x = np.linspace(-3, 3, 50, dtype=np.float32)
    inside, outside = prepare(tmp_path, tiny.linear(1.0), {"x": x, "kind": ["a"] * 50})
    worker.run(inside, outside, task(tiny))
    found = np.load(outside / worker.SCORES)
    assert len(found) == 50
    assert (np.diff(found) > 0).all()


def test_a_champion_is_taken_as_its_file_says(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(2.0), ROWS)
    worker.run(inside, outside, task(tiny, signature=None))
    np.testing.assert_allclose(np.load(outside / worker.SCORES), tiny.probability(2.0, X, KINDS)[:, 0], rtol=1e-6)


def test_two_columns_are_two_probabilities_and_the_second_counts(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.identity(width=2), {"x": [[0.2, 0.8], [0.9, 0.1]]})
    worker.run(inside, outside, task(tiny, signature=None))
    np.testing.assert_allclose(np.load(outside / worker.SCORES), [0.8, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"x": X}, "no column 'kind'"),
        ({"x": pa.array([1.0, None, 2.0], pa.float32()), "kind": KINDS}, "1 gaps"),
        ({"x": ["a", "b", "c"], "kind": KINDS}, "'x' are no FP32"),
    ],
)
def test_rows_that_do_not_fit_the_model(tiny: ModuleType, tmp_path: Path, rows: dict[str, Any], words: str) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(1.0), rows)
    with pytest.raises(worker.Refused, match=words):
        worker.run(inside, outside, task(tiny))


@pytest.mark.parametrize(
    ("part", "tensors", "words"),
    [
        ("inputs", [{"name": "x", "datatype": "FP32"}], "declared the inputs x FP32, and the model file has kind BYTES, x FP32"),
        ("inputs", [{"name": "x", "datatype": "FP64"}, {"name": "kind", "datatype": "BYTES"}], "x FP64"),
        ("outputs", [{"name": "score", "datatype": "FP32"}], "score"),
    ],
)
def test_a_model_that_is_not_what_its_run_declared(tiny: ModuleType, tmp_path: Path, part: str, tensors: list[Any], words: str) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(1.0), ROWS)
    with pytest.raises(worker.Refused, match=words):
        worker.run(inside, outside, task(tiny, signature={**tiny.SIGNATURE, part: tensors}))


def test_a_file_that_is_no_model(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, b"not a model", ROWS)
    with pytest.raises(worker.Refused, match="cannot load"):
        worker.run(inside, outside, task(tiny))


def test_weights_are_not_read_from_beside_the_model(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.external(), {"x": X})
    with pytest.raises(worker.Refused, match="cannot load"):
        worker.run(inside, outside, task(tiny, signature=None))


def test_a_model_that_fails_on_a_row(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(1.0, breaks_above=1.5), ROWS)
    with pytest.raises(worker.Refused, match="failed on rows"):
        worker.run(inside, outside, task(tiny))


@pytest.mark.parametrize(("model", "column"), [("string", ["a", "b"]), ("wide", [[1.0, 2.0, 3.0]] * 2)])
def test_answers_that_are_no_scores(tiny: ModuleType, tmp_path: Path, model: str, column: list[Any]) -> None:
    made = tiny.identity(TensorProto.STRING) if model == "string" else tiny.identity(width=3)
    inside, outside = prepare(tmp_path, made, {"x": column})
    with pytest.raises(worker.Refused, match="not one number per row"):
        worker.run(inside, outside, task(tiny, signature=None))


def test_samples_without_an_input(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(1.0), ROWS, {"x": [[1.0]]})
    with pytest.raises(worker.Refused, match="no input 'kind'"):
        worker.run(inside, outside, task(tiny, samples=True))


def test_samples_with_a_number_that_no_float_holds(tiny: ModuleType, tmp_path: Path) -> None:
    inside, outside = prepare(tmp_path, tiny.linear(1.0), ROWS, {"x": [[10**400]], "kind": [["a"]]})
    with pytest.raises(worker.Refused, match="'x' are no FP32"):
        worker.run(inside, outside, task(tiny, samples=True))


@pytest.mark.parametrize(
    ("onnx_type", "values"),
    [
        (TensorProto.INT64, [1, 0]),
        (TensorProto.UINT8, [1, 0]),
        (TensorProto.DOUBLE, [0.5, 0.25]),
        (TensorProto.FLOAT16, [0.5, 0.25]),
    ],
)
def test_every_type_of_number_is_fed_as_the_model_takes_it(tiny: ModuleType, tmp_path: Path, onnx_type: int, values: list[Any]) -> None:
    inside, outside = prepare(tmp_path, tiny.identity(onnx_type), {"x": values})
    worker.run(inside, outside, task(tiny, signature=None))
    assert np.load(outside / worker.SCORES).tolist() == values
