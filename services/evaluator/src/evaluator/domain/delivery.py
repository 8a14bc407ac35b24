"""The deliveries in force, as far as the evaluator is concerned: which one claims an experiment, and by which policy it judges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from servicekit.errors import Invalid

from evaluator.domain import policy
from evaluator.domain.evaluation import Claim


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One delivery at one revision. `evaluate_json` is empty when its file has no such section."""

    name: str
    revision: int
    deleted: bool
    experiment: str
    model: str
    evaluate_json: str
    applied_at: datetime


class Deliveries:
    """Of each delivery the highest revision. Implements `ports.Claims`; lives in memory, and in one event loop."""

    def __init__(self) -> None:
        self._newest: dict[str, Snapshot] = {}

    def record(self, snapshot: Snapshot) -> None:
        """Takes a snapshot in, unless a newer one of its delivery is known: they come again, and not always in order."""
        known = self._newest.get(snapshot.name)
        if known is None or snapshot.revision > known.revision:
            self._newest[snapshot.name] = snapshot

    def of_experiment(self, experiment: str) -> Claim | None:
        claims = [one for one in self._newest.values() if not one.deleted and one.evaluate_json and one.experiment == experiment]
        if not claims:
            return None
        # The registry lets one delivery claim an experiment; while a claim moves from one to the other, both may be seen for a moment.
        return _claim(max(claims, key=lambda one: one.applied_at))


def _claim(snapshot: Snapshot) -> Claim:
    try:
        found = policy.parse(json.loads(snapshot.evaluate_json))
    except (Invalid, ValueError) as error:
        return Claim(snapshot.name, snapshot.revision, snapshot.model, None, str(error))
    return Claim(snapshot.name, snapshot.revision, snapshot.model, found)
