"""The verdict: gates, the rule against the champion, candidates, parity, and the life of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from evaluator.domain.candidate import Blob, Candidate, FinishedRun, Model, NotACandidate, Source, choose
from evaluator.domain.evaluation import (
    Evaluation,
    EvaluationFailed,
    EvaluationPassed,
    Evidence,
    Journey,
    Latency,
    Status,
    bootstrap_seed,
    judge,
    unfit_labels,
    unfit_scores,
)
from evaluator.domain.parity import largest_difference
from evaluator.domain.policy import Policy, parse

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def policy(*require: str, metric: str = "auc", margin: float = 0.0) -> Policy:
    return parse(
        {
            "experiment": "e",
            "holdout": {"dataset": "d", "version": 1},
            "metric": {"name": metric, "margin": margin},
            "require": list(require),
        }
    )


def scores(quality: float, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return np.clip(0.5 + quality * (LABELS - 0.5) + 0.15 * random.normal(size=len(LABELS)), 0, 1)


LABELS = (np.random.default_rng(42).random(600) < 0.5).astype(float)


def evidence(challenger: Any, champion: Any = None, **changes: Any) -> Evidence:
    return replace(Evidence(LABELS, challenger, champion, Latency(1.0, 2.0, 100), 1e-7), **changes)


def test_a_better_challenger_passes() -> None:
    verdict = judge(policy(), evidence(scores(0.4), scores(0.1, 1)), seed=1)
    assert not verdict.reason
    assert verdict.comparison.difference_low > 0
    assert verdict.comparison.difference == pytest.approx(verdict.comparison.challenger - (verdict.comparison.champion or 0))
    assert verdict.gates[0].name == "auc"


def test_a_worse_one_fails_and_the_reason_has_the_figures() -> None:
    verdict = judge(policy(), evidence(scores(0.1), scores(0.4, 1)), seed=1)
    assert verdict.gates[0].passed is False
    assert f"{verdict.comparison.challenger:.4f}" in verdict.reason
    assert f"{verdict.comparison.champion:.4f}" in verdict.reason


def test_the_rule_is_the_lower_end_of_the_interval_against_the_margin() -> None:
    ours, theirs = scores(0.30), scores(0.31, 1)
    lower = judge(policy(), evidence(ours, theirs), seed=1).comparison.difference_low
    assert lower < 0
    assert judge(policy(margin=-lower + 1e-6), evidence(ours, theirs), seed=1).reason == ""
    assert judge(policy(margin=-lower - 1e-6), evidence(ours, theirs), seed=1).reason != ""


def test_a_margin_below_zero_asks_for_more_than_being_as_good() -> None:
    same = scores(0.3)
    assert judge(policy(margin=0.0), evidence(same, same), seed=1).reason == ""
    assert judge(policy(margin=-0.01), evidence(same, same), seed=1).reason != ""


def test_for_a_loss_better_is_lower() -> None:
    verdict = judge(policy(metric="brier"), evidence(scores(0.6), scores(0.1, 1)), seed=1)
    assert verdict.comparison.difference > 0
    assert verdict.comparison.challenger < (verdict.comparison.champion or 0)
    assert not verdict.reason


def test_without_a_champion_there_is_no_interval_and_only_absolute_gates() -> None:
    verdict = judge(policy("auc.at_least 0.5"), evidence(scores(0.4)), seed=1)
    assert [gate.name for gate in verdict.gates] == ["auc.at_least"]
    assert (verdict.comparison.champion, verdict.comparison.resamples, verdict.bootstrap) == (None, 0, None)


@pytest.mark.parametrize(
    ("requirement", "name", "changes", "passed"),
    [
        ("auc.at_least 0.99999", "auc.at_least", {}, False),
        ("logloss.at_most 5", "logloss.at_most", {}, True),
        ("parity", "parity", {"parity_error": 9e-5}, True),
        ("parity", "parity", {"parity_error": 2e-4}, False),
        ("parity", "parity", {"parity_error": None}, False),
        ("latency_p99_ms < 20", "latency_p99_ms", {"latency": Latency(1, 20, 9)}, False),
        ("latency_p50_ms < 20", "latency_p50_ms", {"latency": Latency(1, 20, 9)}, True),
        ("calibration.at_most 0.001", "calibration", {}, False),
    ],
)
def test_each_absolute_gate(requirement: str, name: str, changes: dict[str, Any], passed: bool) -> None:
    verdict = judge(policy(requirement), evidence(scores(0.2), **changes), seed=1)
    (gate,) = verdict.gates
    assert (gate.name, gate.passed) == (name, passed)
    assert (verdict.reason == "") is passed
    assert passed or gate.detail in verdict.reason


def test_the_reason_names_every_gate_that_was_not_passed_and_no_other() -> None:
    verdict = judge(policy("auc.at_least 0.99999", "parity", "latency_p99_ms < 1"), evidence(scores(0.2)), seed=1)
    assert [gate.passed for gate in verdict.gates] == [False, True, False]
    assert "sample rows" not in verdict.reason
    assert "auc" in verdict.reason
    assert "latency" in verdict.reason


def test_the_same_files_give_the_same_seed() -> None:
    assert bootstrap_seed("a", "b") == bootstrap_seed("a", "b") != bootstrap_seed("b", "a")


@pytest.mark.parametrize(("labels", "words"), [([0, 1, 2], "other than"), ([1, 1], "both"), ([], "both"), ([0, 1, np.nan], "other")])
def test_labels_that_cannot_judge(labels: list[float], words: str) -> None:
    assert words in unfit_labels(np.array(labels, float))


@pytest.mark.parametrize(("found", "words"), [([0.5], "1 scores for 2"), ([0.5, 1.1], "1 of its 2"), ([np.nan, -0.1], "2 of its 2")])
def test_scores_that_cannot_be_judged(found: list[float], words: str) -> None:
    assert words in unfit_scores(np.array(found, float), 2)


def test_what_can_be_judged() -> None:
    assert unfit_labels(np.array([0.0, 1.0])) == ""
    assert unfit_scores(np.array([0.0, 1.0]), 2) == ""


# -- parity


def test_parity_is_the_largest_difference_over_all_outputs() -> None:
    answers = {"p": np.array([[0.5], [0.25]], np.float32), "q": np.array([1, 2])}
    assert largest_difference(answers, {"p": [[0.5], [0.5]], "q": [1, 3]}) == 1.0
    assert largest_difference(answers, {"p": [0.5, 0.25]}) == 0.0
    assert largest_difference({"t": np.array(["a", "b"])}, {"t": ["a", "b"]}) == 0.0
    assert largest_difference({"t": np.array(["a", "b"])}, {"t": ["a", "c"]}) == 1.0


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        ({"z": [1]}, "no output"),
        ({"p": [0.1, 0.2, 0.3]}, "shape"),
        ({"p": [0.1, float("nan")]}, "not finite"),
        ({"p": [{}, {}]}, "numbers"),
    ],
)
def test_samples_that_cannot_be_compared(logged: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        largest_difference({"p": np.array([0.1, 0.2])}, logged)


# -- candidates

BLOB = Blob("a" * 64, 10, "blobs/sha256/aa/" + "a" * 64)


def model(name: str = "model", form: str = "onnx") -> Model:
    return Model(name, form, BLOB)


def run(**changes: Any) -> FinishedRun:
    return replace(FinishedRun(run_id="r" * 32, experiment="e", user="ada", models=(model(),)), **changes)


def test_a_top_level_run_with_one_model_is_a_candidate() -> None:
    assert choose(run()) == Candidate("r" * 32, model(), "ada", Source(), ())


def test_a_tag_names_one_of_several() -> None:
    chosen = choose(run(models=(model("a"), model("b")), tags={"headrace.candidate": "b"}))
    assert isinstance(chosen, Candidate)
    assert chosen.model.name == "b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ()}, "no deliverable model"),
        ({"models": (model("a"), model("b"))}, "2 deliverable models (a, b)"),
        ({"parent_run_id": "p"}, "part of run p"),
        ({"tags": {"headrace.candidate": "x"}}, "'x'"),
        ({"models": (model(form="safetensors"),)}, "safetensors"),
    ],
)
def test_everything_else_is_not(changes: dict[str, Any], words: str) -> None:
    chosen = choose(run(**changes))
    assert isinstance(chosen, NotACandidate)
    assert words in chosen.reason


# -- the life of an evaluation


def evaluation(**changes: Any) -> Evaluation:
    chosen = choose(run())
    assert isinstance(chosen, Candidate)
    made = Evaluation("e1", Journey("j1", "d", 2, "r" * 32), "m", Status.PENDING, NOW, chosen, policy())
    return replace(made, **changes)


def test_an_evaluation_is_decided_once_and_tells_it() -> None:
    waiting = evaluation()
    assert waiting.open
    assert waiting.begun().open
    passed, event = waiting.decided(waiting.blank_judgement(), "", NOW)
    assert (passed.status, passed.open, passed.finished_at) == (Status.PASSED, False, NOW)
    assert event == EvaluationPassed(waiting.blank_judgement())
    failed, event = waiting.decided(waiting.blank_judgement(), "worse", NOW)
    assert (failed.status, failed.reason) == (Status.FAILED, "worse")
    assert event == EvaluationFailed(waiting.blank_judgement(), "worse")
    assert passed.superseded().open is False


def test_a_skipped_run_has_no_judgement() -> None:
    with pytest.raises(ValueError, match="no candidate"):
        evaluation(candidate=None, status=Status.SKIPPED).blank_judgement()
