"""An evaluation from its beginning to its verdict: whom it judges, against whom, on what evidence, and what it decided."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from evaluator.domain.candidate import Blob, Candidate, DataVersion
from evaluator.domain.policy import Policy, Requirement
from evaluator.domain.statistics import METRICS, Floats, Interval, calibration_error, paired_bootstrap

RESAMPLES = 1000
CONFIDENCE = 0.95


class Status(enum.StrEnum):
    """Where an evaluation stands. Superseded: a later one of the same journey took its place."""

    PENDING = "pending"
    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that claims an experiment, at the revision in force: how it judges, and for which model.

    `policy` is None when the section cannot be read, and `problem` says why.
    """

    delivery: str
    revision: int
    model: str
    policy: Policy | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Journey:
    """One candidate on its way. It keeps the delivery's revision with which it began."""

    journey_id: str
    delivery: str
    delivery_revision: int
    run_id: str


@dataclass(frozen=True, slots=True)
class Champion:
    """The version that callers get now, as the deployer told it."""

    version: int
    blob: Blob


@dataclass(frozen=True, slots=True)
class Gate:
    """One thing that was required: its value, what that was held against, and a sentence for people."""

    name: str
    passed: bool
    value: float
    limit: float
    detail: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The candidate's metric beside the champion's on the same rows. Differences are positive where the candidate is better."""

    metric: str
    challenger: float
    champion: float | None
    difference: float
    difference_low: float
    difference_high: float
    confidence: float
    resamples: int
    rows: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """By whom and what a candidate was judged; what is not known yet, or could not be found out, is None or empty."""

    evaluation_id: str
    journey: Journey
    model: str
    candidate: Candidate
    champion: Champion | None = None
    holdout: DataVersion | None = None
    comparison: Comparison | None = None
    gates: tuple[Gate, ...] = ()
    report_json: Blob | None = None
    report_html: Blob | None = None


@dataclass(frozen=True, slots=True)
class EvaluationPassed:
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class EvaluationFailed:
    judgement: Judgement
    reason: str


@dataclass(frozen=True, slots=True)
class RunSkipped:
    journey: Journey
    model: str
    reason: str


Event = EvaluationPassed | EvaluationFailed | RunSkipped


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One judging of one candidate. `candidate` and `policy` are None when the run was skipped.

    `replaces` is the evaluation that this one takes the place of, because the champion had changed; `champion_at_least` the version
    that is known to be champion then.
    """

    evaluation_id: str
    journey: Journey
    model: str
    status: Status
    created_at: datetime
    candidate: Candidate | None = None
    policy: Policy | None = None
    replaces: str = ""
    champion_at_least: int = 0
    reason: str = ""
    judgement: Judgement | None = None
    finished_at: datetime | None = None

    @property
    def open(self) -> bool:
        """Whether it is still to be decided."""
        return self.status in (Status.PENDING, Status.RUNNING)

    def begun(self) -> Evaluation:
        return replace(self, status=Status.RUNNING)

    def superseded(self) -> Evaluation:
        return replace(self, status=Status.SUPERSEDED)

    def decided(self, judgement: Judgement, reason: str, at: datetime) -> tuple[Evaluation, Event]:
        """The evaluation with its outcome, passed when there is no reason against it, and the event that tells it."""
        done = replace(self, status=Status.FAILED if reason else Status.PASSED, judgement=judgement, reason=reason, finished_at=at)
        return done, EvaluationFailed(judgement, reason) if reason else EvaluationPassed(judgement)

    def blank_judgement(self) -> Judgement:
        """What is known before anything was measured. Raises ValueError for a run that was skipped."""
        if self.candidate is None:
            raise ValueError(f"evaluation {self.evaluation_id} has no candidate")
        return Judgement(self.evaluation_id, self.journey, self.model, self.candidate)


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of a prediction for one row on one thread, over so many rows."""

    p50_ms: float
    p99_ms: float
    rows: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured. Labels 0 or 1 and scores in 0..1, one per row of the holdout, in its order.

    `parity_error` is the largest absolute difference between the exported file's answer to the logged sample rows and the training
    code's own answer; None: the run logged no sample rows.
    """

    labels: Floats
    challenger: Floats
    champion: Floats | None
    latency: Latency
    parity_error: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of every gate. `reason` is empty when all were passed."""

    comparison: Comparison
    gates: tuple[Gate, ...]
    bootstrap: Interval | None
    reason: str


def judge(policy: Policy, evidence: Evidence, seed: int) -> Verdict:
    """Holds the evidence against the policy. Takes about a second for 27,000 rows; the same seed gives the same verdict."""
    metric = METRICS[policy.against.metric]
    ours = metric.value(evidence.labels, evidence.challenger)
    gates: list[Gate] = []
    interval: Interval | None = None
    theirs: float | None = None
    if evidence.champion is not None:
        theirs = metric.value(evidence.labels, evidence.champion)
        interval = paired_bootstrap(
            metric, evidence.labels, evidence.challenger, evidence.champion, resamples=RESAMPLES, confidence=CONFIDENCE, seed=seed
        )
        gates.append(_against_champion(policy, ours, theirs, interval))
    comparison = Comparison(
        metric=metric.name,
        challenger=ours,
        champion=theirs,
        difference=interval.difference if interval else 0.0,
        difference_low=interval.low if interval else 0.0,
        difference_high=interval.high if interval else 0.0,
        confidence=CONFIDENCE,
        resamples=RESAMPLES if interval else 0,
        rows=len(evidence.labels),
    )
    gates.extend(_absolute(requirement, evidence) for requirement in policy.require)
    reason = "; ".join(gate.detail for gate in gates if not gate.passed)
    return Verdict(comparison, tuple(gates), interval, reason)


def bootstrap_seed(*digests: str) -> int:
    """A seed that follows from what is compared, so that judging the same files again gives the same interval."""
    return int.from_bytes(hashlib.sha256(" ".join(digests).encode()).digest()[:8])


def unfit_labels(labels: Floats) -> str:
    """Why these labels cannot judge a model; empty when they can."""
    if not np.isin(labels, (0.0, 1.0)).all():
        return "its label column holds values other than 0 and 1"
    if len(labels) == 0 or labels.min() == labels.max():
        return "its label column does not hold both 0 and 1"
    return ""


def unfit_scores(scores: Floats, rows: int) -> str:
    """Why a model's answers cannot be judged; empty when they can."""
    if len(scores) != rows:
        return f"it answered {len(scores)} scores for {rows} rows"
    bad = int((~((scores >= 0) & (scores <= 1))).sum())
    return f"{bad} of its {rows} scores are not probabilities from 0 to 1" if bad else ""


def _against_champion(policy: Policy, ours: float, theirs: float, interval: Interval) -> Gate:
    margin = policy.against.margin
    floor = 0.0 - margin
    # Rounding alone must not fail a model that is the same as the champion.
    passed = interval.low >= floor - 1e-12
    detail = (
        f"{policy.against.metric} {ours:.4f} against the champion's {theirs:.4f}: difference {interval.difference:+.4f}, "
        f"{interval.confidence:.0%} interval [{interval.low:+.4f}, {interval.high:+.4f}]; its lower end must be at least {floor:+.4f}"
    )
    return Gate(policy.against.metric, passed, interval.low, floor, detail)


def _absolute(requirement: Requirement, evidence: Evidence) -> Gate:
    limit = requirement.limit
    if requirement.kind == "metric":
        value = METRICS[requirement.name].value(evidence.labels, evidence.challenger)
        bound = "at_least" if requirement.at_least else "at_most"
        name = f"{requirement.name}.{bound}"
        detail = f"{requirement.name} {value:.4f}, must be {bound.replace('_', ' ')} {limit:g}"
    elif requirement.kind == "calibration":
        name, value = "calibration", calibration_error(evidence.labels, evidence.challenger)
        detail = f"expected calibration error {value:.4f}, must be at most {limit:g}"
    elif requirement.kind == "parity":
        name = "parity"
        if evidence.parity_error is None:
            return Gate(name, False, 0.0, limit, "parity cannot be shown: the run logged no sample rows with the training code's answers")
        value = evidence.parity_error
        detail = f"the exported file differs from the training code by {value:.2g} on the sample rows, must be at most {limit:g}"
    else:
        name = requirement.name
        value = evidence.latency.p50_ms if name == "latency_p50_ms" else evidence.latency.p99_ms
        detail = f"{name} {value:.2f}, must be below {limit:g}"
    return Gate(name, requirement.met_by(value), value, limit, detail)
