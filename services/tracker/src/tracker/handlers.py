"""The tracker's use cases for runs and data sets. Each is one transaction; none knows SQL, protobuf or Kafka.

Experiments are in `experiments`, what MLflow's API changes of runs in `amendments`, and uploads and models, which talk to the artifact
store as well, in `deliverables`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from servicekit import runtoken
from servicekit.access import EVERY_ROLE, GATEWAY, Caller, require_role
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, Violation
from servicekit.paging import page_size

from tracker.domain import run as rules
from tracker.domain.artifact import Dataset
from tracker.domain.errors import NotAllowed, Problem, Refused, Rejected
from tracker.domain.record import ModelMetric, check_models
from tracker.domain.run import ENDED, DatasetRef, Experiment, Facts, Metric, Run, RunSource, RunStarted, Status
from tracker.domain.tags import RUN_NAME, mean_something, told_by
from tracker.ports import RequestKey, Store, UnitOfWork

WRITERS = ("editor", "admin")
LEASE_EXPIRED = "lease expired"
MAX_INPUTS = 1_000


@dataclass(frozen=True, slots=True)
class RunView:
    """A run with what it has logged."""

    run: Run
    facts: Facts


@dataclass(frozen=True, slots=True)
class NewRun:
    """The command to start a run. Times in milliseconds, 0: now; `lease_seconds` 0: no lease; `user` counts only from a service.

    `name_as_tag`: the name, given or made here, is kept as a tag too, where MLflow's clients look for it.
    """

    experiment_id: int
    name: str = ""
    user: str = ""
    started_ms: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    source: RunSource = field(default_factory=RunSource)
    lease_seconds: int = 0
    fencing_token: int = 0
    request_id: str = ""
    parent_run_id: str = ""
    name_as_tag: bool = False


@contextmanager
def told() -> Iterator[None]:
    """Turns the domain's errors into the kinds that every service shares."""
    try:
        yield
    except Rejected as exc:
        raise Invalid("the input is not valid", [Violation(problem.field, problem.message) for problem in exc.problems]) from exc
    except Refused as exc:
        raise Conflict(str(exc)) from exc
    except NotAllowed as exc:
        raise Forbidden(str(exc)) from exc


def may_read(caller: Caller, run_id: str | None = None) -> None:
    """Raises Forbidden unless the caller may read this run (None: what belongs to no run). A run token reads its own run."""
    if caller.run_id is None:
        require_role(caller, *EVERY_ROLE)
    elif run_id not in (None, caller.run_id):
        raise Forbidden(f"this token is for run {caller.run_id} only")


def may_write(caller: Caller, run: Run) -> None:
    """Raises Forbidden or Conflict unless the caller may write to this run; a run token only while it runs and is not superseded."""
    with told():
        run.check_owner(caller.run_id, caller.fencing_token)
        if caller.run_id is not None:
            run.check_open()
    if caller.run_id is None:
        require_role(caller, *WRITERS)


def found_run(run: Run | None, run_id: str) -> Run:
    if run is None:
        raise NotFound(f"there is no run {run_id}")
    return run


def request_key(caller: Caller, request_id: str) -> RequestKey | None:
    """Raises Invalid for an id that cannot be kept; None for ""."""
    with told():
        if wrong := rules.check_text(request_id, rules.MAX_NAME):
            raise Rejected([Problem("request_id", wrong)])
    return RequestKey(caller.name, request_id) if request_id else None


def found_experiment(experiment: Experiment | None, experiment_id: int) -> Experiment:
    if experiment is None:
        raise NotFound(f"there is no experiment {experiment_id}")
    return experiment


async def end_run(work: UnitOfWork, run: Run, status: Status, finished_ms: int, reason: str) -> Run:
    """Ends a run that is held and emits run.finished or run.failed: once for each end. An end that it has already changes nothing."""
    with told():
        ended = run.finish(status, finished_ms, reason)
    if ended is run:
        return run
    await work.runs.save(ended)
    # Not held: whoever deletes the experiment holds it, and then its runs.
    experiment = found_experiment(await work.experiments.get(run.experiment_id), run.experiment_id)
    await work.emit(await ending(work, ended, experiment))
    return ended


async def ending(work: UnitOfWork, run: Run, experiment: Experiment) -> rules.RunFinished | rules.RunFailed:
    """The event that tells of a run's end, with all that the run has logged by now."""
    if run.status is not Status.FINISHED:
        return rules.ending(run, experiment.name, Facts())
    facts = (await work.runs.facts([run.run_id]))[run.run_id]
    return rules.ending(run, experiment.name, facts, await work.conversions.waiting(run.run_id))


def no_training_on(asked: Dataset, holdout: Dataset) -> str:
    """Why a run does not get the version that it asked for: a holdout has its content."""
    same = (asked.name, asked.version) == (holdout.name, holdout.version)
    what = "a holdout" if same else f"the same content as the holdout {holdout.name} version {holdout.version}"
    return f"{asked.name} version {asked.version} is {what}: models are judged on it, so no run may read it"


BeforeEnd = Callable[[Caller, str], Awaitable[None]]
"""What is done to a run before it ends well, outside of the transaction in which it ends. Repeatable."""


async def nothing_before(caller: Caller, run_id: str) -> None:
    """For a tracker without an object store."""


class Tracker:
    """Runs, metrics and data sets."""

    def __init__(
        self, store: Store, clock: Clock, ids: Ids, *, token_secret: str, token_ttl: timedelta, before_end: BeforeEnd = nothing_before
    ) -> None:
        self._before_end = before_end
        self._store = store
        self._clock = clock
        self._ids = ids
        self._token_secret = token_secret
        self._token_ttl = token_ttl

    async def create_run(self, caller: Caller, command: NewRun) -> tuple[RunView, str]:
        """Starts a run and answers it with its token.

        With a request id that this caller gave before it answers that run; a higher fencing token takes it over, a lower one
        raises Conflict.
        """
        require_role(caller, *WRITERS)
        command = self._checked(caller, command)
        request = request_key(caller, command.request_id)
        run_id = self._ids.hex32()
        run = Run(
            run_id=run_id,
            experiment_id=command.experiment_id,
            name=command.name or f"run-{run_id[:8]}",
            user=command.user,
            status=Status.RUNNING,
            lifecycle_stage="active",
            started_ms=command.started_ms or self._now_ms(),
            finished_ms=0,
            source=command.source,
            reason="",
            parent_run_id=command.parent_run_id,
            lease_seconds=command.lease_seconds,
            fencing_token=command.fencing_token,
            event_sequence=1,
        )
        run = told_by(run, command.tags)
        async with self._store.transaction() as work:
            experiment = found_experiment(await work.experiments.share(command.experiment_id), command.experiment_id)
            with told():
                experiment.check_active()
            if command.parent_run_id and await work.runs.get(command.parent_run_id) is None:
                raise NotFound(f"there is no run {command.parent_run_id}")
            if await work.runs.add(run, request):
                await work.runs.log_tags(run_id, {**command.tags, RUN_NAME: run.name} if command.name_as_tag else command.tags)
                await work.emit(RunStarted(run, experiment.name))
            elif request is not None:
                run = await self._taken_over(work, request, command.fencing_token)
            facts = await work.runs.facts([run.run_id])
        expires = self._clock.now() + self._token_ttl
        token = runtoken.issue(self._token_secret, run.run_id, run.fencing_token, expires)
        return RunView(run, facts[run.run_id]), token

    async def get_run(self, caller: Caller, run_id: str) -> RunView:
        may_read(caller, run_id)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.get(run_id), run_id)
            return RunView(run, (await work.runs.facts([run_id]))[run_id])

    async def list_runs(
        self, caller: Caller, experiment_id: int, status: str, before: tuple[int, str] | None, limit: int
    ) -> Sequence[RunView]:
        """Newest first; status "" is any."""
        require_role(caller, *EVERY_ROLE)  # not may_read: a run's token shows its own run and no other
        if status and status not in {*Status}:
            raise Invalid("the input is not valid", [Violation("status", f"one of {', '.join(Status)}")])
        async with self._store.transaction() as work:
            runs = await work.runs.page(experiment_id, status, before, page_size(limit))
            facts = await work.runs.facts([run.run_id for run in runs])
        return [RunView(run, facts[run.run_id]) for run in runs]

    async def log_metric(self, caller: Caller, run_id: str, metric: Metric) -> None:
        """One point, as `log_batch` logs it: quicker for a run that runs."""
        with told():
            rules.check_batch([metric], {}, {})
        if caller.run_id is None:
            require_role(caller, *WRITERS)
        if caller.run_id in (None, run_id) and await self._store.log_point(run_id, metric, caller.fencing_token):
            return
        await self.log_batch(caller, run_id, [metric], {}, {})

    async def log_batch(
        self,
        caller: Caller,
        run_id: str,
        metrics: Sequence[Metric],
        params: Mapping[str, str],
        tags: Mapping[str, str],
        of_models: Sequence[ModelMetric] = (),
    ) -> None:
        """All or nothing. Raises Conflict for a param that has another value, Invalid with all that is wrong with the batch.

        `of_models`: those of the metrics that are about a logged model.
        """
        with told():
            rules.check_batch(metrics, params, tags)
            check_models([one.model_id for one in of_models])
        changes_run = mean_something(tags)
        async with self._store.transaction() as work:
            run = found_run(await (work.runs.lock(run_id) if changes_run else work.runs.share(run_id)), run_id)
            may_write(caller, run)
            with told():
                run.check_active()
            if params and (changed := await work.runs.log_params(run_id, params)):
                violations = [Violation(f"params[{key!r}]", f"is {old[:100]!r} and never changes") for key, old in changed.items()]
                raise Conflict(f"params of run {run_id} cannot be changed", violations[:20])
            if metrics:
                await work.runs.log_metrics(run_id, metrics)
            if of_models:
                await work.records.log_model_metrics(run_id, of_models)
            if tags:
                await work.runs.log_tags(run_id, tags)
            if changes_run:
                await work.runs.save(told_by(run, tags))

    async def finish_run(
        self, caller: Caller, run_id: str, status: str, finished_ms: int, reason: str, fencing_token: int | None = None
    ) -> RunView:
        """Ends a run and emits run.finished or run.failed. Repeating it with the same status changes nothing.

        The run of a training is ended by the trainer alone: it knows how the process ended.
        """
        if status not in {*Status} or Status(status) not in ENDED:
            raise Invalid("the input is not valid", [Violation("status", "FINISHED, FAILED or KILLED")])
        if not 0 <= finished_ms <= rules.MAX_TIME_MS:
            raise Invalid("the input is not valid", [Violation("finished_ms", "milliseconds since 1970; 0: now")])
        reason = reason.replace("\x00", "")[: rules.MAX_PARAM]
        if status == Status.FINISHED:
            await self._before_end(caller, run_id)
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            with told():
                run.check_owner(caller.run_id, caller.fencing_token if fencing_token is None else fencing_token)
            if caller.run_id is None:
                require_role(caller, *WRITERS)
            if run.source.training_id and caller.service == GATEWAY:
                raise Forbidden(f"training {run.source.training_id} ends this run; cancel the training instead")
            if not run.ended:
                with told():
                    run.check_active()
            run = await end_run(work, run, Status(status), finished_ms or self._now_ms(), reason)
            return RunView(run, (await work.runs.facts([run_id]))[run_id])

    async def ping(self) -> None:
        """Raises when the store does not answer."""
        async with self._store.transaction() as work:
            await work.experiments.get(0)

    async def fail_expired(self, limit: int = 50) -> int:
        """Ends runs whose lease is over by the database's clock; returns how many. Safe to run in several processes at once."""
        async with self._store.transaction() as work:
            expired = await work.runs.lock_expired(limit)
            for run, now_ms in expired:
                await end_run(work, run, Status.FAILED, now_ms, LEASE_EXPIRED)
        return len(expired)

    async def renew_lease(self, caller: Caller, run_id: str, fencing_token: int | None = None) -> datetime:
        """Raises Conflict when the run has ended, has no lease, or belongs to a newer attempt."""
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            may_write(caller, run)
            with told():
                run.check_owner(None, fencing_token)
                run.check_open()
            if not run.lease_seconds:
                raise Conflict(f"run {run_id} has no lease")
            return await work.runs.renew_lease(run)

    async def metric_history(self, caller: Caller, run_id: str, key: str, after: Metric | None, limit: int) -> Sequence[Metric]:
        """Points of one metric by step, time and value."""
        may_read(caller, run_id)
        async with self._store.transaction() as work:
            found_run(await work.runs.get(run_id), run_id)
            return await work.runs.history(run_id, key, after, page_size(limit))

    async def log_inputs(self, caller: Caller, run_id: str, inputs: Sequence[DatasetRef]) -> None:
        """Says which data set versions a run reads. A hash, when given, must be that version's. Repeatable.

        Raises Conflict for a holdout.
        """
        if len(inputs) > MAX_INPUTS:
            raise Invalid("the input is not valid", [Violation("inputs", f"at most {MAX_INPUTS}")])
        async with self._store.transaction() as work:
            run = found_run(await work.runs.share(run_id), run_id)
            may_write(caller, run)
            with told():
                run.check_open()
            refs = []
            for asked in inputs:
                dataset = await work.datasets.get(asked.name, asked.version) if asked.version > 0 else None
                if dataset is None:
                    raise NotFound(f"there is no data set {asked.name} version {asked.version}")
                if asked.sha256 not in ("", dataset.blob.sha256):
                    raise Conflict(f"data set {asked.name} version {asked.version} has the hash {dataset.blob.sha256}")
                if holdout := await work.datasets.holdout_of(dataset.blob.sha256):
                    raise Conflict(f"{no_training_on(dataset, holdout)}; train on other rows")
                refs.append(DatasetRef(dataset.name, dataset.version, dataset.blob.sha256))
            await work.runs.log_inputs(run_id, refs)

    async def get_dataset(self, caller: Caller, name: str, version: int) -> Dataset:
        """Version 0 is the newest."""
        may_read(caller)
        async with self._store.transaction() as work:
            dataset = await work.datasets.get(name, version) if version >= 0 else None
        if dataset is None:
            raise NotFound(f"there is no data set {name}{f' version {version}' if version else ''}")
        return dataset

    async def list_datasets(self, caller: Caller) -> Sequence[Dataset]:
        may_read(caller)
        async with self._store.transaction() as work:
            return await work.datasets.all()

    async def _taken_over(self, work: UnitOfWork, request: RequestKey, fencing_token: int) -> Run:
        run = found_run(await work.runs.lock_by_request(request), f"of request {request.request_id}")
        with told():
            run.check_owner(None, fencing_token)
        if run.ended:
            return run
        if fencing_token > run.fencing_token:
            run = dataclasses.replace(run, fencing_token=fencing_token)
            await work.runs.save(run)
        if run.lease_seconds:
            await work.runs.renew_lease(run)
        return run

    def _checked(self, caller: Caller, command: NewRun) -> NewRun:
        if caller.service == GATEWAY:
            # An end user is who the gateway says, and only a trainer can know that a training started a run.
            if command.source.training_id or command.fencing_token:
                raise Forbidden("source.training_id and fencing_token are set by a trainer only")
            command = dataclasses.replace(command, user=caller.subject)
        source = command.source
        texts = {"user": command.user, "source.commit": source.commit, "source.command": source.command, "source.diff_key": source.diff_key}
        with told():
            rules.check_start(command.name, command.started_ms, command.lease_seconds, command.fencing_token, command.tags, texts)
        return command

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)
