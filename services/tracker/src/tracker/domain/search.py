"""What a search asks for, what it finds, and tokens of the place in its order after which the next page begins."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tracker.domain.errors import Problem, Rejected
from tracker.domain.filters import EVERYTHING, Filter, Kind, OrderBy, Vocabulary
from tracker.domain.run import INT64, Experiment

Place = tuple[str | int | float | None, ...]
"""The values of a row by which a search is ordered, the last of them making it the only one; None is a missing value."""

MAX_TOKEN = 100_000
"""Characters of a page token: it holds what the last row is ordered by, and that may be a few long params."""


@dataclass(frozen=True, slots=True)
class Query:
    """Things of these lifecycle stages that pass the filter, in an order; runs of these experiments.

    Missing values come last, NaN before them, whatever the direction. Runs that are equal come newest first, then by id.
    """

    stages: tuple[str, ...]
    condition: Filter = EVERYTHING
    order: tuple[OrderBy, ...] = ()
    experiments: tuple[int, ...] = ()


@dataclass(slots=True)
class FoundRun:
    """A run that was found, as JSON of MLflow's wire: a page of 1,000 has some megabytes, and nobody on the way looks into them."""

    place: Place
    json: str


@dataclass(frozen=True, slots=True)
class FoundExperiment:
    experiment: Experiment
    place: Place


def page_token(search: object, place: Place) -> str:
    """A token that only a search of the same repr takes. It holds nothing that its owner may not know, so it is not signed."""
    return base64.urlsafe_b64encode(json.dumps([_mark(search), *place]).encode()).decode()


def page_place(search: object, token: str, kinds: Sequence[type]) -> Place | None:
    """The place that a token stands for; None for "". `kinds` are its values' types. Raises Rejected for a token of another search."""
    if not token:
        return None
    try:
        mark, *place = json.loads(base64.b64decode(token[:MAX_TOKEN].encode(), b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise _foreign() from None
    fits = len(place) == len(kinds) and all(map(_is_of, place, kinds))
    if mark != _mark(search) or not fits:
        raise _foreign()
    return tuple(place)


def kinds_of(order: Sequence[OrderBy], words: Vocabulary) -> list[type]:
    """The types of the values that an order goes by."""
    return [
        float if one.kind is Kind.METRIC else int if one.kind is Kind.ATTRIBUTE and words.attributes[one.key].numeric else str
        for one in order
    ]


def _mark(search: object) -> str:
    return hashlib.sha256(repr(search).encode()).hexdigest()[:24]


def _is_of(value: object, kind: type) -> bool:
    if value is None:
        return True
    if isinstance(value, str):
        return kind is str and "\x00" not in value
    if isinstance(value, bool):
        return False
    return isinstance(value, kind) and (not isinstance(value, int) or value in INT64)


def _foreign() -> Rejected:
    return Rejected([Problem("page_token", "Invalid page token: it was not given by this search with the same filter and order")])
