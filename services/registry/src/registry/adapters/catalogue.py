"""Reading models and versions as clients list and search them: only the columns they see, and a page in three statements at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, false, select
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.tables import model, model_alias, model_version
from registry.domain.filters import PROMPT_TAG, Condition, Ordering
from registry.domain.names import CHAMPION
from registry.domain.versions import Stage
from registry.ports import CataloguedVersion, CatalogueEntry

_VERSION = (
    "number", "stage", "reason", "run_id", "source", "path", "storage", "logged_model", "run_link", "description", "tags", "author",
    "registered_by", "created_at", "updated_at",
)  # fmt: skip

_MODEL_KEYS = {"name": model.c.name, "creation_timestamp": model.c.created_at, "last_updated_timestamp": model.c.updated_at}
_VERSION_KEYS = {
    "name": model.c.name,
    "run_id": model_version.c.run_id,
    "source_path": model_version.c.source,
    "version_number": model_version.c.number,
    "creation_timestamp": model_version.c.created_at,
    "last_updated_timestamp": model_version.c.updated_at,
}


class SqlCatalogue:
    """Implements ports.CatalogueReader within one transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def model(self, name: str) -> CatalogueEntry | None:
        found = await self._entries(select(model).where(model.c.name == name, ~model.c.deleted))
        return found[0] if found else None

    async def models(
        self, conditions: Sequence[Condition], prompts: bool, order: Sequence[Ordering], offset: int, limit: int
    ) -> Sequence[CatalogueEntry]:
        wanted = [_where(one, _MODEL_KEYS, model.c.tags) for one in conditions]
        query = select(model).where(~model.c.deleted, _prompt(model.c.tags, prompts), *wanted)
        query = query.order_by(*_ordered(order, _MODEL_KEYS), model.c.name).offset(offset).limit(limit)
        return await self._entries(query)

    async def version(self, name: str, number: int) -> CataloguedVersion | None:
        return await self._first(_versions().where(model.c.name == name, model_version.c.number == number))

    async def by_alias(self, name: str, alias: str) -> CataloguedVersion | None:
        if alias == CHAMPION:
            return await self._first(_versions().where(model.c.name == name, model_version.c.number == model.c.champion))
        pointed = (model_alias.c.model_id == model.c.id) & (model_alias.c.version == model_version.c.number)
        return await self._first(_versions().join(model_alias, pointed).where(model.c.name == name, model_alias.c.alias == alias))

    async def versions(
        self, conditions: Sequence[Condition], prompts: bool, order: Sequence[Ordering], offset: int, limit: int
    ) -> Sequence[CataloguedVersion]:
        wanted = [_where(one, _VERSION_KEYS, model_version.c.tags) for one in conditions]
        query = _versions().where(_prompt(model_version.c.tags, prompts), *wanted)
        query = query.order_by(*_ordered(order, _VERSION_KEYS), model.c.name, model_version.c.number.desc())
        return await self._read(query.offset(offset).limit(limit))

    async def _entries(self, query: Select[Any]) -> list[CatalogueEntry]:
        rows = (await self._conn.execute(query)).all()
        ids = [row.id for row in rows]
        newest = _versions().where(model_version.c.model_id.in_(ids)).distinct(model_version.c.model_id, model_version.c.stage)
        newest = newest.order_by(model_version.c.model_id, model_version.c.stage, model_version.c.number.desc())
        latest: dict[str, list[CataloguedVersion]] = {}
        for version in await self._read(newest) if ids else ():
            latest.setdefault(version.model, []).append(version)
        aliases = await self._aliases(ids)
        return [
            CatalogueEntry(
                row.id,
                row.name,
                row.description,
                row.tags,
                row.created_at,
                row.updated_at,
                {CHAMPION: row.champion, **aliases.get(row.id, {})} if row.champion else aliases.get(row.id, {}),
                tuple(sorted(latest.get(row.name, ()), key=lambda version: version.number, reverse=True)),
            )
            for row in rows
        ]

    async def _first(self, query: Select[Any]) -> CataloguedVersion | None:
        found = await self._read(query)
        return found[0] if found else None

    async def _read(self, query: Select[Any]) -> list[CataloguedVersion]:
        rows = (await self._conn.execute(query)).mappings().all()
        aliases = await self._aliases(list({row["model_id"] for row in rows}))
        return [_version(row, aliases.get(row["model_id"], {})) for row in rows]

    async def _aliases(self, ids: Sequence[UUID]) -> dict[UUID, dict[str, int]]:
        found: dict[UUID, dict[str, int]] = {}
        if ids:
            query = select(model_alias).where(model_alias.c.model_id.in_(ids)).order_by(model_alias.c.alias)
            for row in await self._conn.execute(query):
                found.setdefault(row.model_id, {})[row.alias] = row.version
        return found


def _versions() -> Select[Any]:
    columns = [model_version.c[name] for name in _VERSION]
    query = select(model_version.c.model_id, model.c.name.label("model"), model.c.champion, *columns)
    return query.join(model, model.c.id == model_version.c.model_id).where(~model_version.c.deleted, ~model.c.deleted)


def _version(row: Mapping[Any, Any], aliases: Mapping[str, int]) -> CataloguedVersion:
    said = {name: row[name] for name in _VERSION if name not in ("author", "registered_by", "stage")}
    own = [alias for alias, number in aliases.items() if number == row["number"]]
    return CataloguedVersion(
        model=row["model"],
        stage=Stage(row["stage"]),
        user=row["registered_by"] or row["author"],
        aliases=(CHAMPION, *own) if row["number"] == row["champion"] else tuple(own),
        **said,
    )


def _where(condition: Condition, keys: Mapping[str, Any], tags: Any) -> ColumnElement[bool]:
    left: ColumnElement[Any] = tags.op("->>")(condition.key) if condition.tag else keys[condition.key]
    value: Any = condition.value
    match condition.operator:
        case "IN":
            return left.in_(value)
        case "NOT IN":
            return left.not_in(value)
        # No character escapes another, so that a pattern cannot be wrong.
        case "LIKE":
            return left.like(value, escape="")
        case "ILIKE":
            return left.ilike(value, escape="")
        case operator:
            return left.bool_op(operator)(value)


def _prompt(tags: Any, asked: bool) -> ColumnElement[bool]:
    is_prompt: ColumnElement[bool] = tags.op("->>")(PROMPT_TAG).is_not_distinct_from("true")
    return is_prompt if asked else is_prompt == false()


def _ordered(order: Sequence[Ordering], keys: Mapping[str, Any]) -> list[Any]:
    return [keys[one.key].asc() if one.ascending else keys[one.key].desc() for one in order]
