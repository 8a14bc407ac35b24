"""The serve section of a delivery: what is accepted, and that every wrong field is named by its path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from deployer.domain.errors import PolicyInvalid
from deployer.domain.policy import Assign, GuardKind, OnDeadline, ShadowRule, Step, loosened, parse
from hypothesis import given
from hypothesis import strategies as st

FULL_SECTION: dict[str, Any] = {
    "endpoint": "flight-delays",
    "runtime": "triton",
    "assign": "caller",
    "timeout": "2s",
    "rollout": {
        "window": "250ms",
        "shadow": {"share": 1.0, "requests": 200, "only": {"input": "origin", "values": ["JFK", "LGA"]}},
        "steps": [{"weight": "5%", "requests": 40}, {"weight": "25%", "requests": 100, "time": "10s"}, {"weight": 0.5, "requests": 200}],
        "guards": [
            {"bad": "error", "margin": "5%", "at_most": "10%"},
            {"bad": "latency_ms > 50", "margin": "5%"},
            {"bad": "shadow_difference", "compare": "tolerance(0.3)", "at_most": "30%"},
        ],
        "deadline": "10m",
        "on_deadline": "abort",
        "rollback_window": "30m",
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The full section with one field replaced (removed by `...`)."""
    section = copy.deepcopy(FULL_SECTION)
    node: Any = section
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return section


def test_every_field_is_read() -> None:
    policy = parse(FULL_SECTION)
    assert (policy.endpoint, policy.runtime, policy.assign, policy.timeout_ms) == ("flight-delays", "triton", Assign.CALLER, 2000)
    assert policy.window_ms == 250
    assert policy.shadow == ShadowRule(10_000, 200, "origin", ("JFK", "LGA"))
    assert policy.steps == (Step(500, 40), Step(2500, 100, 10.0), Step(5000, 200))
    error, latency, shadow = policy.guards
    assert (error.id, error.margin, error.at_most) == ("error", 0.05, 0.1)
    assert (latency.id, latency.kind, latency.limit_ms, latency.at_most) == ("latency_ms>50", GuardKind.LATENCY, 50.0, None)
    assert (shadow.kind, shadow.at_most, policy.tolerance) == (GuardKind.SHADOW_DIFFERENCE, 0.3, 0.3)
    assert (policy.deadline_s, policy.on_deadline, policy.rollback_window_s) == (600.0, OnDeadline.ABORT, 1800.0)


def test_an_endpoint_is_enough() -> None:
    policy = parse({"endpoint": "e"})
    assert policy.runtime == "triton"
    assert policy.assign is Assign.REQUEST
    assert policy.shadow is None
    assert [step.weight for step in policy.steps] == [500, 2500, 5000]
    assert [guard.id for guard in policy.guards] == ["error"]
    assert policy.on_deadline is OnDeadline.HOLD


def test_values_of_an_input_may_be_numbers() -> None:
    policy = parse(changed("rollout.shadow.only", {"input": "month", "values": [5]}))
    assert policy.shadow is not None
    assert policy.shadow.only_values == ("5",)


@pytest.mark.parametrize(
    ("path", "value", "field", "says"),
    [
        ("endpoint", ..., "endpoint", "is missing"),
        ("endpoint", "Flight Delays", "endpoint", "lower-case"),
        ("endpoint", None, "endpoint", "is missing"),
        ("runtime", "onnx", "runtime", "expected one of triton"),
        ("assign", 3, "assign", "expected one of caller, request"),
        ("rollouts", {}, "rollouts", "not known here"),
        ("rollout", [], "rollout", "expected fields"),
        ("rollout", "fast", "rollout", "expected fields"),
        ("rollout.speed", 1, "rollout.speed", "not known here; known: deadline"),
        ("rollout.window", "1", "rollout.window", "with its unit"),
        ("rollout.window", "1ms", "rollout.window", "0.05 s to 60 s"),
        ("rollout.window", 1, "rollout.window", "with its unit"),
        ("rollout.shadow", 3, "rollout.shadow", "expected fields"),
        ("rollout.shadow.share", "0%", "rollout.shadow.share", "more than 0"),
        ("rollout.shadow.share", 2, "rollout.shadow.share", "0% to 100%"),
        ("rollout.shadow.requests", 0, "rollout.shadow.requests", "whole number"),
        ("rollout.shadow.requests", True, "rollout.shadow.requests", "whole number"),
        ("rollout.shadow.only", {"input": "origin"}, "rollout.shadow.only.values", "not empty"),
        ("rollout.shadow.only", "JFK", "rollout.shadow.only", "expected fields"),
        ("rollout.shadow.only.values", [], "rollout.shadow.only.values", "not empty"),
        ("rollout.shadow.only.values", ["JFK", {}], "rollout.shadow.only.values[1]", "text or a number"),
        ("rollout.shadow.only.input", "", "rollout.shadow.only.input", "not empty"),
        ("rollout.steps", [], "rollout.steps", "not be empty"),
        ("rollout.steps", {}, "rollout.steps", "expected a list"),
        ("rollout.steps.0", 5, "rollout.steps[0]", "expected fields"),
        ("rollout.steps.1.weight", "5%", "rollout.steps[1].weight", "more than the step before it (5 %)"),
        ("rollout.steps.2.weight", "51%", "rollout.steps[2].weight", "at most 50 %"),
        ("rollout.steps.2.weight", "0.001%", "rollout.steps[2].weight", "hundredths"),
        ("rollout.steps.2.weight", "half", "rollout.steps[2].weight", "percentage"),
        ("rollout.steps.0.weight", ..., "rollout.steps[0].weight", "is missing"),
        ("rollout.steps.0.requests", ..., "rollout.steps[0].requests", "is missing"),
        ("rollout.guards", [], "rollout.guards", "not be empty"),
        ("rollout.guards.0", "error", "rollout.guards[0]", "expected fields"),
        ("rollout.guards.0.bad", "crash", "rollout.guards[0].bad", "expected error"),
        ("rollout.guards.0.bad", "latency_ms > 50.0", "rollout.guards[1].bad", "guarded already"),
        ("rollout.guards.0.margin", ..., "rollout.guards[0].margin", "is missing"),
        ("rollout.guards.0.margin", "0%", "rollout.guards[0].margin", "more than 0"),
        ("rollout.guards.0.at_most", "120%", "rollout.guards[0].at_most", "0% to 100%"),
        ("rollout.guards.0.compare", "tolerance(1)", "rollout.guards[0].compare", "for `shadow_difference` only"),
        ("rollout.guards.1.bad", "latency_ms > 0", "rollout.guards[1].bad", "expected error"),
        ("rollout.guards.2.at_most", ..., "rollout.guards[2].at_most", "is missing"),
        ("rollout.guards.2.margin", "1%", "rollout.guards[2].margin", "no baseline"),
        ("rollout.guards.2.compare", "close", "rollout.guards[2].compare", "tolerance(number)"),
        ("rollout.shadow", ..., "rollout.guards[2].bad", "needs `rollout.shadow`"),
        ("rollout.deadline", "0s", "rollout.deadline", "expected 1 s"),
        ("rollout.on_deadline", "panic", "rollout.on_deadline", "abort, hold"),
        ("rollout.rollback_window", "forever", "rollout.rollback_window", "duration"),
        ("timeout", "11m", "timeout", "0.001 s to 600 s"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: object, field: str, says: str) -> None:
    with pytest.raises(PolicyInvalid) as caught:
        parse(changed(path, value))
    messages = {problem.field: problem.message for problem in caught.value.problems}
    assert says in messages[field], messages


def test_all_problems_are_told_at_once() -> None:
    section = changed("rollout.guards.0.margin", "x")
    section["rollout"]["steps"][0]["requests"] = -1
    section["endpoint"] = 7
    with pytest.raises(PolicyInvalid) as caught:
        parse(section)
    assert {p.field for p in caught.value.problems} == {"endpoint", "rollout.steps[0].requests", "rollout.guards[0].margin"}


def test_a_section_needs_a_guard_that_compares() -> None:
    section = changed("rollout.guards", [FULL_SECTION["rollout"]["guards"][2]])
    with pytest.raises(PolicyInvalid, match="must compare canary and baseline"):
        parse(section)


@pytest.mark.parametrize("listed", ["steps", "guards"])
def test_endless_lists_are_refused(listed: str) -> None:
    section = changed(f"rollout.{listed}", FULL_SECTION["rollout"][listed] * 10)
    with pytest.raises(PolicyInvalid, match="the most is"):
        parse(section)


@pytest.mark.parametrize("section", [None, [], "serve", 3, {}])
def test_a_section_is_fields(section: object) -> None:
    with pytest.raises(PolicyInvalid):
        parse(section)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
paths = st.sampled_from(
    [
        "endpoint",
        "assign",
        "timeout",
        "rollout",
        "rollout.window",
        "rollout.shadow",
        "rollout.shadow.only",
        "rollout.shadow.share",
        "rollout.steps",
        "rollout.steps.0",
        "rollout.steps.1.weight",
        "rollout.guards",
        "rollout.guards.0",
        "rollout.guards.2.compare",
    ]
)


@given(paths, json_values)
def test_whatever_stands_in_a_field_it_is_read_or_refused(path: str, value: object) -> None:
    try:
        policy = parse(changed(path, value))
    except PolicyInvalid as invalid:
        policy, problems = None, invalid.problems
    else:
        problems = ()
    assert all(problem.field and problem.message for problem in problems)
    assert (policy is None) == bool(problems)
    assert policy is None or all(0 < step.weight <= 5000 for step in policy.steps)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("rollout.guards.0.margin", "6%", ("rollout.guards[0].margin",)),
        ("rollout.guards.0.margin", "4%", ()),
        ("rollout.guards.0.at_most", "11%", ("rollout.guards[0].at_most",)),
        ("rollout.guards.0.at_most", ..., ("rollout.guards[0].at_most",)),
        ("rollout.guards.1.bad", "latency_ms > 80", ("rollout.guards[1].bad",)),
        ("rollout.guards.1.bad", "latency_ms > 20", ()),
        ("rollout.guards.1", ..., ("rollout.guards",)),
        ("rollout.guards.2.compare", "tolerance(0.5)", ("rollout.guards[2].compare",)),
        ("rollout.guards.2.at_most", "40%", ("rollout.guards[2].at_most",)),
        ("rollout.steps.0.requests", 1, ()),
    ],
)
def test_a_loosened_guard_is_noticed(path: str, value: object, expected: tuple[str, ...]) -> None:
    assert loosened(parse(FULL_SECTION), parse(changed(path, value))) == expected


def test_nothing_is_loosened_by_guarding_more() -> None:
    more = copy.deepcopy(FULL_SECTION)
    more["rollout"]["guards"].append({"bad": "latency_ms > 500", "margin": "1%"})
    assert loosened(parse(FULL_SECTION), parse(more)) == ()
    assert loosened(parse(more), parse(FULL_SECTION)) == ("rollout.guards",)
