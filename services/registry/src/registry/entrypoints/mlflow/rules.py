"""Who may call what of MLflow's API in the registry, and the shapes that its requests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from servicekit.access import EVERY_ROLE, Rule
from servicekit.errors import Invalid

READ = Rule({"gateway"}, EVERY_ROLE)
CHANGE = Rule({"gateway"}, {"editor", "approver", "admin"})
REGISTER = Rule({"gateway"}, {"editor", "approver", "admin"}, runs=True)
"""A training script registers what it has trained with the token of its run; of which run is held by the use case."""


class Tag(msgspec.Struct):
    """A tag in a request that makes something."""

    key: str = ""
    value: str | None = None


def tags_of(tags: Sequence[Tag] | None) -> Mapping[str, str]:
    """The last of a key counts, as with MLflow."""
    return {tag.key: tag.value or "" for tag in tags or ()}


def required(**given: str | None) -> None:
    """Raises Invalid for the first that is missing or empty."""
    for name, value in given.items():
        if not value:
            raise Invalid(f"Missing value for required parameter '{name}'.")


def version_number(text: str) -> int:
    """A version's number, which the wire has as a text. Raises Invalid."""
    required(version=text)
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise Invalid(f"Parameter 'version' must be an integer, got '{text[:50]}'.")
    return int(text)
