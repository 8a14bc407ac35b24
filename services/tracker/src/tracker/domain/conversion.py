"""A model that MLflow logged in a form that is not delivered, and which of a run's is worth the work of converting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.domain.model import DeliverableModel

CANDIDATE_TAG = "headrace.candidate"
"""The tag by which a run with several models names the one to deliver."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Lies at `folder` among the artifacts of `owner`, a run or a logged model; becomes the deliverable model `name`."""

    owner: str
    folder: str
    name: str
    flavors: tuple[str, ...]


def wanted(waiting: Sequence[Conversion], models: Sequence[DeliverableModel], named: str, parent_run_id: str) -> Conversion | None:
    """The one that would make its run a candidate. `named` is the run's tag CANDIDATE_TAG, or "".

    None for a part of another run, which is never one, for a run that has what it needs, and when it is not clear which of several.
    """
    if parent_run_id:
        return None
    if named:
        if any(model.name == named for model in models):
            return None
        waiting = [one for one in waiting if one.name == named]
    elif models:
        return None
    return waiting[0] if len(waiting) == 1 else None
