"""Use cases that MLflow's API has and Headrace's own does not: runs are renamed, reopened, deleted, restored, lose tags, and have their
inputs and outputs described. Each is one transaction, by the rules that all runs have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from servicekit.access import GATEWAY, Caller, require_role
from servicekit.clock import Clock
from servicekit.errors import Forbidden, Invalid, NotFound, Violation

from tracker.domain import run as rules
from tracker.domain.errors import Problem, Rejected
from tracker.domain.record import DatasetInput, ModelOutput, Record, check_dataset_inputs, check_models
from tracker.domain.run import Run, Status
from tracker.domain.tags import LOGGED_MODELS, PARENT, RUN_NAME, told_by
from tracker.handlers import WRITERS, BeforeEnd, end_run, found_run, may_read, may_write, nothing_before, told
from tracker.ports import Store, UnitOfWork

MAX_LOGGED_MODELS = 200_000
"""Characters that the history of models logged by old clients may take."""


class Amendments:
    """Runs as MLflow's API reads and changes them."""

    def __init__(self, store: Store, clock: Clock, before_end: BeforeEnd = nothing_before) -> None:
        self._before_end = before_end
        self._store = store
        self._clock = clock

    async def record(self, caller: Caller, run_id: str) -> Record:
        """A run with all that it logged; deleted ones too."""
        may_read(caller, run_id)
        async with self._store.transaction() as work:
            record = await work.records.get(run_id)
        if record is None:
            raise NotFound(f"Run with id={run_id} not found")
        return record

    async def update(self, caller: Caller, run_id: str, status: Status | None, finished_ms: int | None, name: str) -> Run:
        """Changes status, end and name of a run; None and "" leave them. Repeatable.

        FINISHED, FAILED and KILLED end it, which emits an event. A run that has ended is reopened by RUNNING and by another end: that
        is the next one. The status of a run that a training started is the trainer's to say: what its script says of it is left
        aside. Raises Conflict when the run is deleted, or has ended and the caller has no more than its token: reopening is a
        person's decision.
        """
        with told():
            problems = rules.check_name("run_name", name, required=False)
            if finished_ms is not None and not 0 <= finished_ms <= rules.MAX_TIME_MS:
                problems.append(Problem("end_time", "milliseconds since 1970, before the year 10000"))
            if problems:
                raise Rejected(problems)
        if status is Status.FINISHED:
            await self._before_end(caller, run_id)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            if caller.run_id == run_id and run.ended and status is run.status:
                return run  # said again, and a token changes nothing of a run that has ended
            may_write(caller, run)
            with told():
                run.check_active()
            if name and name != run.name:
                run = dataclasses.replace(run, name=name)
                await work.runs.log_tags(run_id, {RUN_NAME: name})
                await work.runs.save(run)
            if status is None and finished_ms is None:
                return run
            if run.source.training_id and caller.service == GATEWAY:
                if caller.run_id is None and status not in (None, run.status):
                    raise Forbidden(f"training {run.source.training_id} ends this run; cancel the training instead")
                return run
            return await self._move(work, run, status or run.status, finished_ms)

    async def delete(self, caller: Caller, run_id: str) -> None:
        """Repeatable. Raises Conflict while a training runs it."""
        require_role(caller, *WRITERS)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            with told():
                await work.runs.save(run.delete(self._now_ms()))

    async def restore(self, caller: Caller, run_id: str) -> None:
        """Repeatable."""
        require_role(caller, *WRITERS)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            await work.runs.save(run.restore())

    async def delete_tag(self, caller: Caller, run_id: str, key: str) -> None:
        """Raises NotFound when the run has no such tag."""
        async with self._store.transaction() as work:
            run = await self._writable(work, caller, run_id)
            if not await work.runs.delete_tag(run_id, key):
                raise NotFound(f"No tag with name: {key[: rules.MAX_KEY]} in run with id {run_id}")
            if key == PARENT:
                await work.runs.save(told_by(run, {PARENT: ""}))

    async def log_inputs(self, caller: Caller, run_id: str, datasets: Sequence[DatasetInput], model_ids: Sequence[str]) -> None:
        """Says what a run reads, in a client's words. Repeatable: what is known of a data set already stays."""
        with told():
            check_dataset_inputs(datasets)
            check_models(model_ids)
        async with self._store.transaction() as work:
            run = await self._writable(work, caller, run_id)
            await work.records.log_datasets(run, datasets)
            await work.records.log_model_inputs(run_id, model_ids)

    async def log_outputs(self, caller: Caller, run_id: str, outputs: Sequence[ModelOutput]) -> None:
        """Says which logged models a run made. Repeatable."""
        with told():
            check_models([one.model_id for one in outputs])
            if wrong := [index for index, one in enumerate(outputs) if one.step not in rules.INT64]:
                raise Rejected([Problem(f"models[{wrong[0]}].step", "a 64-bit integer")])
        async with self._store.transaction() as work:
            await self._writable(work, caller, run_id)
            await work.records.log_model_outputs(run_id, outputs)

    async def record_model(self, caller: Caller, run_id: str, model: Mapping[str, Any]) -> None:
        """Adds what an older client says of a model to the tag that such clients read. Repeatable: what is there is not added again."""
        async with self._store.transaction() as work:
            await self._writable(work, caller, run_id)
            history = _history(await work.runs.tag(run_id, LOGGED_MODELS))
            if model in history:
                return
            value = json.dumps([*history, model])
            if len(value) > MAX_LOGGED_MODELS:
                raise Invalid(
                    "the input is not valid", [Violation("model_json", f"the models of a run take {MAX_LOGGED_MODELS} characters")]
                )
            await work.runs.log_tags(run_id, {LOGGED_MODELS: value})

    async def _move(self, work: UnitOfWork, run: Run, status: Status, finished_ms: int | None) -> Run:
        if run.ended and status is not run.status:
            run = run.reopen()
        if status in rules.ENDED and not run.ended:
            return await end_run(work, run, status, self._now_ms() if finished_ms is None else finished_ms, "")
        run = dataclasses.replace(run, status=status, finished_ms=run.finished_ms if finished_ms is None else finished_ms)
        await work.runs.save(run)
        return run

    async def _writable(self, work: UnitOfWork, caller: Caller, run_id: str) -> Run:
        run = found_run(await work.runs.lock(run_id), run_id)
        may_write(caller, run)
        with told():
            run.check_active()
        return run

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _history(value: str | None) -> list[Any]:
    """The models that the tag holds. Raises Invalid when something else set it."""
    try:
        history = json.loads(value or "[]")
    except (ValueError, RecursionError):
        history = None
    if not isinstance(history, list):
        raise Invalid(f"the tag {LOGGED_MODELS} of this run is not a list of models; delete it first")
    return history
