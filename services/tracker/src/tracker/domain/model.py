"""A deliverable model: its signature in the words of the Open Inference Protocol V2, and the sample rows that must agree with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tracker.domain.errors import Problem, Rejected

DATATYPES = frozenset(
    {"BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64", "BYTES"},
)
FORMATS = frozenset({"onnx"})
"""What a service can load without running anybody's code."""

MAX_TENSORS = 1_000
MAX_SAMPLES_BYTES = 8 * 1024 * 1024
MAX_SAMPLE_ROWS = 10_000
MAX_MODELS = 100
"""Models that one run may log."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A stored object that never changes, named by the SHA-256 of its bytes."""

    sha256: str
    size_bytes: int
    key: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output; -1 in the shape is any length, the first dimension is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class DeliverableModel:
    """A model that a run logged, with the signature and the sample rows by which it can be checked and warmed up.

    One that MLflow's client logged may have no sample rows, or rows without outputs: the client keeps none. `logged_model_id` is MLflow's
    id of it, or "", and `folder` is where it lies among the run's own artifacts, or "".
    """

    name: str
    format: str
    blob: BlobRef
    signature: Signature
    samples: BlobRef | None
    logged_model_id: str = ""
    folder: str = ""


def check_signature(signature: Signature) -> list[Problem]:
    """Everything that is wrong with a signature; empty when it is right."""
    problems: list[Problem] = []
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        field = f"signature.{side}"
        if not tensors:
            problems.append(Problem(field, "at least one tensor is needed"))
        if len(tensors) > MAX_TENSORS:
            problems.append(Problem(field, f"at most {MAX_TENSORS} tensors"))
            continue
        seen: set[str] = set()
        for index, tensor in enumerate(tensors):
            problems.extend(_check_tensor(f"{field}[{index}]", tensor, seen))
            seen.add(tensor.name)
    return problems


def _check_tensor(field: str, tensor: TensorSpec, seen: set[str]) -> Iterator[Problem]:
    if not tensor.name or len(tensor.name) > 250 or "\x00" in tensor.name:
        yield Problem(f"{field}.name", "a name of 1 to 250 characters is needed")
    if tensor.name in seen:
        yield Problem(f"{field}.name", f"{tensor.name!r} is there twice")
    if tensor.datatype not in DATATYPES:
        yield Problem(f"{field}.datatype", f"{tensor.datatype!r} is not one of {', '.join(sorted(DATATYPES))}")
    if not 1 <= len(tensor.shape) <= 16 or any(length != -1 and length < 1 for length in tensor.shape):
        yield Problem(f"{field}.shape", "1 to 16 dimensions, each -1 (any length) or at least 1, the batch first")


def check_samples(data: bytes, signature: Signature) -> int:
    """Checks sample rows against a signature and returns how many there are.

    `data` is JSON: {"inputs": {name: rows}, "outputs": {name: rows}}. Every tensor of the signature must be there and no other;
    all have the same number of rows; a row is a value or nested lists that fit the tensor's shape after the batch.
    Raises Rejected.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise Rejected([Problem("samples", f"not JSON: {exc}")]) from exc
    if not isinstance(document, dict) or set(document) != {"inputs", "outputs"}:
        raise Rejected([Problem("samples", 'an object with "inputs" and "outputs" is needed')])
    problems: list[Problem] = []
    counts: set[int] = set()
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        problems.extend(_check_side(side, tensors, document[side], counts))
    if not problems and len(counts) != 1:
        problems.append(Problem("samples", f"tensors have different numbers of rows: {', '.join(map(str, sorted(counts)))}"))
    if not problems and not 1 <= min(counts) <= MAX_SAMPLE_ROWS:
        problems.append(Problem("samples", f"1 to {MAX_SAMPLE_ROWS} rows are needed"))
    if problems:
        raise Rejected(problems)
    return counts.pop()


def check_inputs(inputs: Mapping[str, Any], signature: Signature) -> int:
    """Checks rows of the inputs alone, as `check_samples` does, and returns how many there are. Raises Rejected."""
    counts: set[int] = set()
    problems = list(_check_side("inputs", signature.inputs, inputs, counts))
    if not problems and (len(counts) != 1 or not 1 <= min(counts) <= MAX_SAMPLE_ROWS):
        problems.append(Problem("samples.inputs", f"1 to {MAX_SAMPLE_ROWS} rows are needed, of each input as many"))
    if problems:
        raise Rejected(problems)
    return counts.pop()


def _check_side(side: str, tensors: Sequence[TensorSpec], given: Any, counts: set[int]) -> Iterator[Problem]:
    if not isinstance(given, Mapping):
        yield Problem(f"samples.{side}", "an object of tensors by name is needed")
        return
    wanted = {tensor.name for tensor in tensors}
    for name in sorted(wanted ^ given.keys()):
        yield Problem(f"samples.{side}.{name}", "is missing" if name in wanted else "is not in the signature")
    for tensor in tensors:
        if tensor.name not in given:
            continue
        field, rows = f"samples.{side}.{tensor.name}", given[tensor.name]
        if not isinstance(rows, list):
            yield Problem(field, "a list of rows is needed")
            continue
        counts.add(len(rows))
        for index, row in enumerate(rows):
            wrong = _check_value(row, tensor.shape[1:], tensor.datatype)
            if wrong:
                yield Problem(f"{field}[{index}]", wrong)
                break  # one per tensor tells enough


def _check_value(value: Any, shape: tuple[int, ...], datatype: str) -> str:
    """What is wrong with one value of this shape; "" when nothing is."""
    if not shape:
        return "" if _is_of(value, datatype) else f"{json.dumps(value)[:40]} is not {datatype}"
    if not isinstance(value, list):
        return f"a list of shape {list(shape)} is needed"
    if shape[0] not in (-1, len(value)):
        return f"{len(value)} values where the shape says {shape[0]}"
    return next(filter(None, (_check_value(item, shape[1:], datatype) for item in value)), "")


_ABOVE_FLOATS = {"FP16": 2**16, "FP32": 2**128, "FP64": 2**1024}
"""JSON can write numbers that no float holds: those at or above these would become infinite."""


def _is_of(value: Any, datatype: str) -> bool:
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if datatype.startswith("FP"):
        return isinstance(value, int | float) and abs(value) < _ABOVE_FLOATS[datatype]
    if not isinstance(value, int):
        return False
    bits = int(datatype.removeprefix("U").removeprefix("INT"))
    low, high = (0, 1 << bits) if datatype.startswith("U") else (-(1 << bits - 1), 1 << bits - 1)
    return low <= value < high


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
