"""Whose artifacts: a run's or a logged model's, and who may read, write and take away which of them.

MLflow lets clients log to a run that has ended, and so do we, since nothing is delivered from it any more but what was copied at its end.
Three things stay as they are: all of a deleted run, all that a training left behind, and the files of which a deliverable model was made.
"""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.access import EVERY_ROLE, GATEWAY, Caller, require_role
from servicekit.errors import Conflict, Forbidden, NotFound

from tracker.domain.artifact import Artifact, is_model_id
from tracker.domain.logged_model import LoggedModel
from tracker.domain.model import DeliverableModel
from tracker.domain.run import Run
from tracker.handlers import WRITERS, found_run, may_write, told
from tracker.ports import UnitOfWork


@dataclass(frozen=True, slots=True)
class Owner:
    """A run or a logged model; then `run` is the run that made it, if one did."""

    id: str
    experiment_id: int
    run: Run | None
    model: LoggedModel | None = None


def found_model(model: LoggedModel | None, model_id: str) -> LoggedModel:
    """Raises NotFound, also for one that is deleted."""
    if model is None or model.lifecycle_stage != "active":
        raise NotFound(f"Logged model with ID {model_id[:100]!r} not found.")
    return model


async def readable(work: UnitOfWork, caller: Caller, owner: str) -> Owner:
    """The owner, if the caller may read its artifacts. A run token reads its own run and the models that this run made."""
    found = await _found(work, owner, hold=False)
    if caller.run_id is None:
        require_role(caller, *EVERY_ROLE)
    elif found.run is None or found.run.run_id != caller.run_id:
        raise Forbidden(f"this token is for run {caller.run_id} only")
    return found


async def writable(work: UnitOfWork, caller: Caller, owner: str) -> Owner:
    """The owner, held, if the caller may write to its artifacts: editors; a run token while its run runs; a trainer."""
    found = await _found(work, owner, hold=True)
    run = found.run
    if run is None:
        may_write_alone(caller)
        return found
    may_write(caller, run)
    with told():
        run.check_active()
    if caller.service == GATEWAY and run.ended and run.source.training_id:
        raise Conflict(f"run {run.run_id} was trained and has ended: what its training left stays as it is")
    return found


def may_write_alone(caller: Caller) -> None:
    """Raises Forbidden unless the caller may write what belongs to no run."""
    if caller.run_id is not None:
        raise Forbidden(f"this token is for run {caller.run_id} only")
    require_role(caller, *WRITERS)


async def check_replaceable(work: UnitOfWork, owner: Owner, there: Artifact) -> None:
    """Raises Conflict when an artifact must not be replaced or taken away: a deliverable model was made of it."""
    if owner.run is None:
        return
    for model in (await work.runs.facts([owner.run.run_id]))[owner.run.run_id].models:
        if _made_of(model, owner, there):
            raise Conflict(f"{there.path} is what the deliverable model {model.name!r} was made of, and stays; log under another name")


def _made_of(model: DeliverableModel, owner: Owner, there: Artifact) -> bool:
    if owner.model is not None:
        return model.logged_model_id == owner.id
    if model.folder:
        return there.path.startswith(f"{model.folder}/")
    # What the SDK logs may be logged again until the run ends: the last of a name counts.
    ended = owner.run is not None and owner.run.ended
    return ended and there.object.sha256 in (model.blob.sha256, model.samples.sha256 if model.samples else "")


async def _found(work: UnitOfWork, owner: str, *, hold: bool) -> Owner:
    if is_model_id(owner):
        model = found_model(await work.logged_models.get(owner), owner)
        run = await _run(work, model.source_run_id, hold) if model.source_run_id else None
        if hold:
            # After its run, always: who holds the two in this order never waits in a circle.
            model = found_model(await work.logged_models.lock(owner), owner)
        return Owner(owner, model.experiment_id, run, model)
    run = await _run(work, owner, hold)
    return Owner(owner, run.experiment_id, run)


async def _run(work: UnitOfWork, run_id: str, hold: bool) -> Run:
    return found_run(await (work.runs.share(run_id) if hold else work.runs.get(run_id)), run_id)
