"""Models that wait to be converted, in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters.tables import conversion
from tracker.domain.conversion import Conversion


class SqlConversions:
    """Implements `ports.Conversions` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, run_id: str, one: Conversion) -> bool:
        row = {"run_id": run_id, "owner": one.owner, "folder": one.folder, "name": one.name, "flavors": list(one.flavors), "settled": False}
        made = upsert(conversion).values(**row).on_conflict_do_nothing().returning(conversion.c.run_id)
        return (await self._conn.execute(made)).first() is not None

    async def waiting(self, run_id: str) -> Sequence[Conversion]:
        statement = select(conversion).where(conversion.c.run_id == run_id, ~conversion.c.settled).order_by(conversion.c.position)
        return [Conversion(row.owner, row.folder, row.name, tuple(row.flavors)) for row in await self._conn.execute(statement)]

    async def find(self, run_id: str, owner: str, folder: str) -> tuple[Conversion, bool] | None:
        row = (await self._conn.execute(select(conversion).where(_is(run_id, owner, folder)))).first()
        return None if row is None else (Conversion(row.owner, row.folder, row.name, tuple(row.flavors)), row.settled)

    async def settle(self, run_id: str, owner: str, folder: str) -> None:
        await self._conn.execute(update(conversion).where(_is(run_id, owner, folder)).values(settled=True))


def _is(run_id: str, owner: str, folder: str) -> ColumnElement[bool]:
    return and_(conversion.c.run_id == run_id, conversion.c.owner == owner, conversion.c.folder == folder)
