"""The protobuf wire format (protobuf.dev/programming-guides/encoding) off a mapped file, as the readers of ONNX files need it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from servicekit.errors import Invalid, TooLarge

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
"""Wire types. There are groups besides, which ONNX has not."""

MAX_FIELDS = 10_000_000


class Fields:
    """Reads the fields of messages within one file, up to MAX_FIELDS of them in all."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def of(self, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each field between `at` and `end`: number, wire type, where its content begins (of a number: the number itself) and ends,
        and where the field began. Raises Invalid, TooLarge."""
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise too_many()
            began = at
            tag, at = varint(self._data, at, end)
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                value, at = varint(self._data, at, end)
                yield number, wire, value, at, began
                continue
            if wire == BYTES:
                size, first = varint(self._data, at, end)
            elif wire in (EIGHT_BYTES, FOUR_BYTES):
                size, first = 8 if wire == EIGHT_BYTES else 4, at
            else:
                raise malformed()
            at = first + size
            if at > end:
                raise malformed()
            yield number, wire, first, at, began


def varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where it ends. Raises Invalid."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise malformed()


def malformed() -> Invalid:
    return Invalid("the file is no ONNX model: it is not written as protobuf is")


def too_many() -> TooLarge:
    return TooLarge(f"the model has more than {MAX_FIELDS} parts, which is the most that is looked at")
