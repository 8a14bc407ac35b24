"""Reads off an ONNX file what goes into its graph and what comes out, without loading it.

Nothing of the weights or of the nodes is read, so a file of any size takes constant memory. The numbers are those of onnx.proto; a test
compares them with the onnx package.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.onnxwire import BYTES, VARINT, Fields, malformed

DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
}
"""TensorProto.DataType in the words of the Open Inference Protocol V2, which has no others."""

_GRAPH = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TENSOR_TYPE = 1
_ELEMENT, _SHAPE = 1, 2
_DIMENSION = 1
_LENGTH = 1


@dataclass(frozen=True, slots=True)
class GraphValue:
    """An input or output of the graph. `datatype` is "" for what is no tensor, or of a type that V2 has not; `shape` is None when the
    file does not say it, and -1 in it any length."""

    name: str
    datatype: str
    shape: tuple[int, ...] | None


def read_graph(path: Path) -> tuple[tuple[GraphValue, ...], tuple[GraphValue, ...]]:
    """Inputs, without those that the file itself gives a value, and outputs. Raises Invalid, TooLarge. Blocks. Repeatable."""
    if path.stat().st_size == 0:
        raise malformed()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).graph()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._fields = Fields(data)

    def graph(self) -> tuple[tuple[GraphValue, ...], tuple[GraphValue, ...]]:
        inputs: list[GraphValue] = []
        outputs: list[GraphValue] = []
        given: set[str] = set()
        for start, end in self._inner(0, len(self._data), _GRAPH):
            for number, first, last in self._messages(start, end):
                if number == _INITIALIZER:
                    given.add(self._text(first, last, _TENSOR_NAME))
                elif number == _INPUT:
                    inputs.append(self._value(first, last))
                elif number == _OUTPUT:
                    outputs.append(self._value(first, last))
        return tuple(value for value in inputs if value.name not in given), tuple(outputs)

    def _value(self, start: int, end: int) -> GraphValue:
        datatype, shape = "", None
        for kind in self._inner(start, end, _VALUE_TYPE):
            for tensor in self._inner(*kind, _TENSOR_TYPE):
                for number, wire, first, last, _ in self._fields.of(*tensor):
                    if number == _ELEMENT and wire == VARINT:
                        datatype = DATATYPES.get(first, "")
                    elif number == _SHAPE and wire == BYTES:
                        shape = tuple(self._length(*dimension) for dimension in self._inner(first, last, _DIMENSION))
        return GraphValue(self._text(start, end, _VALUE_NAME), datatype, shape)

    def _length(self, start: int, end: int) -> int:
        """A dimension with a name, or with neither name nor length, is of any length. So is one of length 0, as some exporters write it."""
        length = -1
        for number, wire, value, _, _ in self._fields.of(start, end):
            if number == _LENGTH and wire == VARINT:
                length = value if 0 < value < 2**63 else -1
        return length

    def _text(self, start: int, end: int, wanted: int) -> str:
        text = ""
        for number, first, last in self._messages(start, end):
            if number == wanted:
                if last - first > 10_000:
                    raise malformed()
                text = self._data[first:last].decode(errors="replace")
        return text

    def _inner(self, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
        return ((first, last) for number, first, last in self._messages(start, end) if number == wanted)

    def _messages(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        return ((number, first, last) for number, wire, first, last, _ in self._fields.of(start, end) if wire == BYTES)
