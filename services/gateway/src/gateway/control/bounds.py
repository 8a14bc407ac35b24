"""Lists and objects in the bodies of the control-plane API: bounded, and refused at the first wrong entry.

Pydantic would describe every wrong entry, and a body of some megabytes holds a million of them. What a service takes of each
is its own rule, and smaller.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, FailFast, Field

MOST = 10_000

T = TypeVar("T")


def _texts(value: Any) -> Any:
    if isinstance(value, dict) and not all(type(entry) is str for entry in value.values()):
        raise ValueError("every value must be a text")
    return value


Listed = Annotated[list[T], Field(max_length=MOST), FailFast()]
Texts = Annotated[dict[str, str], BeforeValidator(_texts), Field(max_length=MOST)]
