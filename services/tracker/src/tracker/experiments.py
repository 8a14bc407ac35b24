"""The tracker's use cases for experiments: made, found, renamed, deleted and restored with their runs, tagged. Each is one transaction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from servicekit.access import Caller, require_role
from servicekit.clock import Clock
from servicekit.errors import AlreadyExists, Conflict, NotFound
from servicekit.paging import page_size

from tracker.domain import run as rules
from tracker.domain.errors import Problem, Rejected
from tracker.domain.run import Experiment
from tracker.handlers import WRITERS, found_experiment, may_read, request_key, told
from tracker.ports import Store, UnitOfWork


class Experiments:
    """Experiments and their tags."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Caller, name: str, request_id: str, tags: Mapping[str, str] | None = None) -> Experiment:
        """Raises AlreadyExists when another request made one of this name, or it has this name and is deleted."""
        require_role(caller, *WRITERS)
        tags = tags or {}
        with told():
            problems = rules.check_name("name", name) + rules.check_texts("tags", tags, rules.MAX_EXPERIMENT_TAG)
            if len(tags) > rules.MAX_TAGS:
                problems.append(Problem("tags", f"at most {rules.MAX_TAGS}, these are {len(tags)}"))
            if problems:
                raise Rejected(problems[:20])
        request = request_key(caller, request_id)
        async with self._store.transaction() as work:
            if made := await work.experiments.add(name, self._now_ms(), request):
                await work.experiments.set_tags(made.id, tags)
                return dataclasses.replace(made, tags=dict(tags))
            if request is not None and (before := await work.experiments.by_request(request)):
                return before
        raise AlreadyExists(_taken(name))

    async def get(self, caller: Caller, experiment_id: int, name: str) -> Experiment:
        """By name, or by id when that is empty; deleted ones too."""
        may_read(caller)
        async with self._store.transaction() as work:
            experiment = await (work.experiments.by_name(name) if name else work.experiments.get(experiment_id))
        if name and experiment is None:
            raise NotFound(f"there is no experiment {name!r}")
        return found_experiment(experiment, experiment_id)

    async def page(self, caller: Caller, after_id: int, limit: int) -> Sequence[Experiment]:
        """By id, those after `after_id`."""
        may_read(caller)
        async with self._store.transaction() as work:
            return await work.experiments.page(after_id, page_size(limit))

    async def rename(self, caller: Caller, experiment_id: int, name: str) -> None:
        """Repeatable. Raises AlreadyExists when another has the name, Conflict when this one is deleted.

        Deliveries name experiments: what claims the old name does not follow.
        """
        require_role(caller, *WRITERS)
        with told():
            if problems := rules.check_name("new_name", name):
                raise Rejected(problems)
        async with self._store.transaction() as work:
            experiment = await self._held(work, experiment_id)
            with told():
                experiment.check_active()
            if experiment.name == name:
                return
            if not await work.experiments.save(dataclasses.replace(experiment, name=name, last_update_ms=self._now_ms())):
                raise AlreadyExists(_taken(name))

    async def delete(self, caller: Caller, experiment_id: int) -> None:
        """Deletes it with its runs; both can be restored. Raises NotFound when it is deleted already, Conflict while a training runs."""
        require_role(caller, *WRITERS)
        async with self._store.transaction() as work:
            experiment = await self._held(work, experiment_id)
            if experiment.lifecycle_stage != "active":
                raise NotFound(f"there is no active experiment {experiment_id}")
            if await work.experiments.in_training(experiment_id):
                raise Conflict(f"a training runs in experiment {experiment.name!r}; cancel it first")
            await self._move(work, experiment, "deleted")

    async def restore(self, caller: Caller, experiment_id: int) -> None:
        """Restores it with all its runs. Raises NotFound when it is not deleted."""
        require_role(caller, *WRITERS)
        async with self._store.transaction() as work:
            experiment = await self._held(work, experiment_id)
            if experiment.lifecycle_stage != "deleted":
                raise NotFound(f"there is no deleted experiment {experiment_id}")
            await self._move(work, experiment, "active")

    async def set_tag(self, caller: Caller, experiment_id: int, key: str, value: str) -> None:
        """Repeatable."""
        require_role(caller, *WRITERS)
        with told():
            if problems := rules.check_texts("tags", {key: value}, rules.MAX_EXPERIMENT_TAG):
                raise Rejected(problems)
        async with self._store.transaction() as work:
            experiment = await self._held(work, experiment_id)
            with told():
                experiment.check_active()
            await work.experiments.set_tags(experiment_id, {key: value})

    async def delete_tag(self, caller: Caller, experiment_id: int, key: str) -> None:
        """Raises NotFound when it has no such tag."""
        require_role(caller, *WRITERS)
        async with self._store.transaction() as work:
            experiment = await self._held(work, experiment_id)
            with told():
                experiment.check_active()
            if not await work.experiments.delete_tag(experiment_id, key):
                raise NotFound(f"No tag with name: {key[: rules.MAX_KEY]} in experiment with id {experiment_id}")

    async def _move(self, work: UnitOfWork, experiment: Experiment, stage: str) -> None:
        now_ms = self._now_ms()
        await work.experiments.save(dataclasses.replace(experiment, lifecycle_stage=stage, last_update_ms=now_ms))
        await work.experiments.move_runs(experiment.id, stage, now_ms if stage == "deleted" else 0)

    async def _held(self, work: UnitOfWork, experiment_id: int) -> Experiment:
        return found_experiment(await work.experiments.lock(experiment_id), experiment_id)

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _taken(name: str) -> str:
    return f"Experiment {name!r} already exists. It may be deleted; then restore it, or choose another name."
