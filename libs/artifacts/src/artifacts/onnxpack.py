"""Makes one ONNX file of a model that keeps its tensors in files beside it: what is delivered is one object with one hash.

Reads and writes the protobuf wire format by itself, with the weights passed from file to file, so that a model takes little memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from servicekit.errors import Invalid, TooLarge

from artifacts.onnxfile import DATA_LOCATION, EXTERNAL_DATA, INNER, MAX_DEPTH, MAX_ONNX_BYTES, NAME, TENSOR
from artifacts.onnxwire import BYTES, VARINT, Fields, malformed

RAW_DATA = 9
"""The field of a tensor that holds its values as they lie in memory."""

_KEY, _VALUE = 1, 2
_CHUNK = 1024 * 1024
_MAX_ENTRY = 4096


@dataclass(frozen=True, slots=True)
class _Slice:
    """Bytes of a file: "" is the model's own."""

    file: str
    start: int
    end: int


_Piece = bytes | _Slice


def external_files(path: Path) -> frozenset[str]:
    """The names of the files in which a model keeps tensors, as it writes them; none when it is whole. Raises Invalid, TooLarge. Blocks."""
    with _opened(path) as data:
        packer = _Packer(data, None)
        packer.pieces("ModelProto", 0, len(data), 0)
        return frozenset(packer.named)


def pack(path: Path, beside: Mapping[str, Path], target: Path) -> None:
    """Writes the model to `target` with the tensors from the files in it. `beside` has every name of `external_files`.

    Raises Invalid when a tensor lies outside its file, TooLarge when all together is more than an ONNX file can hold. Blocks. Repeatable.
    """
    with ExitStack() as stack:
        data = stack.enter_context(_opened(path))
        sizes = {name: file.stat().st_size for name, file in beside.items()}
        pieces = _Packer(data, sizes).pieces("ModelProto", 0, len(data), 0) or [_Slice("", 0, len(data))]
        if sum(map(_size, pieces)) > MAX_ONNX_BYTES:
            raise TooLarge(f"an ONNX file holds at most {MAX_ONNX_BYTES} bytes, its tensors included")
        files = {name: stack.enter_context(file.open("rb")) for name, file in {"": path, **beside}.items()}
        with target.open("wb") as out:
            for piece in pieces:
                if isinstance(piece, bytes):
                    out.write(piece)
                    continue
                source = files[piece.file]
                source.seek(piece.start)
                left = piece.end - piece.start
                while left:
                    chunk = source.read(min(left, _CHUNK))
                    if not chunk:
                        raise OSError(f"{source.name} became shorter while it was read")
                    out.write(chunk)
                    left -= len(chunk)


class _Packer:
    """Walks a model's messages. Without `sizes` it only finds names."""

    def __init__(self, data: mmap.mmap, sizes: Mapping[str, int] | None) -> None:
        self.named: set[str] = set()
        self._data = data
        self._sizes = sizes
        self._fields = Fields(data)

    def pieces(self, kind: str, start: int, end: int, depth: int) -> list[_Piece] | None:
        """The message with its tensors in it; None when it stays as it is."""
        if depth > MAX_DEPTH:
            raise malformed()
        if kind == TENSOR:
            return self._tensor(start, end)
        changed: list[_Piece] = []
        kept = start
        for number, wire, first, last, began in self._fields.of(start, end):
            if wire != BYTES or number not in INNER[kind]:
                continue
            inner = self.pieces(INNER[kind][number], first, last, depth + 1)
            if inner is not None:
                changed += [_Slice("", kept, began), _head(number, sum(map(_size, inner))), *inner]
                kept = last
        return [*changed, _Slice("", kept, end)] if changed else None

    def _tensor(self, start: int, end: int) -> list[_Piece] | None:
        name, external = "", False
        entries: dict[str, str] = {}
        kept: list[_Piece] = []
        for number, wire, first, last, began in self._fields.of(start, end):
            if number == EXTERNAL_DATA and wire == BYTES:
                key, value = self._entry(first, last)
                entries[key] = value
            elif number == DATA_LOCATION and wire == VARINT:
                external = first & 0xFFFF_FFFF != 0
            elif number != RAW_DATA:
                kept.append(_Slice("", began, last))
                if number == NAME and wire == BYTES:
                    name = self._data[first : min(last, first + 200)].decode(errors="replace")
        if not external and not entries:
            return None
        location = entries.get("location", "")
        if not location:
            raise Invalid(f"the tensor {name!r} lies in another file, and the model does not say in which")
        self.named.add(location)
        if self._sizes is None:
            return None
        size = self._sizes[location]
        offset = _number(entries.get("offset") or "0", name)
        length = _number(entries.get("length") or str(max(size - offset, 0)), name)
        if offset + length > size:
            raise Invalid(f"the tensor {name!r} lies outside the file {location!r}, which has {size} bytes")
        return [*kept, _head(RAW_DATA, length), _Slice(location, offset, offset + length)]

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        texts = {_KEY: "", _VALUE: ""}
        for number, wire, first, last, _ in self._fields.of(start, end):
            if number in texts and wire == BYTES:
                if last - first > _MAX_ENTRY:
                    raise malformed()
                texts[number] = self._data[first:last].decode(errors="replace")
        return texts[_KEY], texts[_VALUE]


def _opened(path: Path) -> mmap.mmap:
    size = path.stat().st_size
    if size == 0:
        raise malformed()
    if size > MAX_ONNX_BYTES:
        raise TooLarge(f"an ONNX file holds at most {MAX_ONNX_BYTES} bytes")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _size(piece: _Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.end - piece.start


def _head(number: int, size: int) -> bytes:
    """The tag and the length that stand before a field's content."""
    out = bytearray()
    for value in (number << 3 | BYTES, size):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _number(text: str, tensor: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Invalid(f"the tensor {tensor!r} has no place in its file: {text[:50]!r} is not a number of bytes")
    return int(text)
