"""Tags that MLflow's clients set and that say something about the run itself: its name, its parent, where its code came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tracker.domain.run import MAX_NAME, MAX_PARAM, Run

RUN_NAME = "mlflow.runName"
PARENT = "mlflow.parentRunId"
COMMIT = "mlflow.source.git.commit"
COMMAND = "mlflow.source.name"
LOGGED_MODELS = "mlflow.log-model.history"

_MEANINGFUL = frozenset({RUN_NAME, PARENT, COMMIT, COMMAND})


def mean_something(tags: Mapping[str, str]) -> bool:
    """Whether a run is another with these tags than without them."""
    return not _MEANINGFUL.isdisjoint(tags)


def told_by(run: Run, tags: Mapping[str, str]) -> Run:
    """The run as its tags tell of it.

    A name holds at any time. Parent and source do not change after the run's end, which an event has told; and the source of a run
    that a training started is what the trainer says.
    """
    if name := tags.get(RUN_NAME):
        run = dataclasses.replace(run, name=name[:MAX_NAME])
    if run.ended:
        return run
    if PARENT in tags:
        run = dataclasses.replace(run, parent_run_id=tags[PARENT])
    if not run.source.training_id:
        source = dataclasses.replace(
            run.source,
            commit=tags.get(COMMIT, run.source.commit)[:MAX_PARAM],
            command=tags.get(COMMAND, run.source.command)[:MAX_PARAM],
        )
        run = dataclasses.replace(run, source=source)
    return run
