"""A run from its start to its end, what it may log on the way, and the events that tell of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tracker.domain.conversion import CANDIDATE_TAG, Conversion, wanted
from tracker.domain.errors import NotAllowed, Problem, Refused, Rejected
from tracker.domain.model import DeliverableModel

MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1_000, 100, 100
"""Per batch, as MLflow has them."""

MAX_KEY, MAX_PARAM, MAX_TAG, MAX_EXPERIMENT_TAG, MAX_NAME = 250, 6_000, 8_000, 20_000, 500
"""Lengths in characters."""

MAX_TIME_MS = 253_402_300_799_999
"""The end of the year 9999, where timestamps of events end."""

MAX_LEASE_S = 86_400
EVENT_BUDGET = 500_000
"""Bytes that params, metrics and tags may take in run.finished: with all the rest it stays below what a broker accepts."""

INT64 = range(-(2**63), 2**63)
_KEY = re.compile(r"[\w.\-/ :()%@=+,#\[\]]+")


class Status(StrEnum):
    """As MLflow names them."""

    RUNNING = "RUNNING"
    SCHEDULED = "SCHEDULED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


ENDED = frozenset({Status.FINISHED, Status.FAILED, Status.KILLED})


@dataclass(frozen=True, slots=True)
class Experiment:
    id: int
    name: str
    lifecycle_stage: str
    created_ms: int
    last_update_ms: int
    tags: Mapping[str, str] = field(default_factory=dict)

    def check_active(self) -> None:
        """Raises Refused when it was deleted."""
        if self.lifecycle_stage != "active":
            raise Refused(f"The experiment {self.id} must be in the 'active' state. Current state is {self.lifecycle_stage}.")


@dataclass(frozen=True, slots=True)
class RunSource:
    """Where the code of a run came from."""

    commit: str = ""
    dirty: bool = False
    diff_key: str = ""
    command: str = ""
    training_id: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One point: identified by all four of its fields."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True, slots=True)
class DatasetRef:
    """A version of a data set."""

    name: str
    version: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run has logged; of each metric the last value."""

    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    models: Sequence[DeliverableModel] = ()
    inputs: Sequence[DatasetRef] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `event_sequence` counts the events told of it; `fencing_token` is the attempt that owns it; `deleted_ms` 0: not deleted."""

    run_id: str
    experiment_id: int
    name: str
    user: str
    status: Status
    lifecycle_stage: str
    started_ms: int
    finished_ms: int
    source: RunSource
    reason: str
    parent_run_id: str
    lease_seconds: int
    fencing_token: int
    event_sequence: int
    deleted_ms: int = 0

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def next_event(self) -> Run:
        """The run with one more event told of it."""
        return dataclasses.replace(self, event_sequence=self.event_sequence + 1)

    def finish(self, status: Status, finished_ms: int, reason: str) -> Run:
        """The run after its end. Repeating an end answers the run as it is; raises Refused for another end than it had."""
        if status not in ENDED:
            raise Rejected([Problem("status", "FINISHED, FAILED or KILLED")])
        if self.ended:
            if self.status is not status:
                raise Refused(f"run {self.run_id} has ended already: {self.status}{f', {self.reason}' if self.reason else ''}")
            return self
        return dataclasses.replace(self, status=status, finished_ms=finished_ms, reason=reason).next_event()

    def reopen(self) -> Run:
        """The run as it goes on after its end. No event tells of it: the end that it comes to is told as the next.

        Its lease is over, since nobody who renewed it is there any more.
        """
        return dataclasses.replace(self, status=Status.RUNNING, finished_ms=0, reason="", lease_seconds=0)

    def delete(self, now_ms: int) -> Run:
        """The run as deleted. Raises Refused while a training runs it: the training would go on for nothing."""
        if self.lifecycle_stage == "deleted":
            return self
        if self.source.training_id and not self.ended:
            raise Refused(f"run {self.run_id} is being trained; cancel training {self.source.training_id} first")
        return dataclasses.replace(self, lifecycle_stage="deleted", deleted_ms=now_ms)

    def restore(self) -> Run:
        return dataclasses.replace(self, lifecycle_stage="active", deleted_ms=0)

    def check_active(self) -> None:
        """Raises Refused when the run was deleted."""
        if self.lifecycle_stage != "active":
            raise Refused(f"The run {self.run_id} must be in the 'active' state. Current state is {self.lifecycle_stage}.")

    def check_owner(self, run_id: str | None, fencing_token: int | None) -> None:
        """Whether a token for `run_id` (None: no run token) and an attempt (None: not told) may touch this run.

        Raises NotAllowed for a token of another run, Refused when a newer attempt owns it.
        """
        if run_id is not None and run_id != self.run_id:
            raise NotAllowed(f"this token is for run {run_id} only")
        if fencing_token is not None and fencing_token < self.fencing_token:
            raise Refused(f"run {self.run_id} belongs to a newer attempt ({self.fencing_token}, this is {fencing_token})")

    def check_open(self) -> None:
        """Raises Refused when the run has ended or was deleted."""
        self.check_active()
        if self.ended:
            raise Refused(f"run {self.run_id} has ended: {self.status}{f', {self.reason}' if self.reason else ''}")


@dataclass(frozen=True, slots=True)
class RunStarted:
    run: Run
    experiment: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """`truncated` when params, metrics or tags were left out for their size; `conversion` when a model waits for one."""

    run: Run
    experiment: str
    facts: Facts
    truncated: bool
    conversion: Conversion | None = None


@dataclass(frozen=True, slots=True)
class RunFailed:
    run: Run
    experiment: str


Event = RunStarted | RunFinished | RunFailed


def ending(run: Run, experiment: str, facts: Facts, waiting: Sequence[Conversion] = ()) -> RunFinished | RunFailed:
    """The event that tells of a run's end. `waiting` are its models that could be converted and have not been."""
    if run.status is not Status.FINISHED:
        return RunFailed(run, experiment)
    kept, truncated = _fit(facts)
    conversion = wanted(waiting, facts.models, facts.tags.get(CANDIDATE_TAG, ""), run.parent_run_id)
    return RunFinished(run, experiment, kept, truncated, conversion)


def _fit(facts: Facts) -> tuple[Facts, bool]:
    """Facts within EVENT_BUDGET. What Headrace itself reads (tags `headrace.*`) and metrics come first, then what is small."""
    budget, whole = EVENT_BUDGET, 0
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    for key, number in facts.metrics.items():
        whole += 1
        cost = len(key.encode()) + 20
        if cost <= budget:
            budget -= cost
            metrics[key] = number
    texts = [(tags, key, value) for key, value in facts.tags.items()] + [(params, key, value) for key, value in facts.params.items()]
    texts.sort(key=lambda text: (not (text[0] is tags and text[1].startswith("headrace.")), len(text[2])))
    for target, key, value in texts:
        whole += 1
        cost = len(key.encode()) + len(value.encode()) + 12
        if cost <= budget:
            budget -= cost
            target[key] = value
    kept = dataclasses.replace(facts, params=params, metrics=metrics, tags=tags)
    return kept, len(params) + len(metrics) + len(tags) < whole


def check_batch(metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Raises Rejected with everything that is wrong with a batch (at most 20 problems: the rest would be of the same kind)."""
    problems = [
        Problem(name, f"at most {limit} in a batch, these are {count}")
        for name, limit, count in (
            ("metrics", MAX_METRICS, len(metrics)),
            ("params", MAX_PARAMS, len(params)),
            ("tags", MAX_TAGS, len(tags)),
        )
        if count > limit
    ]
    if not problems:
        for index, metric in enumerate(metrics):
            problems.extend(_check_metric(f"metrics[{index}]", metric))
        problems.extend(check_texts("params", params, MAX_PARAM))
        problems.extend(check_texts("tags", tags, MAX_TAG))
    if problems:
        raise Rejected(problems[:20])


def _check_metric(where: str, metric: Metric) -> list[Problem]:
    problems = []
    if wrong := _check_key(metric.key):
        problems.append(Problem(f"{where}.key", wrong))
    if metric.timestamp_ms < 0 or metric.timestamp_ms not in INT64:
        problems.append(Problem(f"{where}.timestamp_ms", "milliseconds since 1970, as a 64-bit integer"))
    if metric.step not in INT64:
        problems.append(Problem(f"{where}.step", "a 64-bit integer"))
    return problems


def check_texts(where: str, texts: Mapping[str, str], limit: int) -> list[Problem]:
    """What is wrong with the keys and values of params or tags."""
    problems = []
    for key, value in texts.items():
        if wrong := _check_key(key):
            problems.append(Problem(f"{where}[{key[:50]!r}]", wrong))
        if wrong := check_text(value, limit):
            problems.append(Problem(f"{where}[{key[:50]!r}]", wrong))
    return problems


def _check_key(key: str) -> str:
    if not key or len(key) > MAX_KEY:
        return f"a key has 1 to {MAX_KEY} characters"
    if not _KEY.fullmatch(key):
        return "a key has letters, digits, spaces and _ - . / : ( ) % @ = + , # [ ] only"
    if key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
        return "a key must not read like a path outside its folder"
    return ""


def check_text(value: str, limit: int) -> str:
    """What is wrong with a text; "" when nothing is. A database's text cannot hold the character 0."""
    if len(value) > limit:
        return f"at most {limit} characters, these are {len(value)}"
    return "the character 0 is not allowed" if "\x00" in value else ""


def check_name(where: str, name: str, *, required: bool = True) -> list[Problem]:
    """What is wrong with the name of an experiment or run."""
    if required and not name.strip():
        return [Problem(where, "a name is needed")]
    wrong = check_text(name, MAX_NAME)
    return [Problem(where, wrong)] if wrong else []


def check_start(
    name: str, started_ms: int, lease_seconds: int, fencing_token: int, tags: Mapping[str, str], texts: Mapping[str, str]
) -> None:
    """Raises Rejected with what is wrong with a run to be created. `texts` are its other texts by field name."""
    problems = check_name("name", name, required=False)
    if not 0 <= started_ms <= MAX_TIME_MS:
        problems.append(Problem("started_ms", "milliseconds since 1970, before the year 10000; 0: now"))
    if not 0 <= lease_seconds <= MAX_LEASE_S:
        problems.append(Problem("lease_seconds", f"0 (no lease) to {MAX_LEASE_S}"))
    if fencing_token < 0:
        problems.append(Problem("fencing_token", "0 or more"))
    if len(tags) > MAX_TAGS:
        problems.append(Problem("tags", f"at most {MAX_TAGS}, these are {len(tags)}"))
    problems.extend(check_texts("tags", tags, MAX_TAG))
    for where, text in texts.items():
        if wrong := check_text(text, MAX_PARAM):
            problems.append(Problem(where, wrong))
    if problems:
        raise Rejected(problems[:20])
