"""The section `evaluate` of a delivery: what a candidate is judged by.

Reads a section, names everything that is wrong with it, and says what is looser than in the one before. The grammar of a
requirement is in docs/evaluation.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from servicekit.errors import Invalid, Violation

from evaluator.domain.statistics import METRICS

Kind = Literal["metric", "calibration", "parity", "latency"]

DEFAULT_LABEL = "label"
DEFAULT_CALIBRATION = 0.1
"""Expected calibration error that `calibration` alone allows."""

DEFAULT_PARITY = 1e-4
"""Largest absolute difference of an output element that `parity` alone allows."""

LATENCIES = ("latency_p50_ms", "latency_p99_ms")


@dataclass(frozen=True, slots=True)
class Holdout:
    """The frozen rows that models are compared on, and which column is the answer."""

    dataset: str
    version: int
    label: str = DEFAULT_LABEL


@dataclass(frozen=True, slots=True)
class Against:
    """How a challenger is compared with the champion: it may be worse by at most `margin`, with confidence."""

    metric: str
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Requirement:
    """One absolute gate. `at_least`: the value may not be below the limit; else it may not be above it (a latency: not reach it)."""

    text: str
    name: str
    kind: Kind
    limit: float
    at_least: bool = False

    def met_by(self, value: float) -> bool:
        """False for a value that is not a number."""
        if self.kind == "latency":
            return value < self.limit
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True)
class Policy:
    """A valid section."""

    experiment: str
    holdout: Holdout
    against: Against
    require: tuple[Requirement, ...] = ()


class _Reader:
    """Takes a section apart and collects everything that is wrong, each with the path of its field."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def wrong(self, field: str, message: str) -> None:
        self.violations.append(Violation(field, message))

    def mapping(self, value: object, field: str, known: tuple[str, ...]) -> Mapping[str, object]:
        if not isinstance(value, Mapping):
            self.wrong(field, "must be a mapping" if value is not None else "is missing")
            return {}
        for key in value:
            if key not in known:
                self.wrong(f"{field}.{key}", f"is not known here; there is {', '.join(known)}")
        return value

    def text(self, section: Mapping[str, object], field: str, key: str, default: str | None = None) -> str:
        value = section.get(key, default)
        if isinstance(value, str) and value.strip():
            return value.strip()
        self.wrong(f"{field}.{key}", "is missing" if value is None else "must be a text that is not empty")
        return ""

    def number(self, value: object, field: str, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            self.wrong(field, f"must be a number from {low:g} to {high:g}")
            return 0.0
        return float(value)


def parse(section: object) -> Policy:
    """The policy that a section (parsed JSON) states. Raises Invalid with a violation for everything that is wrong with it."""
    reader = _Reader()
    policy = _policy(reader, section)
    if reader.violations:
        raise Invalid("the section evaluate is not valid", reader.violations)
    return policy


def violations(section: object) -> list[Violation]:
    """Everything that is wrong with a section; empty: it is valid."""
    reader = _Reader()
    _policy(reader, section)
    return reader.violations


def loosened(before: Policy, after: Policy) -> list[str]:
    """The fields in which `after` lets through what `before` did not: other rows, another metric, a larger margin, a weaker requirement."""
    fields = []
    if after.holdout != before.holdout:
        fields.append("evaluate.holdout")
    if after.against.metric != before.against.metric:
        fields.append("evaluate.metric.name")
    elif after.against.margin > before.against.margin:
        fields.append("evaluate.metric.margin")
    now = {(one.kind, one.name): (i, one) for i, one in enumerate(after.require)}
    for old in before.require:
        found = now.get((old.kind, old.name))
        if found is None:
            fields.append("evaluate.require")
        elif (found[1].limit < old.limit) if old.at_least else (found[1].limit > old.limit):
            fields.append(f"evaluate.require[{found[0]}]")
    return list(dict.fromkeys(fields))


def _policy(reader: _Reader, value: object) -> Policy:
    section = reader.mapping(value, "evaluate", ("experiment", "holdout", "metric", "require"))
    experiment = reader.text(section, "evaluate", "experiment") if section else ""
    return Policy(experiment, _holdout(reader, section.get("holdout")), _against(reader, section.get("metric")), _require(reader, section))


def _holdout(reader: _Reader, value: object) -> Holdout:
    field = "evaluate.holdout"
    section = reader.mapping(value, field, ("dataset", "version", "label"))
    if not section:
        return Holdout("", 0)
    version = section.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        reader.wrong(f"{field}.version", "must be the number of a version, from 1: a holdout is frozen")
        version = 0
    return Holdout(reader.text(section, field, "dataset"), version, reader.text(section, field, "label", DEFAULT_LABEL))


def _against(reader: _Reader, value: object) -> Against:
    field = "evaluate.metric"
    section = reader.mapping(value, field, ("name", "goal", "margin"))
    if not section:
        return Against("auc")
    name = reader.text(section, field, "name")
    if name and name not in METRICS:
        reader.wrong(f"{field}.name", f"is not a metric; there is {', '.join(METRICS)}")
    elif name and section.get("goal", METRICS[name].goal) != METRICS[name].goal:
        reader.wrong(f"{field}.goal", f"of {name} can only be {METRICS[name].goal}")
    return Against(name, reader.number(section.get("margin", 0.0), f"{field}.margin", -1, 1))


def _require(reader: _Reader, section: Mapping[str, object]) -> tuple[Requirement, ...]:
    value = section.get("require", [])
    if not isinstance(value, list):
        reader.wrong("evaluate.require", "must be a list")
        return ()
    found: dict[tuple[str, str], Requirement] = {}
    for i, text in enumerate(value):
        field = f"evaluate.require[{i}]"
        requirement = _requirement(text)
        if isinstance(requirement, str):
            reader.wrong(field, requirement)
        elif (requirement.kind, requirement.name) in found:
            reader.wrong(field, f"{requirement.name} is required twice")
        else:
            found[requirement.kind, requirement.name] = requirement
    return tuple(found.values())


_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
_METRIC = re.compile(rf"(\w+)\.(at_least|at_most)\s+{_NUMBER}")
_EXAMPLES = "`auc.at_least 0.6`, `calibration`, `calibration.at_most 0.05`, `parity`, `latency_p99_ms < 20`"
_BELOW = re.compile(rf"(\w+)\s*<\s*{_NUMBER}")


def _requirement(text: object) -> Requirement | str:
    """The requirement, or what is wrong with it."""
    if not isinstance(text, str):
        return "must be a text such as `auc.at_least 0.6`"
    text = " ".join(text.split())
    if text == "calibration":
        return Requirement(text, text, "calibration", DEFAULT_CALIBRATION)
    if text == "parity":
        return Requirement(text, text, "parity", DEFAULT_PARITY)
    if match := _METRIC.fullmatch(text):
        return _bounded(text, match[1], match[2], float(match[3]))
    if match := _BELOW.fullmatch(text):
        if match[1] not in LATENCIES:
            return f"{match[1]} cannot be compared with `<`; there is {', '.join(LATENCIES)}"
        return Requirement(text, match[1], "latency", float(match[2]))
    return f"is not a requirement: {text!r}; write one like {_EXAMPLES}"


def _bounded(text: str, name: str, bound: str, limit: float) -> Requirement | str:
    if name in ("calibration", "parity"):
        if bound == "at_least":
            return f"{name} is better the lower it is: write {name}.at_most"
        return Requirement(text, name, name, limit)  # type: ignore[arg-type]  # the names of these two are their kinds
    metric = METRICS.get(name)
    if metric is None:
        return f"{name} is not a metric; there is {', '.join([*METRICS, 'calibration', 'parity'])}"
    right = "at_least" if metric.goal == "maximize" else "at_most"
    if bound != right:
        return f"{name} is to {metric.goal}: write {name}.{right}"
    return Requirement(text, name, "metric", limit, at_least=right == "at_least")
