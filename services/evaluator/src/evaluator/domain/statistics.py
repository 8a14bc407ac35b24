"""The figures of an evaluation: metrics of probabilities against labels, calibration, and the paired bootstrap of a difference.

All arrays are one-dimensional, one entry per row of the holdout: labels are 0 or 1, scores probabilities of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Goal = Literal["maximize", "minimize"]

Weighted = Callable[[Floats], float]
"""A metric of fixed labels and scores, as a function of the rows' weights; NaN where the weights leave it undefined."""

_CLIP = 1e-7
_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure by which models are compared, and which of two values is better."""

    name: str
    goal: Goal
    prepare: Callable[[Floats, Floats], Weighted]

    def value(self, labels: Floats, scores: Floats) -> float:
        """The metric with every row counted once."""
        return self.prepare(labels, scores)(np.ones(len(labels)))

    def improvement(self, challenger: float, champion: float) -> float:
        """How much better the challenger's value is; negative when it is worse."""
        return challenger - champion if self.goal == "maximize" else champion - challenger


def _auc(labels: Floats, scores: Floats) -> Weighted:
    """Area under the ROC curve: the probability that a positive row is scored above a negative one, ties counting half.

    For each positive the weight of the negatives below it is read off a running sum over the negatives in the order of their
    scores, so that only the running sum depends on the weights.
    """
    positive = np.flatnonzero(labels == 1)
    negative = np.flatnonzero(labels == 0)
    negative = negative[np.argsort(scores[negative], kind="stable")]
    below = np.searchsorted(scores[negative], scores[positive], side="left")
    not_above = np.searchsorted(scores[negative], scores[positive], side="right")

    def weighted(weights: Floats) -> float:
        running = np.concatenate(([0.0], np.cumsum(weights[negative])))
        ours = weights[positive]
        pairs = ours.sum() * running[-1]
        if pairs == 0:
            return float("nan")
        return float((ours @ (running[below] + running[not_above])) / (2 * pairs))

    return weighted


def _mean_of(losses: Callable[[Floats, Floats], Floats]) -> Callable[[Floats, Floats], Weighted]:
    def prepare(labels: Floats, scores: Floats) -> Weighted:
        per_row = losses(labels, scores)

        def weighted(weights: Floats) -> float:
            total = weights.sum()
            return float(per_row @ weights / total) if total else float("nan")

        return weighted

    return prepare


def _log_losses(labels: Floats, scores: Floats) -> Floats:
    clipped = np.clip(scores, _CLIP, 1 - _CLIP)
    losses: Floats = -np.where(labels == 1, np.log(clipped), np.log1p(-clipped))
    return losses


def _squared_errors(labels: Floats, scores: Floats) -> Floats:
    errors: Floats = (scores - labels) ** 2
    return errors


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("auc", "maximize", _auc),
            Metric("logloss", "minimize", _mean_of(_log_losses)),
            Metric("brier", "minimize", _mean_of(_squared_errors)),
        )
    }
)
"""Every metric there is. Logarithmic loss is in nats, with scores clipped to 1e-7 from 0 and 1."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What a bootstrap found: the difference on the rows as they are, its interval, and the difference of each resample."""

    difference: float
    low: float
    high: float
    confidence: float
    differences: Floats


def paired_bootstrap(
    metric: Metric,
    labels: Floats,
    challenger: Floats,
    champion: Floats,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How much better the challenger is, with the two-sided percentile interval of a paired bootstrap over rows.

    In each resample both models are scored on the same rows, drawn with replacement: a row drawn k times has weight k, and nothing is
    sorted again. Positive is better, whatever the metric's goal. The same seed gives the same interval. Resamples in which the
    metric is undefined (all of one class) are left out; if that is more than half of them the interval is [-1, 1]: nothing is known.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    rows = len(labels)
    ours, theirs = metric.prepare(labels, challenger), metric.prepare(labels, champion)
    everything = np.ones(rows)
    difference = metric.improvement(ours(everything), theirs(everything))
    random = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < resamples:
        count = min(_CHUNK, resamples - len(found))
        drawn = random.integers(0, rows, size=(count, rows))
        for indices in drawn:
            weights = np.bincount(indices, minlength=rows).astype(np.float64)
            found.append(metric.improvement(ours(weights), theirs(weights)))
    differences = np.array(found)
    defined = differences[np.isfinite(differences)]
    if len(defined) * 2 < resamples:
        return Interval(difference, -1.0, 1.0, confidence, defined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(difference, float(low), float(high), confidence, defined)


@dataclass(frozen=True, slots=True)
class Bin:
    """The rows whose score lies in one tenth of the range: how many, their mean score, and the share of ones among them."""

    rows: int
    mean_score: float
    share_of_ones: float


def reliability(labels: Floats, scores: Floats, bins: int = 10) -> list[Bin]:
    """The rows in bins of equal width of their score; empty bins are left out."""
    position = np.minimum((np.clip(scores, 0, 1) * bins).astype(np.int64), bins - 1)
    counts = np.bincount(position, minlength=bins)
    score_sums = np.bincount(position, weights=scores, minlength=bins)
    label_sums = np.bincount(position, weights=labels, minlength=bins)
    return [Bin(int(n), float(s / n), float(y / n)) for n, s, y in zip(counts, score_sums, label_sums, strict=True) if n]


def calibration_error(labels: Floats, scores: Floats, bins: int = 10) -> float:
    """Expected calibration error: the mean over rows of |mean score - share of ones| of the row's bin, bins of equal width.

    Source: Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning (AAAI 2015).
    """
    found = reliability(labels, scores, bins)
    total = sum(one.rows for one in found)
    return sum(one.rows * abs(one.mean_score - one.share_of_ones) for one in found) / total


def roc_curve(labels: Floats, scores: Floats, points: int = 200) -> tuple[Floats, Floats]:
    """False and true positive rates over falling thresholds, from (0, 0) to (1, 1), thinned to about so many points."""
    order = np.argsort(-scores, kind="stable")
    ones = np.cumsum(labels[order])
    zeros = np.cumsum(1 - labels[order])
    # Only where the score changes is there a threshold.
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    kept = np.unique(last_of_tie[np.linspace(0, len(last_of_tie) - 1, points).astype(np.int64)])
    false_rate: Floats = np.concatenate(([0.0], zeros[kept] / max(zeros[-1], 1)))
    true_rate: Floats = np.concatenate(([0.0], ones[kept] / max(ones[-1], 1)))
    return false_rate, true_rate
