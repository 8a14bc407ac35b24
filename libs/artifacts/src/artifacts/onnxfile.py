"""Looks into an ONNX file without loading it: does it hold all of its weights, or does it name other files to read them from?

A model that names files (`external data`) would have whatever runtime loads it open paths of the author's choice, and is not the whole
of what was hashed. Reads the protobuf wire format by itself, since parsing the messages would take as much memory as the model.
The numbers are those of onnx.proto; a test compares them with the onnx package.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from servicekit.errors import Invalid, TooLarge

from artifacts import onnxwire
from artifacts.onnxwire import BYTES, EIGHT_BYTES, FOUR_BYTES, VARINT, malformed, too_many, varint

MAX_ONNX_BYTES = 2**31 - 1
"""The most that a protobuf message, and so an ONNX file, can hold."""

MAX_DEPTH = 100
"""Of messages in one another: what protobuf itself allows."""

TENSOR = "TensorProto"
INNER: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: TENSOR, 6: "GraphProto", 10: TENSOR, 11: "GraphProto", 22: "SparseTensorProto", 23: "SparseTensorProto"},
    "SparseTensorProto": {1: TENSOR, 2: TENSOR},
    TENSOR: {},
}
"""By message, the fields that lead to tensors."""

NAME, EXTERNAL_DATA, DATA_LOCATION = 8, 13, 14
"""Fields of a tensor."""

# Forests of decision trees hold millions of numbers, one field each: AttributeProto.floats (7) and .ints (8). Runs of them are skipped.
_RUN = re.compile(rb"(?:\x3d.{4}){1,100000}+|(?:\x40[\x80-\xff]{0,9}+[\x00-\x7f]){1,100000}+", re.DOTALL)


def check_one_file(path: Path) -> None:
    """Raises Invalid when an ONNX file has external data or is not written as protobuf is, TooLarge when it cannot be one.

    Reads what leads to tensors and none of their content, in constant memory. Blocks. Repeatable.
    """
    if path.stat().st_size > MAX_ONNX_BYTES:
        raise TooLarge(f"an ONNX file holds at most {MAX_ONNX_BYTES} bytes")
    if path.stat().st_size == 0:
        raise Invalid("the file is empty, and no ONNX model")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        name = _external_tensor(data)
    if name is not None:
        raise Invalid(f"the model keeps the tensor {name!r} in another file (external data); export it with all weights in the one file")


def _external_tensor(data: mmap.mmap) -> str | None:
    """The name of the first tensor with external data. Raises Invalid."""
    outer: list[tuple[str, int, int]] = []
    kind, at, end = "ModelProto", 0, len(data)
    name, external = "", False
    left = onnxwire.MAX_FIELDS
    while True:
        if at == end:
            if external:
                return name
            if not outer:
                return None
            kind, at, end = outer.pop()
            name = ""
            continue
        if kind == "AttributeProto" and (run := _RUN.match(data, at, end)):
            at = run.end()
            continue
        left -= 1
        if left < 0:
            raise too_many()
        tag, at = varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number < 2**29:
            raise malformed()
        if wire == VARINT:
            value, at = varint(data, at, end)
            # An enum has 32 bits; a later DEFAULT does not take this back.
            external |= kind == TENSOR and number == DATA_LOCATION and value & 0xFFFF_FFFF != 0
        elif wire == BYTES:
            size, start = varint(data, at, end)
            at = start + size
            if at > end:
                raise malformed()
            if number in INNER[kind]:
                if len(outer) == MAX_DEPTH:
                    raise malformed()
                outer.append((kind, at, end))
                kind, at, end = INNER[kind][number], start, at
            elif kind == TENSOR and number == NAME:
                name = data[start : min(at, start + 200)].decode(errors="replace")
            elif kind == TENSOR and number == EXTERNAL_DATA:
                external = True
        elif wire in (EIGHT_BYTES, FOUR_BYTES):
            at += 8 if wire == EIGHT_BYTES else 4
            if at > end:
                raise malformed()
        else:  # groups, which ONNX has not
            raise malformed()
