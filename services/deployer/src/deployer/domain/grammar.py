"""The small values of a serve section: percentages, durations, names, what a guard calls bad. A reader raises Fault with a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet

FULL = 10_000
"""All traffic, in basis points."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PERCENT = re.compile(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_LATENCY = re.compile(r"\s*latency_ms\s*>\s*(\d+(?:\.\d+)?)\s*")
_TOLERANCE = re.compile(r"\s*tolerance\(\s*(\d+(?:\.\d+)?(?:[eE]-?\d+)?)\s*\)\s*")


class Fault(Exception):
    """The value cannot be read; the message completes a sentence about the field."""


def kind_of(value: object) -> str:
    """What a user would call this value."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "fields"
    if isinstance(value, list):
        return "a list"
    return repr(value)


def name(value: object) -> str:
    """A name fit for a URL: 1 to 63 lower-case letters, digits and inner hyphens."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise Fault(f"expected 1 to 63 lower-case letters, digits and inner hyphens, found {kind_of(value)}")
    return value


def text(value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise Fault(f"expected a text that is not empty, found {kind_of(value)}")
    return value


def scalar(value: object) -> str:
    """A text or a number, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Fault(f"expected a text or a number, found {kind_of(value)}")
    return str(value)


def one_of(choices: AbstractSet[str]) -> Callable[[object], str]:
    """A reader for one of the given words."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Fault(f"expected one of {', '.join(sorted(choices))}, found {kind_of(value)}")
        return value

    return read


def count(value: object) -> int:
    """A whole number from 1 to 1,000,000,000."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000_000:
        raise Fault(f"expected a whole number from 1 on, found {kind_of(value)}")
    return value


def rate(value: object) -> float:
    """A share of 1: `2%`, or a number from 0 to 1."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        found = float(match[1]) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    else:
        raise Fault(f"expected a percentage such as 2%, found {kind_of(value)}")
    if not 0 <= found <= 1:
        raise Fault(f"expected 0% to 100% (or 0 to 1), found {kind_of(value)}")
    return found


def share(value: object) -> int:
    """A share of the traffic in basis points: whole hundredths of a percent."""
    points = rate(value) * FULL
    if not math.isclose(points, round(points), abs_tol=1e-6):
        raise Fault(f"expected whole hundredths of a percent, found {kind_of(value)}")
    return round(points)


def percent(points: int) -> str:
    """Basis points as people write them: 500 -> `5 %`."""
    return f"{points / 100:g} %"


def duration(least: float, most: float) -> Callable[[object], float]:
    """A reader for a duration with its unit (`250ms`, `1s`, `30m`, `24h`, `7d`), in seconds, between two bounds."""

    def read(value: object) -> float:
        match = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise Fault(f"expected a duration with its unit, such as 250ms, 1s or 24h, found {kind_of(value)}")
        seconds = float(match[1]) * _UNITS[match[2]]
        if not least <= seconds <= most:
            raise Fault(f"expected {least:g} s to {most:g} s, found {kind_of(value)}")
        return seconds

    return read


def tolerance(value: object) -> float:
    """`tolerance(0.2)`: the largest absolute difference of an output element that counts as the same."""
    match = _TOLERANCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise Fault(f"expected tolerance(number), found {kind_of(value)}")
    return float(match[1])


def bad_request(value: object) -> str:
    """What a guard calls bad: `error`, `shadow_difference`, or the number of milliseconds of `latency_ms > N` as text."""
    if value in ("error", "shadow_difference"):
        return str(value)
    match = _LATENCY.fullmatch(value) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise Fault(f"expected error, latency_ms > N or shadow_difference, found {kind_of(value)}")
    return f"{float(match[1]):.10g}"
