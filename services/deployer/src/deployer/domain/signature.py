"""What goes into a model and out of it, in the words of the Open Inference Protocol V2, and the sample rows it is warmed up with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployer.domain.errors import SignatureInvalid

DATATYPES = frozenset({"BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64", "BYTES"})

PARITY = 0.01
"""How far an answer of the runtime may be from what the training code got for the same row, absolutely and relatively: other kernels
round otherwise, while an exported or served model that is wrong is far off."""

MOST_ROWS = 64


@dataclass(frozen=True)
class Tensor:
    """A named input or output. -1 in the shape is any length; the first dimension is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a model."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def check(self) -> None:
        """Raises SignatureInvalid unless every tensor has a name of its own, a V2 datatype and a shape with a batch dimension."""
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            if not tensors:
                raise SignatureInvalid(f"the signature has no {kind}")
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise SignatureInvalid(f"two {kind}s have the same name")
            for tensor in tensors:
                if not tensor.name:
                    raise SignatureInvalid(f"an {kind} has no name")
                if tensor.datatype not in DATATYPES:
                    raise SignatureInvalid(f"{kind} {tensor.name}: unknown datatype {tensor.datatype!r}")
                if not tensor.shape or any(length == 0 or length < -1 for length in tensor.shape):
                    raise SignatureInvalid(f"{kind} {tensor.name}: shape {list(tensor.shape)} is not one of a batch")


Rows = Mapping[str, list[Any]]
"""Values by tensor name: one (nested) list element per row."""


@dataclass(frozen=True)
class Samples:
    """Rows of a model's inputs, and what it answered to them where it was trained."""

    inputs: Rows
    outputs: Rows


def read_samples(text: bytes, signature: Signature) -> Samples:
    """Read the samples that a run logged (JSON: {"inputs": {name: rows}, "outputs": {name: rows}}), MOST_ROWS rows of them.

    No outputs at all are right too: MLflow's client keeps an input example without them, and any answer to it will do.
    Raises SignatureInvalid when they do not fit the signature.
    """
    try:
        document = json.loads(text)
        inputs, outputs = document["inputs"], document["outputs"]
        samples = Samples(
            {name: list(rows)[:MOST_ROWS] for name, rows in inputs.items()}, {n: list(r)[:MOST_ROWS] for n, r in outputs.items()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SignatureInvalid(f'the sample rows are not {{"inputs": {{name: rows}}, "outputs": {{name: rows}}}}: {error!r}') from error
    for kind, tensors, rows in (("input", signature.inputs, samples.inputs), ("output", signature.outputs, samples.outputs)):
        wanted = {tensor.name for tensor in tensors}
        if set(rows) != wanted and (kind == "input" or rows):
            raise SignatureInvalid(f"the sample rows have the {kind}s {sorted(rows)}, the signature has {sorted(wanted)}")
    lengths = {len(rows) for rows in (*samples.inputs.values(), *samples.outputs.values())}
    if len(lengths) != 1 or 0 in lengths:
        raise SignatureInvalid(f"the sample rows of the tensors differ in number: {sorted(lengths)}")
    return samples


def zeros(signature: Signature) -> Samples:
    """One row of nothing, for a version whose run logged no samples: any answer to it will do."""
    return Samples({tensor.name: [_zero(tensor.datatype, tensor.shape[1:])] for tensor in signature.inputs}, {})


def _zero(datatype: str, shape: tuple[int, ...]) -> Any:
    if not shape:
        return {"BYTES": "", "BOOL": False}.get(datatype, 0)
    return [_zero(datatype, shape[1:]) for _ in range(max(shape[0], 1))]


def differences(expected: Rows, answered: Rows) -> list[str]:
    """What differs between two sets of outputs by more than PARITY, one sentence per output; empty when they are the same."""
    found: list[str] = []
    for name, rows in expected.items():
        wanted = list(_flat(rows))
        got = list(_flat(answered.get(name, [])))
        if len(wanted) != len(got):
            found.append(f"{name}: {len(got)} values where {len(wanted)} were expected")
            continue
        wrong = [(w, g) for w, g in zip(wanted, got, strict=True) if not _same(w, g)]
        if wrong:
            found.append(f"{name}: {len(wrong)} of {len(wanted)} values differ, such as {wrong[0][1]!r} where {wrong[0][0]!r} was expected")
    return found


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _same(wanted: object, got: object) -> bool:
    if isinstance(wanted, bool) or isinstance(got, bool) or isinstance(wanted, str) or isinstance(got, str):
        return wanted == got
    if not isinstance(got, int | float):
        return False
    if wanted is None:  # JSON has no NaN
        return math.isnan(got)
    if not isinstance(wanted, int | float):
        return False
    return math.isclose(wanted, got, rel_tol=PARITY, abs_tol=PARITY) or (math.isnan(wanted) and math.isnan(got))
