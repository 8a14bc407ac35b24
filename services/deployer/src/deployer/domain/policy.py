"""The `serve` section of a delivery: how a version gets onto an endpoint. Parses the section and names every field that is wrong.

Paths of fields are relative to the section (`rollout.steps[1].weight`); docs/rollouts.md tells the grammar to users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from deployer.domain import grammar
from deployer.domain.errors import PolicyInvalid, Problem
from deployer.domain.grammar import FULL, Fault

LARGEST_STEP = FULL // 2
"""Largest share of a canary step: the test for harm holds while the canary is the smaller arm (statistics.harm_payoff)."""

DEFAULT_TOLERANCE = 0.001
"""Largest absolute difference of an output that counts as the same when a delivery names none."""

MOST_GUARDS = 8
MOST_STEPS = 20

_Value = TypeVar("_Value")


class GuardKind(StrEnum):
    """What makes a request bad."""

    ERROR = "error"
    LATENCY = "latency"
    SHADOW_DIFFERENCE = "shadow_difference"


class Assign(StrEnum):
    """How a request is given to an arm: each at random, or the same caller always to the same arm."""

    REQUEST = "request"
    CALLER = "caller"


class OnDeadline(StrEnum):
    """What happens to a rollout that has not ended at its deadline."""

    HOLD = "hold"
    ABORT = "abort"


@dataclass(frozen=True)
class Guard:
    """A rate of bad requests. `margin` bounds what the canary may be worse by; `at_most` bounds the rate itself. Rates are shares of 1."""

    id: str
    kind: GuardKind
    limit_ms: float = 0.0
    margin: float | None = None
    at_most: float | None = None
    tolerance: float = DEFAULT_TOLERANCE


@dataclass(frozen=True)
class Step:
    """One stage of the canary: its share in basis points, and what must have been seen before the next."""

    weight: int
    requests: int
    seconds: float = 0.0


@dataclass(frozen=True)
class ShadowRule:
    """Which requests are copied to the new version before it gets traffic, and how many comparisons end the stage."""

    share: int
    requests: int
    only_input: str = ""
    only_values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """A valid serve section. Durations are seconds unless named otherwise."""

    endpoint: str
    runtime: str
    assign: Assign
    window_ms: int
    shadow: ShadowRule | None
    steps: tuple[Step, ...]
    guards: tuple[Guard, ...]
    deadline_s: float
    on_deadline: OnDeadline
    rollback_window_s: float
    timeout_ms: int

    @property
    def tolerance(self) -> float:
        """Tolerance by which shadow answers are compared, guarded or not."""
        return next((g.tolerance for g in self.guards if g.kind is GuardKind.SHADOW_DIFFERENCE), DEFAULT_TOLERANCE)

    @property
    def compared(self) -> tuple[Guard, ...]:
        """The guards that compare canary and baseline over the same windows."""
        return tuple(g for g in self.guards if g.kind is not GuardKind.SHADOW_DIFFERENCE)


DEFAULT_STEPS: tuple[dict[str, object], ...] = (
    {"weight": "5%", "requests": 200},
    {"weight": "25%", "requests": 500},
    {"weight": "50%", "requests": 1000},
)
DEFAULT_GUARDS: tuple[dict[str, object], ...] = ({"bad": "error", "margin": "2%", "at_most": "5%"},)


def parse(section: object, runtimes: frozenset[str] = frozenset({"triton"})) -> Policy:
    """Read a serve section (the mapping that its YAML or JSON holds).

    `runtimes` are those that this deployer is configured for. Raises PolicyInvalid with every problem found.
    """
    reader = _Reader()
    policy = reader.serve(section, runtimes)
    if reader.problems or policy is None:
        raise PolicyInvalid(tuple(reader.problems))
    return policy


def loosened(before: Policy, after: Policy) -> tuple[str, ...]:
    """The fields of `after` in which a guard asks for less than in `before`, as paths relative to the section.

    A guard that is gone counts, as do a larger margin, a larger or absent at_most, a larger tolerance and a longer latency limit.
    """
    found: list[str] = []
    unmatched = list(enumerate(after.guards))
    for old in sorted(before.guards, key=lambda g: g.limit_ms):
        same_kind = [(index, new) for index, new in unmatched if new.kind is old.kind]
        match = next(((i, g) for i, g in same_kind if g.id == old.id), None) or min(same_kind, key=lambda p: p[1].limit_ms, default=None)
        if match is None:
            found.append("rollout.guards")
            continue
        unmatched.remove(match)
        index, new = match
        path = f"rollout.guards[{index}]"
        if new.limit_ms > old.limit_ms:
            found.append(f"{path}.bad")
        if old.margin is not None and (new.margin is None or new.margin > old.margin):
            found.append(f"{path}.margin")
        if old.at_most is not None and (new.at_most is None or new.at_most > old.at_most):
            found.append(f"{path}.at_most")
        if new.tolerance > old.tolerance:
            found.append(f"{path}.compare")
    return tuple(dict.fromkeys(found))


class _Reader:
    """Walks the section, collects problems instead of stopping at the first, and puts a harmless value where one is wrong."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def wrong(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message))

    def value(
        self, node: Mapping[str, Any], path: str, key: str, read: Callable[[object], _Value], default: _Value | None = None
    ) -> _Value | None:
        """Read one field; a missing one without default, and a wrong one, are problems and read as None."""
        where = f"{path}.{key}" if path else key
        if key not in node or node[key] is None:
            if default is None:
                self.wrong(where, "is missing")
            return default
        try:
            return read(node[key])
        except Fault as fault:
            self.wrong(where, str(fault))
            return None

    def mapping(self, value: object, path: str, keys: frozenset[str]) -> Mapping[str, Any] | None:
        if not isinstance(value, Mapping):
            self.wrong(path, f"expected fields ({', '.join(sorted(keys))}), found {grammar.kind_of(value)}")
            return None
        for key in value:
            if key not in keys:
                self.wrong(f"{path}.{key}" if path else str(key), f"is not known here; known: {', '.join(sorted(keys))}")
        return value

    def sequence(self, node: Mapping[str, Any], path: str, key: str, default: tuple[dict[str, object], ...], most: int) -> list[object]:
        value = node.get(key)
        if value is None:
            return list(default)
        if not isinstance(value, list):
            self.wrong(f"{path}.{key}", f"expected a list, found {grammar.kind_of(value)}")
            return []
        if not value:
            self.wrong(f"{path}.{key}", "must not be empty")
        if len(value) > most:
            self.wrong(f"{path}.{key}", f"has {len(value)} entries, the most is {most}")
            return []
        return list(value)

    def serve(self, section: object, runtimes: frozenset[str]) -> Policy | None:
        node = self.mapping(section, "", frozenset({"endpoint", "runtime", "assign", "timeout", "rollout"}))
        if node is None:
            return None
        endpoint = self.value(node, "", "endpoint", grammar.name)
        runtime = self.value(node, "", "runtime", grammar.one_of(runtimes), "triton" if "triton" in runtimes else None)
        assign = self.value(node, "", "assign", grammar.one_of({a.value for a in Assign}), Assign.REQUEST.value)
        timeout = self.value(node, "", "timeout", grammar.duration(0.001, 600), 5.0)
        rollout = self.mapping(
            {} if node.get("rollout") is None else node["rollout"],
            "rollout",
            frozenset({"window", "shadow", "steps", "guards", "deadline", "on_deadline", "rollback_window"}),
        )
        if rollout is None:
            return None
        path = "rollout"
        window = self.value(rollout, path, "window", grammar.duration(0.05, 60), 1.0)
        deadline = self.value(rollout, path, "deadline", grammar.duration(1, 90 * 86_400), 86_400.0)
        on_deadline = self.value(rollout, path, "on_deadline", grammar.one_of({d.value for d in OnDeadline}), OnDeadline.HOLD.value)
        rollback = self.value(rollout, path, "rollback_window", grammar.duration(0, 30 * 86_400), 3_600.0)
        shadow = self.shadow(rollout.get("shadow"))
        steps = self.steps(rollout)
        guards = self.guards(rollout, has_shadow=rollout.get("shadow") is not None)
        if None in (endpoint, runtime, assign, timeout, window, deadline, on_deadline, rollback):
            return None
        return Policy(
            endpoint=str(endpoint),
            runtime=str(runtime),
            assign=Assign(str(assign)),
            window_ms=round((window or 0) * 1000),
            shadow=shadow,
            steps=steps,
            guards=guards,
            deadline_s=deadline or 0.0,
            on_deadline=OnDeadline(str(on_deadline)),
            rollback_window_s=rollback or 0.0,
            timeout_ms=max(1, round((timeout or 0) * 1000)),
        )

    def shadow(self, value: object) -> ShadowRule | None:
        if value is None:
            return None
        path = "rollout.shadow"
        node = self.mapping(value, path, frozenset({"share", "requests", "only"}))
        if node is None:
            return None
        share = self.value(node, path, "share", grammar.share, FULL)
        requests = self.value(node, path, "requests", grammar.count)
        only_input = ""
        only_values: tuple[str, ...] = ()
        if node.get("only") is not None:
            only_input, only_values = self.only(node["only"])
        if share == 0:
            self.wrong(f"{path}.share", "must be more than 0; leave `shadow` out to have no shadow stage")
        return ShadowRule(share or 0, requests or 1, only_input, only_values)

    def only(self, value: object) -> tuple[str, tuple[str, ...]]:
        path = "rollout.shadow.only"
        node = self.mapping(value, path, frozenset({"input", "values"}))
        if node is None:
            return "", ()
        chosen = self.value(node, path, "input", grammar.text) or ""
        values = node.get("values")
        if not isinstance(values, list) or not values:
            self.wrong(f"{path}.values", "expected a list of values that is not empty")
            return chosen, ()
        read: list[str] = []
        for index, item in enumerate(values):
            try:
                read.append(grammar.scalar(item))
            except Fault as fault:
                self.wrong(f"{path}.values[{index}]", str(fault))
        return chosen, tuple(read)

    def steps(self, rollout: Mapping[str, Any]) -> tuple[Step, ...]:
        steps: list[Step] = []
        for index, item in enumerate(self.sequence(rollout, "rollout", "steps", DEFAULT_STEPS, MOST_STEPS)):
            path = f"rollout.steps[{index}]"
            node = self.mapping(item, path, frozenset({"weight", "requests", "time"}))
            if node is None:
                continue
            weight = self.value(node, path, "weight", grammar.share)
            requests = self.value(node, path, "requests", grammar.count)
            seconds = self.value(node, path, "time", grammar.duration(0, 30 * 86_400), 0.0)
            if weight is None or requests is None or seconds is None:
                continue
            if not 0 < weight <= LARGEST_STEP:
                self.wrong(f"{path}.weight", "must be more than 0 % and at most 50 %: the canary must be the smaller arm to be compared")
            elif steps and weight <= steps[-1].weight:
                self.wrong(f"{path}.weight", f"must be more than the step before it ({grammar.percent(steps[-1].weight)})")
            else:
                steps.append(Step(weight, requests, seconds))
        return tuple(steps)

    def guards(self, rollout: Mapping[str, Any], has_shadow: bool) -> tuple[Guard, ...]:
        guards: list[Guard] = []
        listed = self.sequence(rollout, "rollout", "guards", DEFAULT_GUARDS, MOST_GUARDS)
        for index, item in enumerate(listed):
            path = f"rollout.guards[{index}]"
            node = self.mapping(item, path, frozenset({"bad", "margin", "at_most", "compare"}))
            if node is None:
                continue
            guard = self.guard(node, path, has_shadow)
            if guard is None:
                continue
            if any(other.id == guard.id for other in guards):
                self.wrong(f"{path}.bad", f"{guard.id} is guarded already")
            else:
                guards.append(guard)
        if guards and len(guards) == len(listed) and all(g.kind is GuardKind.SHADOW_DIFFERENCE for g in guards):
            self.wrong("rollout.guards", "at least one guard must compare canary and baseline: `error` or `latency_ms > N`")
        return tuple(guards)

    def guard(self, node: Mapping[str, Any], path: str, has_shadow: bool) -> Guard | None:
        bad = self.value(node, path, "bad", grammar.bad_request)
        if bad is None:
            return None
        if bad == GuardKind.SHADOW_DIFFERENCE.value:
            return self.shadow_guard(node, path, has_shadow)
        if "compare" in node:
            self.wrong(f"{path}.compare", "is for `shadow_difference` only")
        margin = self.value(node, path, "margin", grammar.rate)
        at_most = self.value(node, path, "at_most", grammar.rate) if node.get("at_most") is not None else None
        if margin == 0.0:
            self.wrong(f"{path}.margin", "must be more than 0: that two rates are exactly equal can never be shown")
        if bad == GuardKind.ERROR.value:
            return Guard(bad, GuardKind.ERROR, margin=margin, at_most=at_most)
        return Guard(f"latency_ms>{bad}", GuardKind.LATENCY, limit_ms=float(bad), margin=margin, at_most=at_most)

    def shadow_guard(self, node: Mapping[str, Any], path: str, has_shadow: bool) -> Guard:
        if not has_shadow:
            self.wrong(f"{path}.bad", "shadow_difference needs `rollout.shadow`: nothing is compared without it")
        if "margin" in node:
            self.wrong(f"{path}.margin", "shadow_difference has no baseline to compare with: use at_most")
        at_most = self.value(node, path, "at_most", grammar.rate)
        tolerance = self.value(node, path, "compare", grammar.tolerance, DEFAULT_TOLERANCE)
        return Guard("shadow_difference", GuardKind.SHADOW_DIFFERENCE, at_most=at_most, tolerance=tolerance or 0.0)
