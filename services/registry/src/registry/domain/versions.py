"""Versions of a model: what was made, from what, how it was judged, and in which stage it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """Where a version stands. Exactly the champion is in Production."""

    DEVELOPMENT = "Development"
    STAGING = "Staging"
    PRODUCTION = "Production"
    ARCHIVED = "Archived"


@dataclass(frozen=True, slots=True)
class Journey:
    """One candidate on its way: which delivery, at the revision it began with, from which run."""

    journey_id: str
    delivery: str
    delivery_revision: int
    run_id: str


@dataclass(frozen=True, slots=True)
class Deliverable:
    """The model file. `encoded` is its whole description as the evaluator sent it, kept byte for byte and handed on unchanged."""

    name: str
    format: str
    sha256: str
    size_bytes: int
    key: str
    encoded: bytes
    logged_model: str = ""
    """MLflow's id of it, `m-..`, when it was logged as one."""


NO_DELIVERABLE = Deliverable("", "", "", 0, "", b"")
"""Of a version that a client registered and no evaluation has looked at."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evaluation a version stands on: which, and against which champion (0: there was none)."""

    evaluation_id: str
    champion_version: int
    champion_sha256: str
    report_key: str


NO_EVIDENCE = Evidence("", 0, "", "")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a version was registered from, in names that are never followed here.

    `path`: of the model within its run. `storage`: what clients are told to download. `registered_by` is empty for a version that came
    by its evaluation and that no client has registered.
    """

    source: str = ""
    path: str = ""
    logged_model: str = ""
    storage: str = ""
    run_link: str = ""
    registered_by: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A passed evaluation as it arrived: the candidate with all that is known of where it came from."""

    model: str
    journey: Journey
    candidate: Deliverable
    evidence: Evidence
    author: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Version:
    """A version. Its number never changes, nor do run, file and author once an evaluation has passed; stage, reason and evidence do, each
    change with a row in the audit log.

    `rolling_out`: promoted, and the deployer has not said how it ended. `traceparent` is the trace of the run's way to here.
    `last_evaluation` is the newest evaluation when that is not the one it stands on (empty: it is). `judged_unfit`: the newest one did not
    pass or could not be made, so what it stands on proves nothing until it has passed again.
    """

    number: int
    journey: Journey
    deliverable: Deliverable
    evidence: Evidence
    author: str
    provenance: Mapping[str, Any]
    created_at: datetime
    traceparent: str
    stage: Stage = Stage.STAGING
    reason: str = ""
    rolling_out: bool = False
    last_evaluation: str = ""
    judged_unfit: bool = False
    origin: Origin = Origin()
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    updated_at: datetime | None = None
    """None: not since it was made."""
    deleted: bool = False

    @property
    def evaluated(self) -> bool:
        """Whether an evaluation of it has ever passed."""
        return bool(self.evidence.evaluation_id)

    def is_of(self, run_id: str, deliverable: Deliverable) -> bool:
        """Whether what a client registered here is this model of this run: the run agrees, or none was named, and so does the logged
        model or, where one side names none, the path within the run."""
        return _agree(self.journey.run_id, self.origin, run_id, deliverable)

    def is_from(self, run_id: str, origin: Origin) -> bool:
        """Whether this version, made by an evaluation, is what a client registers by these names."""
        return _agree(run_id, origin, self.journey.run_id, self.deliverable)


def _agree(named_run: str, named: Origin, run_id: str, deliverable: Deliverable) -> bool:
    if named_run and named_run != run_id:
        return False
    if named.logged_model and deliverable.logged_model:
        return named.logged_model == deliverable.logged_model
    return bool(named_run and named.path) and named.path == deliverable.name
