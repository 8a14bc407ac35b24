"""Logged models, in PostgreSQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, and_, exists, func, not_, nulls_last, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters import tables as t
from tracker.domain.filters import And, Comparison, Filter, Kind, Not, Op, Or
from tracker.domain.logged_model import LoggedModel, LoggedModelView, ModelOrder, ModelSearch, ModelStatus, OnDataset
from tracker.domain.record import ModelMetric
from tracker.domain.run import Metric

_MODEL, _METRIC = t.logged_model.c, t.model_metric.c


class SqlLoggedModels:
    """Implements `ports.LoggedModels` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, model: LoggedModel) -> None:
        await self._conn.execute(t.logged_model.insert().values(**_row(model)))

    async def get(self, model_id: str) -> LoggedModel | None:
        return await self._one(select(t.logged_model).where(_MODEL.model_id == model_id))

    async def lock(self, model_id: str) -> LoggedModel | None:
        return await self._one(select(t.logged_model).where(_MODEL.model_id == model_id).with_for_update(key_share=True))

    async def save(self, model: LoggedModel) -> None:
        await self._conn.execute(update(t.logged_model).where(_MODEL.model_id == model.model_id).values(**_row(model)))

    async def log_params(self, model_id: str, params: Mapping[str, str]) -> Mapping[str, str]:
        rows = [{"model_id": model_id, "key": key, "value": value} for key, value in sorted(params.items())]
        if not rows:
            return {}
        await self._conn.execute(upsert(t.logged_model_param).on_conflict_do_nothing(), rows)
        there = await self._texts(t.logged_model_param, [model_id])
        return {key: there[model_id][key] for key, value in params.items() if there[model_id][key] != value}

    async def set_tags(self, model_id: str, tags: Mapping[str, str]) -> None:
        rows = [{"model_id": model_id, "key": key, "value": value} for key, value in sorted(tags.items())]
        if rows:
            statement = upsert(t.logged_model_tag)
            merged = statement.on_conflict_do_update(index_elements=["model_id", "key"], set_={"value": statement.excluded.value})
            await self._conn.execute(merged, rows)

    async def delete_tag(self, model_id: str, key: str) -> bool:
        tag = t.logged_model_tag.c
        gone = await self._conn.execute(t.logged_model_tag.delete().where(tag.model_id == model_id, tag.key == key))
        return gone.rowcount > 0

    async def views(self, models: Sequence[LoggedModel]) -> Sequence[LoggedModelView]:
        ids = [model.model_id for model in models]
        if not ids:
            return []
        params, tags = await self._texts(t.logged_model_param, ids), await self._texts(t.logged_model_tag, ids)
        metrics = await self._metrics(ids)
        return [LoggedModelView(model, params[model.model_id], tags[model.model_id], metrics[model.model_id]) for model in models]

    async def search(self, search: ModelSearch) -> Sequence[LoggedModel]:
        statement = select(t.logged_model).where(_MODEL.experiment_id.in_(search.experiment_ids), _MODEL.lifecycle_stage == "active")
        if search.source_run_id:
            statement = statement.where(_MODEL.source_run_id == search.source_run_id)
        statement = statement.where(_condition(search.where, search.datasets))
        if search.datasets:
            statement = statement.where(exists().where(_METRIC.model_id == _MODEL.model_id, _on(search.datasets)))
        keys = [_ordering(order) for order in search.order_by]
        named = {order.key for order in search.order_by if order.kind is Kind.ATTRIBUTE}
        if "created_ms" not in named:
            keys.append(_MODEL.created_ms.desc())
        if "model_id" not in named:
            keys.append(_MODEL.model_id.asc())
        statement = statement.order_by(*keys).offset(search.offset).limit(search.limit)
        return [_model(row) for row in (await self._conn.execute(statement)).mappings()]

    async def _one(self, statement: Any) -> LoggedModel | None:
        row = (await self._conn.execute(statement)).mappings().first()
        return None if row is None else _model(row)

    async def _texts(self, table: Any, ids: Sequence[str]) -> Mapping[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for row in await self._conn.execute(select(table).where(table.c.model_id.in_(ids)).order_by(table.c.key)):
            found[row.model_id][row.key] = row.value
        return found

    async def _metrics(self, ids: Sequence[str]) -> Mapping[str, list[tuple[str, ModelMetric]]]:
        found: dict[str, list[tuple[str, ModelMetric]]] = defaultdict(list)
        which = (_METRIC.model_id, _METRIC.key, _METRIC.run_id, _METRIC.dataset_name, _METRIC.dataset_digest)
        latest = (
            select(t.model_metric)
            .distinct(*which)
            .where(_METRIC.model_id.in_(ids))
            .order_by(*which, _METRIC.timestamp_ms.desc(), _METRIC.step.desc(), _METRIC.value.desc())
        )
        for row in await self._conn.execute(latest):
            point = Metric(row.key, row.value, row.timestamp_ms, row.step)
            found[row.model_id].append((row.run_id, ModelMetric(point, row.model_id, row.dataset_name, row.dataset_digest)))
        return found


def _row(model: LoggedModel) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "experiment_id": model.experiment_id,
        "name": model.name,
        "model_type": model.model_type,
        "source_run_id": model.source_run_id or None,
        "user_name": model.user,
        "status": model.status.value,
        "lifecycle_stage": model.lifecycle_stage,
        "created_ms": model.created_ms,
        "updated_ms": model.updated_ms,
    }


def _model(row: RowMapping) -> LoggedModel:
    return LoggedModel(
        row["model_id"],
        row["experiment_id"],
        row["name"],
        row["model_type"],
        row["source_run_id"] or "",
        row["user_name"],
        ModelStatus(row["status"]),
        row["lifecycle_stage"],
        row["created_ms"],
        row["updated_ms"],
    )


# -- filters and orderings, with every value bound


def _condition(where: Filter, datasets: Sequence[OnDataset]) -> ColumnElement[bool]:
    match where:
        case And(parts):
            return and_(True, *(_condition(part, datasets) for part in parts))
        case Or(parts):
            return or_(False, *(_condition(part, datasets) for part in parts))
        case Not(part):
            return not_(_condition(part, datasets))
        case Comparison():
            return _compared(where, datasets)


def _compared(one: Comparison, datasets: Sequence[OnDataset]) -> ColumnElement[bool]:
    if one.kind is Kind.ATTRIBUTE:
        return _holds(_MODEL[one.key], one)
    if one.kind is Kind.METRIC:
        about = [_on(datasets)] if datasets else []
        return exists().where(_METRIC.model_id == _MODEL.model_id, _METRIC.key == one.key, _holds(_METRIC.value, one), *about)
    table = (t.logged_model_param if one.kind is Kind.PARAM else t.logged_model_tag).c
    return exists().where(table.model_id == _MODEL.model_id, table.key == one.key, _holds(table.value, one))


def _holds(column: Any, one: Comparison) -> ColumnElement[bool]:
    comparing: dict[Op, Any] = {
        Op.EQ: column.__eq__,
        Op.NE: column.__ne__,
        Op.LT: column.__lt__,
        Op.LE: column.__le__,
        Op.GT: column.__gt__,
        Op.GE: column.__ge__,
        Op.LIKE: column.like,
        Op.ILIKE: column.ilike,
        Op.IN: column.in_,
        Op.NOT_IN: column.not_in,
    }
    held: ColumnElement[bool] = comparing[one.op](one.value)
    return held


def _on(datasets: Sequence[OnDataset]) -> ColumnElement[bool]:
    return or_(
        *(
            (_METRIC.dataset_name == one.name) & (_METRIC.dataset_digest == one.digest) if one.digest else _METRIC.dataset_name == one.name
            for one in datasets
        )
    )


def _ordering(order: ModelOrder) -> ColumnElement[Any]:
    column: Any
    if order.kind is Kind.ATTRIBUTE:
        column = func.nullif(_MODEL[order.key], "") if order.key in ("model_type",) else _MODEL[order.key]
    else:
        about = [_on([order.dataset])] if order.dataset else []
        column = (
            select(_METRIC.value)
            .where(_METRIC.model_id == _MODEL.model_id, _METRIC.key == order.key, *about)
            .order_by(_METRIC.timestamp_ms.desc(), _METRIC.step.desc(), _METRIC.run_id)
            .limit(1)
            .scalar_subquery()
        )
    return nulls_last(column.asc() if order.ascending else column.desc())
