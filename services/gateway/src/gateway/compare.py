"""Compares a shadow arm's answer with the one the caller got: same outputs, every element within the tolerance."""

from __future__ import annotations

import json
from typing import Any

from gateway.kv2 import FLOATS, flatten, name_span


class Incomparable(Exception):
    """An answer that cannot be read as V2 JSON tensors (binary outputs among them)."""


def differs(primary: bytes, shadow: bytes, tolerance: float) -> bool:
    """Whether two V2 JSON answers differ.

    Floating-point outputs are compared element by element, |a - b| > tolerance being a difference (a NaN on one side only is
    one too). Outputs of other types are compared, exactly, only when neither answer has a floating-point output: a label
    that flips because a probability crossed its threshold is no difference beyond the probability's own. A missing output
    or another number of elements is a difference, and so is a shadow's answer without readable tensors. Raises Incomparable when the
    primary answer has none.
    """
    if _same_text(primary, shadow):
        return False
    left = _outputs(primary)
    try:
        right = _outputs(shadow)
    except Incomparable:
        return True
    if left.keys() != right.keys():
        return True
    floating = [name for name in left if left[name][0] in FLOATS or right[name][0] in FLOATS]
    for name in floating:
        if _apart(left[name][1], right[name][1], tolerance):
            return True
    return not floating and any(left[name][1] != right[name][1] for name in left)


def _same_text(primary: bytes, shadow: bytes) -> bool:
    """Equal bytes behind the model's name: most answers of equal models, and no JSON needs to be read."""
    left, right = name_span(primary), name_span(shadow)
    return left is not None and right is not None and primary[left[1] :] == shadow[right[1] :]


def _apart(left: list[Any], right: list[Any], tolerance: float) -> bool:
    if len(left) != len(right):
        return True
    for a, b in zip(left, right, strict=True):
        if type(a) not in (int, float) or type(b) not in (int, float):
            if a != b:
                return True
        elif a != b and not abs(a - b) <= tolerance and not (a != a and b != b):
            return True
    return False


def _outputs(body: bytes) -> dict[str, tuple[str, list[Any]]]:
    try:
        outputs = json.loads(body)["outputs"]
        return {output["name"]: (output["datatype"], flatten(output["data"])) for output in outputs}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Incomparable("the answer has no JSON tensors") from error


def first_row_value(request: bytes, name: str) -> str | None:
    """The first element of the request's input `name` as text, by which a shadow's sampling rule decides; None if there is none.

    A number is written as JSON writes it, so that the rule's values 1 and 0.5 match the elements 1 and 0.5.
    """
    try:
        for tensor in json.loads(request)["inputs"]:
            if tensor["name"] == name:
                value = flatten(tensor["data"])[0]
                return value if isinstance(value, str) else json.dumps(value)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return None
