"""Searches over runs and experiments in PostgreSQL. docs/tracking-store.md shows the plans, and why the statements are as they are.

A page of runs is found by walking an index in the order of the answer: of the metric, param or tag that the order begins with, of a param
or tag that the filter holds to one value, or of the start of runs. A run without the value that orders comes last, and stands in no index
of it: so such an order is walked in phases, and a later one is entered when the earlier ones did not fill the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from servicekit.errors import Invalid
from sqlalchemy import Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tracker.adapters import logged
from tracker.adapters.conditions import NUMBER, PREFIX, TEXT, WHOLE, Binds, Column, Conditions, Key, after
from tracker.domain.filters import EVERYTHING, And, Comparison, Filter, Kind, Op, OrderBy
from tracker.domain.run import Experiment
from tracker.domain.search import FoundExperiment, FoundRun, Place, Query

_QUERY_CANCELED = "57014"

_RUN_COLUMNS = {
    "run_id": Column("r.run_id", TEXT),
    "run_name": Column("r.name", TEXT),
    "user_id": Column("r.user_name", TEXT),
    "status": Column("r.status", TEXT),
    "artifact_uri": Column("('mlflow-artifacts:/' || r.experiment_id || '/' || r.run_id || '/artifacts')", TEXT),
    "start_time": Column("r.started_ms", WHOLE),
    "end_time": Column("r.finished_ms", WHOLE, missing="r.finished_ms = 0"),
}
_RUN_TABLES = {Kind.METRIC: "tracker.metric_latest", Kind.PARAM: "tracker.param", Kind.TAG: "tracker.tag"}

_EXPERIMENT_COLUMNS = {
    "experiment_id": Column("CAST(r.id AS text)", TEXT),
    "name": Column("r.name", TEXT),
    "creation_time": Column("r.created_ms", WHOLE),
    "last_update_time": Column("r.last_update_ms", WHOLE),
}
_EXPERIMENT_ORDER = _EXPERIMENT_COLUMNS | {"experiment_id": Column("r.id", WHOLE)}

_DATASETS = """
    coalesce((SELECT json_agg(json_build_object(
            'tags', (SELECT coalesce(json_agg(json_build_object('key', key, 'value', value)), '[]') FROM jsonb_each_text(used.tags)),
            'dataset', json_strip_nulls(json_build_object('name', used.name, 'digest', used.digest,
                'source_type', described.source_type, 'source', described.source,
                'schema', nullif(described.schema, ''), 'profile', nullif(described.profile, '')))) ORDER BY used.position)
        FROM tracker.run_dataset AS used JOIN tracker.described_dataset AS described USING (experiment_id, name, digest)
        WHERE used.run_id = run.run_id), '[]')::text"""
_MODEL_INPUTS = """
    coalesce((SELECT json_agg(json_build_object('model_id', model_id) ORDER BY position)
        FROM tracker.run_model AS own WHERE own.run_id = run.run_id AND direction = 'input'), '[]')::text"""
_MODEL_OUTPUTS = """
    coalesce((SELECT json_agg(json_build_object('model_id', model_id, 'step', step) ORDER BY position)
        FROM tracker.run_model AS own WHERE own.run_id = run.run_id AND direction = 'output'), '[]')::text"""


# As `entrypoints.mlflow.wire` writes it, which a test holds it to. Put together here, a page costs the tracker a third of the work.
_RUN = f"""
    concat('{{"info":{{"run_id":"', run.run_id, '","run_uuid":"', run.run_id, '","run_name":', to_json(run.name),
        ',"experiment_id":"', run.experiment_id, '","user_id":', to_json(run.user_name), ',"status":"', run.status,
        '","start_time":', run.started_ms,
        ',"artifact_uri":"mlflow-artifacts:/', run.experiment_id, '/', run.run_id, '/artifacts","lifecycle_stage":"',
        run.lifecycle_stage, '"',
        CASE WHEN run.finished_ms <> 0 THEN ',"end_time":' || run.finished_ms END,
        '}},"data":{{"metrics":', coalesce(whole.metrics, {logged.METRICS}),
        ',"params":', coalesce(whole.params, {logged.PARAMS}),
        ',"tags":', coalesce(whole.tags, {logged.TAGS}),
        '}},"inputs":{{"dataset_inputs":', {_DATASETS}, ',"model_inputs":', {_MODEL_INPUTS},
        '}},"outputs":{{"model_outputs":', {_MODEL_OUTPUTS}, '}}}}')"""
_RUN_FIELDS = "r.run_id, r.experiment_id, r.name, r.user_name, r.status, r.lifecycle_stage, r.started_ms, r.finished_ms"


class SqlSearches:
    """Implements `searches.SearchStore`. Each page is one read-only transaction."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        """A statement that takes longer than `timeout_s` is ended."""
        self._engine = engine
        self._timeout_s = timeout_s

    async def runs(self, query: Query, place: Place | None, limit: int) -> Sequence[FoundRun]:
        found: list[FoundRun] = []
        if not query.experiments:
            return found
        async with self._engine.begin() as conn:
            await self._bound(conn)
            for phase in _phases(query, place):
                statement, values = phase.statement(limit - len(found))
                found += [FoundRun((*phase.fixed, *place), json) for json, *place in await self._rows(conn, statement, values)]
                if len(found) == limit:
                    break
        return found

    async def experiments(self, query: Query, place: Place | None, limit: int) -> Sequence[FoundExperiment]:
        binds = Binds()
        conditions = Conditions(binds, _EXPERIMENT_COLUMNS, {Kind.TAG: "tracker.experiment_tag"}, "own.experiment_id = r.id", indexed=False)
        keys = [_attribute(one, _EXPERIMENT_ORDER) for one in query.order]
        where = [f"r.lifecycle_stage = ANY ({binds.add(list(query.stages), 'text[]')})", conditions.sql(query.condition)]
        if place is not None:
            where.append(after(binds, keys, place))
        statement = f"""
            SELECT r.id, r.name, r.lifecycle_stage, r.created_ms, r.last_update_ms,
                (SELECT coalesce(jsonb_object_agg(key, value), '{{}}') FROM tracker.experiment_tag AS own
                 WHERE own.experiment_id = r.id) AS tags,
                {", ".join(f"{key.expression} AS k{index}" for index, key in enumerate(keys))}
            FROM tracker.experiment AS r WHERE {" AND ".join(where)}
            ORDER BY {", ".join(key.sorted_by(key.expression) for key in keys)} LIMIT {binds.add(limit, WHOLE)}
        """  # noqa: S608 - values are bound
        async with self._engine.begin() as conn:
            await self._bound(conn)
            rows = [row._mapping for row in await self._rows(conn, statement, binds.values)]
        return [
            FoundExperiment(
                Experiment(row["id"], row["name"], row["lifecycle_stage"], row["created_ms"], row["last_update_ms"], row["tags"]),
                tuple(row[f"k{index}"] for index in range(len(keys))),
            )
            for row in rows
        ]

    async def _bound(self, conn: AsyncConnection) -> None:
        """Bounds what a search may cost; plans are made for the values at hand, since the best way depends on them."""
        settings = {"statement_timeout": str(int(self._timeout_s * 1000)), "plan_cache_mode": "force_custom_plan", "jit": "off"}
        settings |= {"max_parallel_workers_per_gather": "0", "transaction_read_only": "on"}
        told = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
        await conn.execute(text(f"SELECT {told}"))

    async def _rows(self, conn: AsyncConnection, statement: str, values: dict[str, Any]) -> Sequence[Row[Any]]:
        try:
            return (await conn.execute(text(statement), values)).all()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _QUERY_CANCELED:
                raise Invalid(
                    f"the search took longer than {self._timeout_s:g} s and was ended. Narrow it: fewer experiments, a param or tag that "
                    "equals one value, or an order that begins with one metric or with start_time"
                ) from error
            raise


@dataclass(frozen=True, slots=True)
class _Phase:
    """A part of a search: rows that come before those of the next phase, in the order of `keys`.

    `source` are the tables whose rows are walked, `where` what holds for them in one experiment, `fixed` what is known of the values of
    the keys that come before `keys` in the search's order.
    """

    binds: Binds
    experiments: tuple[int, ...]
    source: str
    where: tuple[str, ...]
    keys: tuple[Key, ...]
    fixed: Place

    def statement(self, limit: int) -> tuple[str, dict[str, Any]]:
        most = self.binds.add(limit, WHOLE)
        # One experiment is a value that the planner knows; of several each is walked by itself and the pages are put together.
        one = len(self.experiments) == 1
        scope = self.binds.add(self.experiments[0] if one else list(self.experiments), WHOLE if one else f"{WHOLE}[]")
        experiment = scope if one else "scope.id"
        where = " AND ".join(self.where).replace(_EXPERIMENT, experiment)
        page = f"""
            SELECT {_RUN_FIELDS}, {", ".join(f"{key.expression} AS k{index}" for index, key in enumerate(self.keys))}
            FROM {self.source.replace(_EXPERIMENT, experiment)} WHERE {where}
            ORDER BY {", ".join(key.sorted_by(key.expression, key.order) for key in self.keys)} LIMIT {most}
        """  # noqa: S608 - values are bound
        order = ", ".join(key.sorted_by(f"run.k{index}") for index, key in enumerate(self.keys))
        if not one:
            page = f"""
                SELECT run.* FROM unnest({scope}) AS scope (id), LATERAL ({page}) AS run ORDER BY {order} LIMIT {most}
            """  # noqa: S608 - values are bound
        statement = f"""
            SELECT {_RUN}, {", ".join(f"run.k{index}" for index in range(len(self.keys)))}
            FROM ({page}) AS run LEFT JOIN tracker.run_logged AS whole ON whole.run_id = run.run_id
            ORDER BY {order}
        """  # noqa: S608 - values are bound
        return statement, self.binds.values


_EXPERIMENT = "{experiment}"
"""Stands in the parts of a phase for the experiment that it walks. No value that a caller gave is in them: all are bound."""


def _phases(query: Query, place: Place | None) -> Iterator[_Phase]:
    """The phases that come after a place; all of them without one."""
    first = query.order[0] if query.order else None
    if first is None or first.kind is Kind.ATTRIBUTE:
        yield _walked(query, None, "all", place)
        return
    reached = 0 if place is None else _state(place[0])
    names = ("present", "nan", "missing") if first.kind is Kind.METRIC else ("present", "missing")
    states = {"present": 0, "nan": 1, "missing": 2}
    for name in names:
        if states[name] < reached or (name != "present" and _held(query.condition, first, name)):
            continue
        yield _walked(query, first, name, place if states[name] == reached else None)


def _state(value: Any) -> int:
    """The phase that a value is in."""
    return 2 if value is None else 1 if isinstance(value, float) and math.isnan(value) else 0


def _held(condition: Filter, first: OrderBy, name: str) -> bool:
    """Whether the filter lets nothing through in this phase: it wants a value, or one that is not NaN."""
    wants = {Op.EQ, Op.LT, Op.LE, Op.GT, Op.GE, Op.LIKE, Op.ILIKE, Op.IS_NOT_NULL}
    if name == "missing":
        wants.add(Op.NE)
    return any((one.kind, one.key) == (first.kind, first.key) and one.op in wants for one in _needed(condition))


def _needed(condition: Filter) -> list[Comparison]:
    """Comparisons that all have to hold."""
    match condition:
        case Comparison():
            return [condition]
        case And(parts):
            return [one for part in parts for one in _needed(part)]
    return []


def _walked(query: Query, first: OrderBy | None, name: str, place: Place | None) -> _Phase:
    binds = Binds()
    conditions = Conditions(binds, _RUN_COLUMNS, _RUN_TABLES, "own.run_id = r.run_id", indexed=True)
    where = [f"r.lifecycle_stage = ANY ({binds.add(list(query.stages), 'text[]')})", f"r.experiment_id = {_EXPERIMENT}"]
    source, row = "tracker.run AS r", "r"
    keys: list[Key] = []
    fixed: Place = ()
    rest = query.order if first is None else query.order[1:]
    taken: set[Comparison] = set()
    if first is not None:
        key = binds.add(first.key, TEXT)
        table = _RUN_TABLES[first.kind]
        if name == "missing":
            where.append(f"NOT EXISTS (SELECT 1 FROM {table} AS own WHERE own.run_id = r.run_id AND own.key = {key})")  # noqa: S608 - of constants
            fixed = (None,)
        else:
            source, row = f"{table} AS o JOIN tracker.run AS r ON r.run_id = o.run_id", "o"
            where += [f"o.experiment_id = {_EXPERIMENT}", f"o.key = {key}"]
            taken = {one for one in _needed(query.condition) if (one.kind, one.key) == (first.kind, first.key) and one.op not in _NULLS}
            where += [conditions.value("o", one) for one in sorted(taken, key=repr)]
            if name == "nan":
                where.append("o.value = 'NaN'")
                fixed = (math.nan,)
            elif first.kind is Kind.METRIC:
                where.append("o.value < 'NaN'")
                keys.append(Key("o.value", NUMBER, first.ascending))
            else:
                keys.append(Key('o.value COLLATE "C"', TEXT, first.ascending, order=PREFIX.format("o")))
    elif not rest and (pinned := _pinned(query.condition)) is not None:
        # Walked in the order of their starts, the runs with one value of a param are fewer than all of them.
        table = _RUN_TABLES[pinned.kind]
        source, row = f"{table} AS o JOIN tracker.run AS r ON r.run_id = o.run_id", "o"
        where += [f"o.experiment_id = {_EXPERIMENT}", f"o.key = {binds.add(pinned.key, TEXT)}", conditions.value("o", pinned)]
        taken = {pinned}
    for one in rest:
        if one.kind is Kind.ATTRIBUTE:
            keys.append(_attribute(one, _RUN_COLUMNS))
            continue
        alias = f"j{len(keys)}"
        own = f"{alias}.run_id = r.run_id AND {alias}.key = {binds.add(one.key, TEXT)}"
        source += f" LEFT JOIN {_RUN_TABLES[one.kind]} AS {alias} ON {own}"
        metric = one.kind is Kind.METRIC
        expression = f"{alias}.value" if metric else f'{alias}.value COLLATE "C"'
        keys.append(Key(expression, NUMBER if metric else TEXT, one.ascending, nullable=True))
    if not any(one.kind is Kind.ATTRIBUTE and one.key == "start_time" for one in rest):
        keys.append(Key(f"{row}.started_ms", WHOLE, ascending=False))
    keys.append(Key(f"{row}.run_id", TEXT, ascending=True))
    where.append(conditions.sql(_without(query.condition, taken)))
    if place is not None:
        # The bound on the first key alone is what an index can begin at.
        values = place[len(fixed) :]
        lead = keys[0]
        if not lead.nullable and lead.cast != TEXT:
            where.append(f"{lead.expression} {'>=' if lead.ascending else '<='} {binds.add(values[0], lead.cast)}")
        where.append(after(binds, keys, values))
    return _Phase(binds, query.experiments, source, tuple(where), tuple(keys), fixed)


_NULLS = frozenset({Op.IS_NULL, Op.IS_NOT_NULL})


def _pinned(condition: Filter) -> Comparison | None:
    """A comparison that holds a param or a tag to one value."""
    return next((one for one in _needed(condition) if one.op is Op.EQ and one.kind in (Kind.PARAM, Kind.TAG)), None)


def _without(condition: Filter, taken: set[Comparison]) -> Filter:
    """The filter without comparisons that hold already."""
    match condition:
        case Comparison():
            return EVERYTHING if condition in taken else condition
        case And(parts):
            left = [_without(part, taken) for part in parts]
            return And(tuple(part for part in left if part != EVERYTHING))
    return condition


def _attribute(one: OrderBy, columns: dict[str, Column]) -> Key:
    column = columns[one.key]
    if column.missing:
        return Key(f"nullif({column.expression}, 0)", column.cast, one.ascending, nullable=True)
    expression = f'{column.expression} COLLATE "C"' if column.cast == TEXT else column.expression
    return Key(expression, column.cast, one.ascending)
