"""Experiments and their tags, in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import RowMapping, Select, and_, bindparam, delete, exists, func, select, text, true, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters import tables as t
from tracker.domain.run import ENDED, Experiment
from tracker.ports import RequestKey

_TAGS = text(
    """
    INSERT INTO tracker.experiment_tag AS old (experiment_id, key, value)
    SELECT :experiment_id, key, value FROM unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS given (key, value) ORDER BY key
    ON CONFLICT (experiment_id, key) DO UPDATE SET value = excluded.value WHERE old.value <> excluded.value
    """
)


class SqlExperiments:
    """Implements `ports.Experiments` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, name: str, created_ms: int, request: RequestKey | None) -> Experiment | None:
        row = {
            "name": name,
            "lifecycle_stage": "active",
            "created_ms": created_ms,
            "last_update_ms": created_ms,
            "requested_by": request.caller if request else None,
            "request_id": request.request_id if request else None,
        }
        made = await self._conn.execute(upsert(t.experiment).values(**row).on_conflict_do_nothing().returning(*_COLUMNS))
        row_made = made.mappings().first()
        return None if row_made is None else Experiment(**row_made)

    async def get(self, experiment_id: int) -> Experiment | None:
        return await self._one(_WITH_TAGS.where(t.experiment.c.id == experiment_id))

    async def by_name(self, name: str) -> Experiment | None:
        return await self._one(_WITH_TAGS.where(t.experiment.c.name == name))

    async def by_request(self, request: RequestKey) -> Experiment | None:
        same = and_(t.experiment.c.requested_by == request.caller, t.experiment.c.request_id == request.request_id)
        return await self._one(_WITH_TAGS.where(same))

    async def share(self, experiment_id: int) -> Experiment | None:
        return await self._one(select(*_COLUMNS).where(t.experiment.c.id == experiment_id).with_for_update(read=True))

    async def lock(self, experiment_id: int) -> Experiment | None:
        # NO KEY: rows that refer to this one may still be added.
        return await self._one(select(*_COLUMNS).where(t.experiment.c.id == experiment_id).with_for_update(key_share=True))

    async def page(self, after_id: int, limit: int) -> Sequence[Experiment]:
        statement = _WITH_TAGS.where(t.experiment.c.id > after_id).order_by(t.experiment.c.id).limit(limit)
        return [_experiment(row) for row in (await self._conn.execute(statement)).mappings()]

    async def save(self, experiment: Experiment) -> bool:
        statement = (
            update(t.experiment)
            .where(t.experiment.c.id == experiment.id)
            .values(name=experiment.name, lifecycle_stage=experiment.lifecycle_stage, last_update_ms=experiment.last_update_ms)
        )
        try:
            async with self._conn.begin_nested():
                await self._conn.execute(statement)
        except IntegrityError as error:
            if "experiment_name" in str(error.orig):
                return False
            raise
        return True

    async def set_tags(self, experiment_id: int, tags: Mapping[str, str]) -> None:
        if tags:
            arrays = {"experiment_id": experiment_id, "keys": list(tags), "texts": list(tags.values())}
            await self._conn.execute(_TAGS, arrays)

    async def delete_tag(self, experiment_id: int, key: str) -> bool:
        tag = t.experiment_tag.c
        gone = await self._conn.execute(delete(t.experiment_tag).where(tag.experiment_id == experiment_id, tag.key == key))
        return gone.rowcount > 0

    async def in_training(self, experiment_id: int) -> bool:
        ended = [status.value for status in ENDED]
        trained = exists().where(t.run.c.experiment_id == experiment_id, t.run.c.training_id != "", t.run.c.status.not_in(ended))
        return bool((await self._conn.execute(select(trained))).scalar_one())

    async def move_runs(self, experiment_id: int, lifecycle_stage: str, deleted_ms: int) -> None:
        await self._conn.execute(
            update(t.run)
            .where(t.run.c.experiment_id == experiment_id, t.run.c.lifecycle_stage != lifecycle_stage)
            .values(lifecycle_stage=lifecycle_stage, deleted_ms=deleted_ms)
        )

    async def _one(self, statement: Select[Any]) -> Experiment | None:
        row = (await self._conn.execute(statement)).mappings().first()
        return None if row is None else _experiment(row)


_COLUMNS = (
    t.experiment.c.id,
    t.experiment.c.name,
    t.experiment.c.lifecycle_stage,
    t.experiment.c.created_ms,
    t.experiment.c.last_update_ms,
)

_OF_ONE = (
    select(
        func.coalesce(
            func.jsonb_object_agg(t.experiment_tag.c.key, t.experiment_tag.c.value),
            bindparam("no_tags", {}, type_=JSONB),
        ).label("tags")
    )
    .where(t.experiment_tag.c.experiment_id == t.experiment.c.id)
    .lateral("of_one")
)
_WITH_TAGS = select(*_COLUMNS, _OF_ONE.c.tags).join(_OF_ONE, true())


def _experiment(row: RowMapping) -> Experiment:
    return Experiment(**row)
