"""The Open Inference Protocol V2 as the gateway speaks it: which paths are public, the form of its errors, and where a
runtime's own model name stands in an answer.

https://github.com/open-inference/open-inference-protocol (REST). Everything that is not named here is denied.
"""

from __future__ import annotations

import json
import math
import re
import sys
from enum import Enum
from itertools import accumulate
from typing import Any, Final

SERVER_METADATA = b'{"name":"headrace","version":"0.1.0","extensions":[]}'


class Op(Enum):
    """What a public V2 path asks for."""

    SERVER = "server"
    LIVE = "live"
    READY = "ready"
    INFER = "infer"
    MODEL = "model"
    MODEL_READY = "model_ready"

    @property
    def method(self) -> bytes:
        """The one HTTP method that the path answers to."""
        return b"POST" if self is Op.INFER else b"GET"


FIXED_PATHS = {b"/v2": Op.SERVER, b"/v2/health/live": Op.LIVE, b"/v2/health/ready": Op.READY}
"""Paths that name no endpoint. Live and ready need no key: load balancers ask them."""


def model_paths(endpoint: str) -> dict[bytes, Op]:
    """The public paths of one endpoint. Its name must have passed `routes.NAME`."""
    base = b"/v2/models/" + endpoint.encode("ascii")
    return {base: Op.MODEL, base + b"/ready": Op.MODEL_READY, base + b"/infer": Op.INFER}


def is_data_path(path: bytes) -> bool:
    """Whether a path belongs to the data plane (and is therefore never given to the control application)."""
    return path.startswith(b"/v2") and (len(path) == 3 or path[3] in b"/?")


def error_body(message: str) -> bytes:
    """An error as V2 writes it."""
    return json.dumps({"error": message}, separators=(",", ":")).encode()


_STRING = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_LEADING_NAME = {
    b"model_name": re.compile(rb'\s*\{\s*(?:"id"\s*:\s*' + _STRING + rb'\s*,\s*)?"model_name"\s*:\s*' + _STRING),
    b"name": re.compile(rb'\s*\{\s*(?:"id"\s*:\s*' + _STRING + rb'\s*,\s*)?"name"\s*:\s*' + _STRING),
}
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')


def name_span(body: bytes, key: bytes = b"model_name") -> tuple[int, int] | None:
    """Where the value of the top-level string member `key` stands in a JSON object, without its quotes; None if there is none.

    Runtimes write it first or behind `id`, which one regular expression finds; otherwise the text is walked. The first
    textual occurrence would not do: `id` and the tensors hold the caller's own text.
    """
    match = _LEADING_NAME[key].match(body)
    if match is not None:
        return match.span(2)
    return _walk(body, b'"' + key + b'"')


def _walk(body: bytes, quoted: bytes) -> tuple[int, int] | None:
    depth = 0
    at_key = False
    wanted = False
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            at_key = depth == 1 and token == b"{"
            wanted = False
        elif token in (b"}", b"]"):
            depth -= 1
        elif depth == 1:
            if token == b",":
                at_key, wanted = True, False
            elif token == b":":
                at_key = False
            elif at_key:
                wanted = token == quoted
            elif wanted and token.startswith(b'"'):
                return match.start() + 1, match.end() - 1
    return None


_UNKNOWN_MODEL = re.compile(rb'\s*\{\s*"error"\s*:\s*"Request for unknown model:')


def is_unknown_model(body: bytes) -> bool:
    """Whether a runtime's error says that it does not have the model: the gateway's route is at fault, not the request."""
    return _UNKNOWN_MODEL.match(body) is not None


HARMLESS: Final = 2_000
"""Brackets that a body may have, and so bytes, before anybody asks how deep they nest. Triton's parser recurses: some 30,000 levels
overflow its stack, and that is the end of the process and of every model in it."""

MAX_DEPTH: Final = 64
"""Levels of JSON in a longer body; a tensor has few dimensions."""

MAX_DIMENSIONS: Final = 64
"""Sizes in a tensor's shape. Their product is a number of as many digits as they have together, and takes as long."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_LISTS = bytes.maketrans(b"{}", b"[]")
_STEP = [0] * 256
_STEP[ord("[")], _STEP[ord("]")] = 1, -1


def too_deep(body: bytes) -> bool:
    """Whether the JSON is nested so deep that it could be the end of the runtime that reads it; it need not be well formed.

    Up to its first mistake, where a parser ends as well, the text is read as JSON. Takes some 50 ns per bracket.
    """
    if body.count(b"[") + body.count(b"{") <= HARMLESS:
        return False
    texts_begin_and_end = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(texts_begin_and_end.split(b'"')[::2]).translate(_AS_LISTS, _NO_BRACKETS)
    return b"[" * (MAX_DEPTH + 1) in brackets or max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH


FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
_INTEGERS = {f"INT{bits}": range(-(1 << bits - 1), 1 << bits - 1) for bits in (8, 16, 32, 64)}
_INTEGERS |= {f"UINT{bits}": range(1 << bits) for bits in (8, 16, 32, 64)}


_LARGEST = sys.float_info.max


def fault(body: bytes) -> str | None:
    """What is wrong with the JSON of an inference request in itself, in a sentence, or None when it is well formed.

    Asked only after a runtime failed: Triton answers 500 where the request is to blame (text that is not JSON, null in a
    numeric tensor, a parameter of the wrong type), and that must count against the caller, not against the arm.
    """
    try:
        request = json.loads(body, parse_float=_float, parse_int=_int)
        if b"\\u" in body:
            json.dumps(request, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a text holds half a surrogate pair"
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if not isinstance(request, dict):
        return "the body is not a JSON object"
    if not isinstance(request.get("id", ""), str) or not isinstance(request.get("parameters", {}), dict):
        return "id is not a text, or parameters is not an object"
    inputs, outputs = request.get("inputs"), request.get("outputs", [])
    if not isinstance(inputs, list) or not inputs:
        return "inputs is not a list of tensors"
    if not isinstance(outputs, list) or not all(_is_named(output) for output in outputs):
        return "outputs is not a list of named tensors"
    for parameters in (request.get("parameters", {}), *(output.get("parameters", {}) for output in outputs)):
        if (wrong := _parameters_fault(parameters)) is not None:
            return wrong
    return next((wrong for tensor in inputs if (wrong := _tensor_fault(tensor)) is not None), None)


def _float(text: str) -> float:
    value = float(text)
    if abs(value) > _LARGEST:
        raise ValueError("the number is larger than any float")
    return value


def _int(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST:
        raise ValueError("the number is larger than any float")
    return value


_UNSIGNED = ("priority", "timeout", "classification", "binary_data_size")
_BOOLEAN = ("sequence_start", "sequence_end", "binary_data", "binary_data_output")


def _parameters_fault(parameters: dict[str, Any]) -> str | None:
    """What is wrong with those parameters that Triton gives a meaning; with another type it answers 500, and 404 to shared memory."""
    for name, value in parameters.items():
        if name.startswith("shared_memory_"):
            return "shared memory is not spoken here"
        whole = type(value) is int and 0 <= value < 1 << 64
        if name in _UNSIGNED and not whole:
            return f"the parameter {name} is not a whole number from 0"
        if name in _BOOLEAN and type(value) is not bool:
            return f"the parameter {name} is not true or false"
        if name == "sequence_id" and not whole and type(value) is not str:
            return "the parameter sequence_id is neither a text nor a whole number from 0"
    return None


def _is_named(tensor: Any) -> bool:
    return isinstance(tensor, dict) and isinstance(tensor.get("name"), str) and isinstance(tensor.get("parameters", {}), dict)


def _tensor_fault(tensor: Any) -> str | None:
    if not _is_named(tensor):
        return "an input has no name, or its parameters are not an object"
    name, shape, datatype = tensor["name"], tensor.get("shape"), tensor.get("datatype")
    if not isinstance(datatype, str):
        return f"input {name!r} has no datatype"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        return f"the shape of input {name!r} is not a list of sizes"
    if len(shape) > MAX_DIMENSIONS:
        return f"input {name!r} has more than {MAX_DIMENSIONS} dimensions"
    parameters = tensor.get("parameters", {})
    if (wrong := _parameters_fault(parameters)) is not None:
        return wrong
    if "binary_data_size" in parameters:
        return None
    data = tensor.get("data")
    if not isinstance(data, list):
        return f"input {name!r} has no data"
    elements = flatten(data)
    if len(elements) != math.prod(shape):
        return f"input {name!r} has {len(elements)} elements, its shape asks for another number"
    if datatype in FLOATS:
        right = all(type(element) in (int, float) for element in elements)
    elif datatype in _INTEGERS:
        right = all(type(element) is int and element in _INTEGERS[datatype] for element in elements)
    elif datatype == "BOOL":
        right = all(type(element) in (bool, int) for element in elements)
    elif datatype == "BYTES":
        right = all(type(element) is str for element in elements)
    else:
        return f"input {name!r} has the unknown datatype {datatype!r}"
    return None if right else f"input {name!r} has elements that are not {datatype}"


def flatten(data: list[Any]) -> list[Any]:
    """The elements of a tensor, row by row; V2 allows nested and flat lists alike."""
    if not any(isinstance(element, list) for element in data):
        return data
    flat: list[Any] = []
    stack = [iter(data)]
    while stack:
        for element in stack[-1]:
            if isinstance(element, list):
                stack.append(iter(element))
                break
            flat.append(element)
        else:
            stack.pop()
    return flat
