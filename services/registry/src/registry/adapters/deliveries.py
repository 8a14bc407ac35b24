"""Deliveries in PostgreSQL: the newest revision, all revisions, and the claims, which a primary key keeps unique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servicekit.clock import Clock
from sqlalchemy import Select, delete, insert, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.again import due
from registry.adapters.outgoing import Outgoing
from registry.adapters.tables import claim, delivery, delivery_revision
from registry.domain.deliveries import Claim, Revision
from registry.domain.events import DeliveryApplied
from registry.ports import Lock

_EXCLUSIVELY = text("SELECT pg_advisory_xact_lock(hashtextextended('registry.deliveries', 0))")


class SqlDeliveries:
    """Implements ports.DeliveryRepository within one transaction."""

    def __init__(self, conn: AsyncConnection, outgoing: Outgoing, clock: Clock) -> None:
        self._conn = conn
        self._outgoing = outgoing
        self._clock = clock

    async def exclusively(self) -> None:
        await self._conn.execute(_EXCLUSIVELY)

    async def current(self, name: str, lock: Lock = "") -> Revision | None:
        query = select(delivery.c.revision).where(delivery.c.name == name)
        if lock:
            query = query.with_for_update(read=lock == "share")
        number = (await self._conn.execute(query)).scalar_one_or_none()
        return None if number is None else await self.revision(name, number)

    async def revision(self, name: str, number: int) -> Revision | None:
        query = select(delivery_revision).where(delivery_revision.c.name == name, delivery_revision.c.revision == number)
        return await self._first(query)

    async def standing(self) -> Sequence[Revision]:
        newest = (delivery.c.name == delivery_revision.c.name) & (delivery.c.revision == delivery_revision.c.revision)
        query = select(delivery_revision).join(delivery, newest).where(~delivery.c.deleted).order_by(delivery_revision.c.name)
        return [_revision(row) for row in (await self._conn.execute(query)).mappings()]

    async def predecessors(self, name: str, claims: Sequence[Claim]) -> tuple[Revision, ...]:
        found: dict[tuple[str, int], Revision] = {}
        newest_first = (delivery_revision.c.applied_at.desc(), delivery_revision.c.revision.desc(), delivery_revision.c.name)
        for column, value in [("name", name), *((one.kind, one.name) for one in claims)]:
            query = select(delivery_revision).where(delivery_revision.c[column] == value).order_by(*newest_first).limit(1)
            last = await self._first(query)
            served = None if last is None or last.endpoint else await self._first(query.where(delivery_revision.c.endpoint != ""))
            found |= {(one.name, one.revision): one for one in (last, served) if one is not None}
        return tuple(found.values())

    async def holders(self, claims: Sequence[Claim], other_than: str) -> Mapping[Claim, str]:
        wanted = tuple_(claim.c.kind, claim.c.name).in_([(one.kind, one.name) for one in claims])
        query = select(claim).where(wanted, claim.c.delivery != other_than).order_by(claim.c.kind)
        return {Claim(row.kind, row.name): row.delivery for row in await self._conn.execute(query)}

    async def store(self, revision: Revision) -> None:
        row = {column.name: getattr(revision, column.name) for column in delivery_revision.columns} | {"sections": dict(revision.sections)}
        await self._conn.execute(insert(delivery_revision).values(row))
        now = self._clock.now()
        newest = {"revision": revision.revision, "deleted": revision.deleted, "changed_at": now, "published_at": now}
        statement = upsert(delivery).values(name=revision.name, sequence=1, **newest)
        statement = statement.on_conflict_do_update(index_elements=["name"], set_=newest | {"sequence": delivery.c.sequence + 1})
        sequence = (await self._conn.execute(statement.returning(delivery.c.sequence))).scalar_one()
        await self._conn.execute(delete(claim).where(claim.c.delivery == revision.name))
        if revision.claims:
            rows = [{"kind": one.kind, "name": one.name, "delivery": revision.name} for one in revision.claims]
            await self._conn.execute(insert(claim), rows)
        await self._outgoing.add(DeliveryApplied(revision), revision.name, sequence)

    async def publish_again(self, most: int) -> int:
        now = self._clock.now()
        query = select(delivery).where(due(delivery, now)).order_by(delivery.c.published_at).limit(most).with_for_update(skip_locked=True)
        rows = (await self._conn.execute(query)).all()
        for row in rows:
            newest = await self.revision(row.name, row.revision)
            if newest is None:
                raise RuntimeError(f"revision {row.revision} of the delivery {row.name} is missing")
            await self._conn.execute(
                update(delivery).where(delivery.c.name == row.name).values(sequence=row.sequence + 1, published_at=now)
            )
            await self._outgoing.add(DeliveryApplied(newest), row.name, row.sequence + 1)
        return len(rows)

    async def _first(self, query: Select[Any]) -> Revision | None:
        row = (await self._conn.execute(query)).mappings().first()
        return None if row is None else _revision(row)


def _revision(row: Mapping[Any, Any]) -> Revision:
    return Revision(**{column.name: row[column] for column in delivery_revision.columns})
