"""Versions of a model: what was made, from what, how it was judged, and in which stage it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evaluation a version stands on: which, and against which champion (0: there was none)."""

    evaluation_id: str
    champion_version: int
    champion_sha256: str
    report_key: str


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
    """A version. Number, run, file and author never change; stage, reason and evidence do, each change with a row in the audit log.

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
