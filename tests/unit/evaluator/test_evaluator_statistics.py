"""Metrics, calibration and the bootstrap, held against plain references that count one pair or one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluator.domain.statistics import (
    METRICS,
    Floats,
    Metric,
    calibration_error,
    paired_bootstrap,
    reliability,
    roc_curve,
)
from hypothesis import given, settings
from hypothesis import strategies as st

AUC, LOGLOSS, BRIER = METRICS["auc"], METRICS["logloss"], METRICS["brier"]

# Few distinct values, so that ties are common.
ROWS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 4)), min_size=2, max_size=40)


def columns(rows: list[tuple[int, float, int]]) -> tuple[Floats, Floats, Floats]:
    labels, scores, weights = zip(*rows, strict=True)
    return np.array(labels, float), np.array(scores, float), np.array(weights, float)


def naive_auc(labels: Floats, scores: Floats, weights: Floats) -> float:
    won = pairs = 0.0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] == 1 and labels[j] == 0:
                pair = weights[i] * weights[j]
                pairs += pair
                won += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / pairs if pairs else math.nan


@given(ROWS)
def test_weighted_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, float, int]]) -> None:
    labels, scores, weights = columns(rows)
    assert AUC.prepare(labels, scores)(weights) == pytest.approx(naive_auc(labels, scores, weights), nan_ok=True)


@given(ROWS)
def test_a_weight_is_a_row_counted_so_often(rows: list[tuple[int, float, int]]) -> None:
    labels, scores, weights = columns(rows)
    times = weights.astype(int)
    if times.sum() == 0:
        times[0] = 1
    for metric in METRICS.values():
        repeated = metric.value(np.repeat(labels, times), np.repeat(scores, times))
        assert metric.prepare(labels, scores)(times.astype(float)) == pytest.approx(repeated, nan_ok=True)


@given(ROWS)
def test_auc_depends_on_the_order_of_scores_alone_and_turns_round_with_it(rows: list[tuple[int, float, int]]) -> None:
    labels, scores, _ = columns(rows)
    value = AUC.value(labels, scores)
    assert AUC.value(labels, np.sqrt(scores) / 2) == pytest.approx(value, nan_ok=True)
    assert AUC.value(labels, 1 - scores) == pytest.approx(1 - value, nan_ok=True)


def test_losses_by_hand() -> None:
    labels, scores = np.array([1.0, 0.0, 1.0]), np.array([0.8, 0.3, 0.5])
    assert LOGLOSS.value(labels, scores) == pytest.approx(-(math.log(0.8) + math.log(0.7) + math.log(0.5)) / 3)
    assert BRIER.value(labels, scores) == pytest.approx((0.04 + 0.09 + 0.25) / 3)


def test_certain_and_wrong_is_a_large_loss_and_not_an_infinite_one() -> None:
    assert LOGLOSS.value(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_improvement_is_positive_where_the_challenger_is_better_whatever_the_goal() -> None:
    assert AUC.improvement(0.7, 0.6) > 0
    assert LOGLOSS.improvement(0.5, 0.6) > 0


def naive_bootstrap(
    metric: Metric, labels: Floats, challenger: Floats, champion: Floats, resamples: int, seed: int, confidence: float
) -> tuple[float, float]:
    """Draws the same rows, but copies them and computes the metric anew each time."""
    random = np.random.default_rng(seed)
    differences: list[float] = []
    while len(differences) < resamples:
        for drawn in random.integers(0, len(labels), size=(min(16, resamples - len(differences)), len(labels))):
            differences.append(
                metric.improvement(metric.value(labels[drawn], challenger[drawn]), metric.value(labels[drawn], champion[drawn]))
            )
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_bootstrap_by_weights_is_the_bootstrap_by_copied_rows(name: str) -> None:
    random = np.random.default_rng(7)
    labels = (random.random(300) < 0.3).astype(float)
    challenger = np.clip(0.3 + 0.3 * (labels - 0.3) + 0.2 * random.normal(size=300), 0, 1).round(2)
    champion = np.clip(0.3 + 0.1 * (labels - 0.3) + 0.2 * random.normal(size=300), 0, 1).round(2)
    found = paired_bootstrap(METRICS[name], labels, challenger, champion, resamples=50, confidence=0.9, seed=3)
    low, high = naive_bootstrap(METRICS[name], labels, challenger, champion, 50, 3, 0.9)
    assert (found.low, found.high) == pytest.approx((low, high))
    expected = METRICS[name].improvement(METRICS[name].value(labels, challenger), METRICS[name].value(labels, champion))
    assert found.difference == pytest.approx(expected)


def test_the_bootstrap_is_paired_the_same_model_differs_from_itself_by_nothing() -> None:
    random = np.random.default_rng(1)
    labels, scores = (random.random(200) < 0.5).astype(float), random.random(200)
    found = paired_bootstrap(AUC, labels, scores, scores, resamples=40)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    random = np.random.default_rng(2)
    labels, ours, theirs = (random.random(200) < 0.5).astype(float), random.random(200), random.random(200)
    first, again, other = (paired_bootstrap(AUC, labels, ours, theirs, resamples=60, seed=seed) for seed in (1, 1, 2))
    assert (first.low, first.high) == (again.low, again.high) != (other.low, other.high)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    """Two models of equal worth on fresh rows, over and over: 90 % intervals must hold 0 in roughly 90 % of the cases."""
    random = np.random.default_rng(11)
    held = 0
    for trial in range(120):
        labels = (random.random(200) < 0.4).astype(float)
        ours, theirs = (labels + random.normal(size=200), labels + random.normal(size=200))
        found = paired_bootstrap(AUC, labels, ours, theirs, resamples=120, confidence=0.9, seed=trial)
        held += found.low <= 0 <= found.high
    assert 120 * 0.82 <= held <= 120 * 0.97


def test_resamples_of_one_class_are_left_out() -> None:
    labels, scores = np.array([1.0, *[0.0] * 5]), np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.95])
    found = paired_bootstrap(AUC, labels, scores, 1 - scores, resamples=200, seed=1)
    assert 100 < len(found.differences) < 200
    assert np.isfinite(found.differences).all()
    assert -1 <= found.low <= found.high <= 1


def test_where_hardly_any_resample_says_something_nothing_is_known() -> None:
    found = paired_bootstrap(AUC, np.ones(5), np.linspace(0, 1, 5), np.linspace(1, 0, 5), resamples=20)
    assert (found.low, found.high) == (-1.0, 1.0)


def naive_calibration_error(labels: Floats, scores: Floats, bins: int) -> float:
    total = 0.0
    for i in range(bins):
        inside = [j for j in range(len(scores)) if i / bins <= scores[j] and (scores[j] < (i + 1) / bins or i == bins - 1)]
        if inside:
            share = sum(labels[j] for j in inside) / len(inside)
            total += len(inside) * abs(share - sum(scores[j] for j in inside) / len(inside))
    return total / len(scores)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
def test_calibration_error_against_a_plain_count(rows: list[tuple[int, float]]) -> None:
    labels, scores = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    # Eight bins: their bounds are exact in binary, so that both put a score on a bound into the same one.
    assert calibration_error(labels, scores, bins=8) == pytest.approx(naive_calibration_error(labels, scores, 8), abs=1e-9)
    assert sum(one.rows for one in reliability(labels, scores)) == len(rows)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    random = np.random.default_rng(5)
    chance = random.random(20_000)
    labels = (random.random(20_000) < chance).astype(float)
    assert calibration_error(labels, chance) < 0.02
    assert calibration_error(labels, np.where(chance > 0.5, 1.0, 0.0)) > 0.2


@settings(max_examples=50)
@given(ROWS)
def test_the_area_under_the_curve_that_is_drawn_is_the_auc(rows: list[tuple[int, float, int]]) -> None:
    labels, scores, _ = columns(rows)
    false_rate, true_rate = roc_curve(labels, scores)
    assert (np.diff(false_rate) >= 0).all()
    assert (np.diff(true_rate) >= 0).all()
    if 0 < labels.sum() < len(labels):
        assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(true_rate, false_rate) == pytest.approx(AUC.value(labels, scores))


def test_a_curve_of_many_rows_is_thinned() -> None:
    random = np.random.default_rng(6)
    false_rate, _ = roc_curve((random.random(5_000) < 0.5).astype(float), random.random(5_000))
    assert 150 <= len(false_rate) <= 201
