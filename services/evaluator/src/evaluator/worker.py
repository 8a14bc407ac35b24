"""`python -m evaluator.worker DIR`: the process that runs a model of unknown origin. It predicts and measures, and knows nothing else.

DIR holds `in/` (task.json, the model, rows without their labels, sample inputs without their outputs), `out/` and an empty
`root/`. It leaves `out/result.json`, `out/scores.npy` and, when there were samples, one `out/sample-<i>.npy` per output. What goes
wrong through the model or its rows is told in result.json; any other end is a crash. Nothing that it writes is believed unchecked.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluator import jail

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort
    import pyarrow as pa

MODEL, ROWS, SAMPLES, TASK = "model.onnx", "rows.arrow", "samples.json", "task.json"
RESULT, SCORES = "result.json", "scores.npy"

_BATCH = 4096
_WARM_UP = 20
_TRIES = 3
_LATENCY_BUDGET_S = 5.0

_DATATYPES = {
    "tensor(string)": "BYTES",
    "tensor(bool)": "BOOL",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    **{
        f"tensor({'u' if unsigned else ''}int{bits})": f"{'U' if unsigned else ''}INT{bits}"
        for unsigned in (0, 1)
        for bits in (8, 16, 32, 64)
    },
}
"""onnxruntime's names of types and those of the Open Inference Protocol V2."""


class Refused(Exception):
    """The model or the rows are not what was said. Its text goes into the evaluation's reason."""


def main(argv: list[str]) -> None:
    folder = Path(argv[1])
    task = json.loads((folder / "in" / TASK).read_text())
    limit(task["limits"])
    inside, outside = folder / "in", folder / "out"
    if task["jail"]:
        inside, outside = jail.enter(folder)
    try:
        result = run(inside, outside, task)
    except Refused as refusal:
        result = {"refused": str(refusal)}
    (outside / RESULT).write_text(json.dumps(result))


def limit(limits: Mapping[str, int]) -> None:
    """Bounds what this process may use: bytes of memory, seconds of processor time, bytes of one file."""
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def run(inside: Path, outside: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """Predicts the rows and the samples, and measures if that is asked for. Raises Refused."""
    import numpy as np
    import pyarrow as pa

    session = load(inside / MODEL, task["signature"])
    with pa.memory_map(str(inside / ROWS)) as source:
        rows = pa.ipc.open_file(source).read_all()
    feeds = feeds_from_table(session, rows)
    scores = scores_of(session, feeds, rows.num_rows, _score_output(session, task["signature"]))
    np.save(outside / SCORES, scores, allow_pickle=False)
    result: dict[str, Any] = {"rows": rows.num_rows, "onnxruntime": _version(), "latency": None, "samples": None}
    if task["samples"]:
        result["samples"] = predict_samples(session, json.loads((inside / SAMPLES).read_text()), outside)
    if task["latency_rows"]:
        result["latency"] = latency(session, feeds, rows.num_rows, task["latency_rows"])
    return result


def load(path: Path, signature: Mapping[str, Any] | None) -> ort.InferenceSession:
    """The model, on one thread, after a check of its inputs and outputs against what its run declared, if given. Raises Refused."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever its native code raises, the model is what cannot be loaded
        raise Refused(f"onnxruntime cannot load the model: {_sentence(error)}") from error
    if signature is None:
        return session
    for part, found in (("input", session.get_inputs()), ("output", session.get_outputs())):
        declared = {one["name"]: one["datatype"] for one in signature[f"{part}s"]}
        actual = {one.name: _DATATYPES.get(one.type, one.type) for one in found}
        if part == "output":  # it may have more than the run declared
            actual = {name: kind for name, kind in actual.items() if name in declared}
        if declared != actual:
            raise Refused(f"the run declared the {part}s {_listed(declared)}, and the model file has {_listed(actual)}")
    return session


def feeds_from_table(session: ort.InferenceSession, rows: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """An array for every input of the model, from the column of its name. Raises Refused."""
    feeds = {}
    for one in session.get_inputs():
        if one.name not in rows.column_names:
            raise Refused(f"the holdout has no column {one.name!r}, which the model takes; it has {', '.join(rows.column_names)}")
        column = rows[one.name].combine_chunks()
        if column.null_count:
            raise Refused(f"the holdout's column {one.name!r} has {column.null_count} gaps, and a tensor cannot hold one")
        feeds[one.name] = _array(column.to_pylist() if hasattr(column.type, "value_type") else column.to_numpy(zero_copy_only=False), one)
    return feeds


def scores_of(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray[Any, Any]], rows: int, output: str) -> np.ndarray[Any, Any]:
    """One score per row as float64: the output's only column, or the second of two (the probability of 1). Raises Refused."""
    import numpy as np

    parts = []
    for start in range(0, rows, _BATCH):
        answer = _predict(session, [output], {name: array[start : start + _BATCH] for name, array in feeds.items()})[0]
        parts.append(np.asarray(answer))
    found = np.concatenate(parts) if parts else np.zeros((0, 1))
    if found.ndim == 2 and found.shape[1] in (1, 2):
        found = found[:, -1]
    if found.ndim != 1 or len(found) != rows or found.dtype.kind not in "fiu":
        raise Refused(f"its output {output!r} has the shape {list(found.shape)} for {rows} rows, and not one number per row")
    return found.astype(np.float64)


def predict_samples(session: ort.InferenceSession, inputs: Mapping[str, Any], outside: Path) -> list[str]:
    """Predicts the sample rows, writes one array per output and returns the outputs' names, in the order of the files. Raises Refused."""
    import numpy as np

    feeds = {}
    for one in session.get_inputs():
        if one.name not in inputs:
            raise Refused(f"the logged samples have no input {one.name!r}, which the model takes")
        feeds[one.name] = _array(inputs[one.name], one)
    names = [one.name for one in session.get_outputs()]
    for i, answer in enumerate(_predict(session, names, feeds)):
        array = np.asarray(answer)
        np.save(outside / f"sample-{i}.npy", array.astype(np.str_) if array.dtype == np.object_ else array, allow_pickle=False)
    return names


def latency(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray[Any, Any]], rows: int, most: int) -> dict[str, float]:
    """Milliseconds per prediction of a single row, over the first rows of the holdout, for some seconds at most. Raises Refused.

    Of each row the fastest of three predictions counts: a row that is slow by itself is slow three times, and one that met a
    busy processor is not.
    """
    import numpy as np

    singles = [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(min(rows, most))]
    until = time.monotonic() + _LATENCY_BUDGET_S
    for single in singles[:_WARM_UP]:
        _predict(session, None, single)
        if time.monotonic() > until:
            break
    took: list[float] = []
    until = time.monotonic() + _LATENCY_BUDGET_S
    for single in singles:
        tries = []
        for _ in range(_TRIES):
            started = time.perf_counter_ns()
            _predict(session, None, single)
            tries.append(time.perf_counter_ns() - started)
        took.append(min(tries) / 1e6)
        if time.monotonic() > until:
            break
    p50, p99 = np.percentile(took, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "rows": len(took)}


def _predict(session: ort.InferenceSession, outputs: list[str] | None, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
    try:
        answers: list[Any] = session.run(outputs, dict(feeds))
    except Exception as error:  # as in load
        raise Refused(f"the model failed on rows of the holdout or samples: {_sentence(error)}") from error
    return answers


def _array(values: Any, spec: Any) -> np.ndarray[Any, Any]:
    """Values as the tensor that the model takes: its type, and with a last dimension where it wants one."""
    import numpy as np

    datatype = _DATATYPES.get(spec.type)
    dtypes = {"BYTES": np.object_, "BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
    try:
        dtype = dtypes.get(datatype or "") or np.dtype(str(datatype).lower())
        array = np.asarray(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refused(f"the values of {spec.name!r} are no {datatype or spec.type}: {_sentence(error)}") from error
    if datatype == "BYTES":
        array = np.asarray(np.vectorize(_text, otypes=[np.object_])(array) if array.size else array)
    if array.ndim == 1 and len(spec.shape) == 2:
        array = array.reshape(-1, 1)
    return array


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _score_output(session: ort.InferenceSession, signature: Mapping[str, Any] | None) -> str:
    outputs = signature["outputs"] if signature else []
    return str(outputs[0]["name"]) if outputs else str(session.get_outputs()[0].name)


def _listed(datatypes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in sorted(datatypes.items())) or "none"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    main(sys.argv)
