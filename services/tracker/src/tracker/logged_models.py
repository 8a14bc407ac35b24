"""The use cases of logged models: made, described, finalized, searched, deleted. Their files are in `artifacts`, and what becomes of one
that is ready in `adoption`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from servicekit.access import Caller
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, Invalid, NotFound, Violation

from tracker import owners
from tracker.adoption import Adoption
from tracker.domain import logged_model as rules
from tracker.domain.errors import Problem, Rejected
from tracker.domain.filters import Kind, parse_filter, parse_order_by
from tracker.domain.logged_model import LOGGED_MODELS, LoggedModel, LoggedModelView, ModelOrder, ModelSearch, ModelStatus, OnDataset
from tracker.domain.run import MAX_NAME, MAX_PARAM, MAX_TAG, check_text, check_texts
from tracker.handlers import found_experiment, found_run, may_read, may_write, told
from tracker.ports import Store, UnitOfWork

MAX_EXPERIMENTS = 1_000
MAX_RESULTS = 1_000
DEFAULT_RESULTS = 100
MAX_OFFSET = 1_000_000


@dataclass(frozen=True, slots=True)
class NewModel:
    """The command to make a logged model. A name is given when there is none."""

    experiment_id: int
    name: str
    model_type: str
    source_run_id: str
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ordering:
    """A key to order by, as clients write it."""

    field: str
    ascending: bool
    dataset: OnDataset | None


class LoggedModels:
    """Logged models."""

    def __init__(self, store: Store, adoption: Adoption, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._adoption = adoption
        self._clock = clock
        self._ids = ids

    async def create(self, caller: Caller, command: NewModel) -> LoggedModelView:
        """Makes one, PENDING. Not repeatable: the wire has no id for it, and one that is never finalized does no harm."""
        model_id = f"m-{self._ids.hex32()}"
        name = command.name or f"model-{model_id[2:10]}"
        problems = rules.check_model_name(name) + _check(command.params, command.tags)
        if wrong := check_text(command.model_type, MAX_NAME):
            problems.append(Problem("model_type", wrong))
        with told():
            if problems:
                raise Rejected(problems[:20])
        now_ms = self._now_ms()
        model = LoggedModel(
            model_id, command.experiment_id, name, command.model_type, command.source_run_id, caller.name, ModelStatus.PENDING, "active",
            now_ms, now_ms,
        )  # fmt: skip
        async with self._store.transaction() as work:
            if command.source_run_id:
                run = found_run(await work.runs.share(command.source_run_id), command.source_run_id)
                may_write(caller, run)
                with told():
                    run.check_active()
            else:
                owners.may_write_alone(caller)
            experiment = found_experiment(await work.experiments.share(command.experiment_id), command.experiment_id)
            with told():
                experiment.check_active()
            await work.logged_models.add(model)
            await work.logged_models.log_params(model_id, command.params)
            await work.logged_models.set_tags(model_id, command.tags)
            return (await work.logged_models.views([model]))[0]

    async def get(self, caller: Caller, model_id: str, *, deleted: bool = False) -> LoggedModelView:
        """One of them; `deleted` also when it was deleted."""
        async with self._store.transaction() as work:
            model = await work.logged_models.get(model_id)
            if model is None or not deleted:
                model = owners.found_model(model, model_id)
            may_read(caller, model.source_run_id)
            return (await work.logged_models.views([model]))[0]

    async def finalize(self, caller: Caller, model_id: str, status: str) -> LoggedModelView:
        """Says that all its files are there, or never will be. Repeatable. One that is ready is looked at: it may be delivered."""
        if status not in (ModelStatus.READY, ModelStatus.FAILED):
            raise Invalid("the input is not valid", [Violation("status", "LOGGED_MODEL_READY or LOGGED_MODEL_UPLOAD_FAILED")])
        async with self._store.transaction() as work:
            model = await self._held(work, caller, model_id)
            with told():
                final = model.finalize(ModelStatus(status), self._now_ms())
        if final.status is ModelStatus.READY:
            await self._adoption.of_model(caller, final)
        else:
            async with self._store.transaction() as work:
                held = await self._held(work, caller, model_id)
                with told():
                    await work.logged_models.save(held.finalize(ModelStatus.FAILED, self._now_ms()))
        return await self.get(caller, model_id)

    async def delete(self, caller: Caller, model_id: str) -> None:
        """Its files stay until they are collected. Repeating it is NotFound."""
        async with self._store.transaction() as work:
            model = await self._held(work, caller, model_id)
            await work.logged_models.save(model.delete(self._now_ms()))

    async def log_params(self, caller: Caller, model_id: str, params: Mapping[str, str]) -> None:
        """Repeatable. Raises Conflict for a param that has another value."""
        with told():
            if problems := _check(params, {}):
                raise Rejected(problems[:20])
        async with self._store.transaction() as work:
            await self._held(work, caller, model_id)
            if changed := await work.logged_models.log_params(model_id, params):
                violations = [Violation(f"params[{key!r}]", f"is {old[:100]!r} and never changes") for key, old in changed.items()]
                raise Conflict(f"params of model {model_id} cannot be changed", violations[:20])

    async def set_tags(self, caller: Caller, model_id: str, tags: Mapping[str, str]) -> None:
        with told():
            if problems := _check({}, tags):
                raise Rejected(problems[:20])
        async with self._store.transaction() as work:
            await self._held(work, caller, model_id)
            await work.logged_models.set_tags(model_id, tags)

    async def delete_tag(self, caller: Caller, model_id: str, key: str) -> None:
        async with self._store.transaction() as work:
            await self._held(work, caller, model_id)
            if "\x00" in key or not await work.logged_models.delete_tag(model_id, key):
                raise NotFound(f"No tag with key {key[:100]!r} found for model with ID {model_id!r}.")

    async def search(
        self,
        caller: Caller,
        experiment_ids: Sequence[int],
        where: str,
        datasets: Sequence[OnDataset],
        order_by: Sequence[Ordering],
        limit: int,
        page_token: str,
    ) -> tuple[Sequence[LoggedModelView], str]:
        """A page of them, and the token of the next, "" when there is none. A run token finds those that its own run made."""
        may_read(caller)
        limit = limit or DEFAULT_RESULTS
        if not 1 <= limit <= MAX_RESULTS:
            raise Invalid("the input is not valid", [Violation("max_results", f"1 to {MAX_RESULTS}")])
        if len(experiment_ids) > MAX_EXPERIMENTS:
            raise Invalid("the input is not valid", [Violation("experiment_ids", f"at most {MAX_EXPERIMENTS}")])
        if not all(dataset.name for dataset in datasets):
            raise Invalid("`dataset_name` in the `datasets` clause must be specified.")
        asked = hashlib.sha256(repr((sorted(experiment_ids), where, datasets, order_by)).encode()).hexdigest()[:16]
        with told():
            search = ModelSearch(
                tuple(experiment_ids),
                parse_filter(where, LOGGED_MODELS),
                tuple(datasets),
                _ordered(order_by),
                caller.run_id or "",
                _offset(page_token, asked),
                limit + 1,
            )
        async with self._store.transaction() as work:
            found = await work.logged_models.search(search)
            views = await work.logged_models.views(found[:limit])
        return views, _token(search.offset + limit, asked) if len(found) > limit else ""

    async def _held(self, work: UnitOfWork, caller: Caller, model_id: str) -> LoggedModel:
        model = (await owners.writable(work, caller, model_id)).model
        return owners.found_model(model, model_id)

    def _now_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _check(params: Mapping[str, str], tags: Mapping[str, str]) -> list[Problem]:
    problems = check_texts("params", params, MAX_PARAM) + check_texts("tags", tags, MAX_TAG)
    if len(params) > rules.MAX_PARAMS:
        problems.append(Problem("params", f"at most {rules.MAX_PARAMS}"))
    if len(tags) > rules.MAX_TAGS:
        problems.append(Problem("tags", f"at most {rules.MAX_TAGS}"))
    return problems


def _ordered(order_by: Sequence[Ordering]) -> tuple[ModelOrder, ...]:
    """The names of clients have no quotes: what follows `metrics.` is the whole key. Raises Rejected."""
    found = []
    for order in order_by:
        kind, dot, key = order.field.partition(".")
        if dot and kind == "metrics":
            found.append(ModelOrder(Kind.METRIC, key.strip("`"), order.ascending, order.dataset))
        elif dot:
            raise Rejected([Problem("order_by", f"Invalid order by field name: {order.field[:100]}. Only metrics are supported.")])
        else:
            known = parse_order_by([order.field], LOGGED_MODELS)[0]
            found.append(ModelOrder(known.kind, known.key, order.ascending))
    return tuple(found)


def _token(offset: int, asked: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([offset, asked]).encode()).decode()


def _offset(token: str, asked: str) -> int:
    """Raises Rejected for a token that was not made for this search."""
    if not token:
        return 0
    try:
        offset, made_for = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, TypeError, RecursionError):
        raise Rejected([Problem("page_token", "is none of ours")]) from None
    if made_for != asked or type(offset) is not int or not 0 < offset <= MAX_OFFSET:
        raise Rejected([Problem("page_token", "was made for another search")])
    return offset
