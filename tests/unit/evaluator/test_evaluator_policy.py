"""The section `evaluate`: what it may say, how each mistake is named, and what counts as looser."""

from __future__ import annotations

from typing import Any

import pytest
from evaluator.domain.policy import Against, Holdout, Policy, Requirement, loosened, parse, violations
from hypothesis import given
from hypothesis import strategies as st
from servicekit.errors import Invalid


def section(**changes: Any) -> dict[str, Any]:
    return {
        "experiment": "flights",
        "holdout": {"dataset": "april", "version": 3, "label": "late"},
        "metric": {"name": "auc", "goal": "maximize", "margin": 0.01},
        "require": ["auc.at_least 0.57", "parity", "calibration.at_most 0.12", "latency_p99_ms < 20"],
    } | changes


def test_a_whole_section() -> None:
    assert parse(section()) == Policy(
        "flights",
        Holdout("april", 3, "late"),
        Against("auc", 0.01),
        (
            Requirement("auc.at_least 0.57", "auc", "metric", 0.57, at_least=True),
            Requirement("parity", "parity", "parity", 1e-4),
            Requirement("calibration.at_most 0.12", "calibration", "calibration", 0.12),
            Requirement("latency_p99_ms < 20", "latency_p99_ms", "latency", 20.0),
        ),
    )


def test_the_least_section() -> None:
    least = {"experiment": "e", "holdout": {"dataset": "d", "version": 1}, "metric": {"name": "logloss"}}
    assert parse(least) == Policy("e", Holdout("d", 1, "label"), Against("logloss", 0.0), ())


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        ([], "evaluate", "mapping"),
        (None, "evaluate", "missing"),
        (section(experiment=""), "evaluate.experiment", "not empty"),
        (section(experiment=7), "evaluate.experiment", "text"),
        (section(gates=[]), "evaluate.gates", "not known"),
        (section(holdout=None), "evaluate.holdout", "missing"),
        (section(holdout={"version": 1}), "evaluate.holdout.dataset", "missing"),
        (section(holdout={"dataset": "d", "version": 0}), "evaluate.holdout.version", "frozen"),
        (section(holdout={"dataset": "d", "version": True}), "evaluate.holdout.version", "frozen"),
        (section(holdout={"dataset": "d", "version": 1, "lable": "x"}), "evaluate.holdout.lable", "not known"),
        (section(metric={"name": "f1"}), "evaluate.metric.name", "auc"),
        (section(metric={"name": "auc", "goal": "minimize"}), "evaluate.metric.goal", "maximize"),
        (section(metric={"name": "auc", "margin": "much"}), "evaluate.metric.margin", "number"),
        (section(metric={"name": "auc", "margin": 2}), "evaluate.metric.margin", "-1 to 1"),
        (section(metric={"name": "auc", "margin": float("nan")}), "evaluate.metric.margin", "number"),
        (section(require="parity"), "evaluate.require", "list"),
        (section(require=["parity", "accuracy.at_least 0.9"]), "evaluate.require[1]", "not a metric"),
        (section(require=["auc.at_most 0.9"]), "evaluate.require[0]", "auc.at_least"),
        (section(require=["logloss.at_least 0.9"]), "evaluate.require[0]", "logloss.at_most"),
        (section(require=["calibration.at_least 0.9"]), "evaluate.require[0]", "calibration.at_most"),
        (section(require=["latency_max < 9"]), "evaluate.require[0]", "latency_p99_ms"),
        (section(require=["auc >= 0.9"]), "evaluate.require[0]", "write one like"),
        (section(require=[{"auc": 1}]), "evaluate.require[0]", "text"),
        (section(require=["parity", "parity.at_most 0.1"]), "evaluate.require[1]", "twice"),
    ],
)
def test_a_mistake_is_named_with_its_field(wrong: object, field: str, words: str) -> None:
    found = violations(wrong)
    assert field in [one.field for one in found]
    assert words in next(one.message for one in found if one.field == field)
    with pytest.raises(Invalid) as raised:
        parse(wrong)
    assert list(raised.value.violations) == found


def test_every_mistake_is_named_at_once() -> None:
    wrong = section(experiment="", holdout={"dataset": "d", "version": -1}, require=["nonsense", "parity", "more nonsense"])
    assert [one.field for one in violations(wrong)] == [
        "evaluate.experiment",
        "evaluate.holdout.version",
        "evaluate.require[0]",
        "evaluate.require[2]",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["experiment", "holdout", "metric", "name"]), inner),
    max_leaves=10,
)


@given(JSON)
def test_whatever_is_sent_is_answered(anything: object) -> None:
    if not violations(anything):
        assert isinstance(parse(anything), Policy)


@given(JSON)
def test_whatever_stands_in_a_requirement_is_answered(anything: object) -> None:
    found = violations(section(require=[anything]))
    assert all(one.field == "evaluate.require[0]" for one in found)


@pytest.mark.parametrize(
    ("requirement", "value", "met"),
    [
        ("auc.at_least 0.6", 0.6, True),
        ("auc.at_least 0.6", 0.599, False),
        ("brier.at_most .2", 0.2, True),
        ("brier.at_most .2", 0.201, False),
        ("calibration", 0.1, True),
        ("calibration", 0.101, False),
        ("parity.at_most 1e-3", 1e-3, True),
        ("latency_p50_ms<20", 19.99, True),
        ("latency_p50_ms<20", 20.0, False),
        ("auc.at_least 0.6", float("nan"), False),
        ("calibration", float("nan"), False),
    ],
)
def test_where_a_requirement_is_met(requirement: str, value: float, met: bool) -> None:
    assert parse(section(require=[requirement])).require[0].met_by(value) is met


@pytest.mark.parametrize(
    ("after", "fields"),
    [
        (section(), []),
        (section(experiment="another"), []),
        (section(holdout={"dataset": "april", "version": 4, "label": "late"}), ["evaluate.holdout"]),
        (section(metric={"name": "auc", "margin": 0.02}), ["evaluate.metric.margin"]),
        (section(metric={"name": "auc", "margin": 0.0}), []),
        (section(metric={"name": "brier", "margin": 0.0}), ["evaluate.metric.name"]),
        (section(require=["auc.at_least 0.57", "parity", "latency_p99_ms < 20"]), ["evaluate.require"]),
        (section(require=["latency_p99_ms < 21", "auc.at_least 0.57", "parity", "calibration.at_most 0.12"]), ["evaluate.require[0]"]),
        (section(require=["auc.at_least 0.56", "parity", "calibration", "latency_p99_ms < 20"]), ["evaluate.require[0]"]),
        (section(require=["auc.at_least 0.58", "parity.at_most 1e-5", "calibration", "latency_p99_ms < 9", "brier.at_most 1"]), []),
        (section(require=[]), ["evaluate.require"]),
    ],
)
def test_what_is_looser_than_before(after: dict[str, Any], fields: list[str]) -> None:
    assert loosened(parse(section()), parse(after)) == fields
