"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from servicekit.clock import Clock
from sqlalchemy import select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.again import due
from registry.adapters.outgoing import Outgoing
from registry.adapters.tables import api_key
from registry.domain.access import ApiKey
from registry.domain.events import AccessChanged

_EXCLUSIVELY = text("SELECT pg_advisory_xact_lock(hashtextextended('registry.keys', 0))")


class SqlKeys:
    """Implements ports.KeyRepository within one transaction."""

    def __init__(self, conn: AsyncConnection, outgoing: Outgoing, clock: Clock) -> None:
        self._conn = conn
        self._outgoing = outgoing
        self._clock = clock

    async def all(self, exclusively: bool = False) -> Sequence[ApiKey]:
        if exclusively:
            await self._conn.execute(_EXCLUSIVELY)
        rows = (await self._conn.execute(select(api_key).order_by(api_key.c.created_at, api_key.c.key_id))).mappings()
        return [_key(row) for row in rows]

    async def store(self, key: ApiKey) -> None:
        row = {field.name: getattr(key, field.name) for field in fields(key)}
        row |= {"roles": list(key.roles), "inference_endpoints": list(key.inference_endpoints)}
        times = {"changed_at": self._clock.now(), "published_at": self._clock.now()}
        changed = {"revision": key.revision, "revoked": key.revoked, "sequence": api_key.c.sequence + 1, **times}
        statement = upsert(api_key).values(row | {"sequence": 1, **times})
        statement = statement.on_conflict_do_update(index_elements=["key_id"], set_=changed)
        sequence = (await self._conn.execute(statement.returning(api_key.c.sequence))).scalar_one()
        await self._outgoing.add(AccessChanged(key), key.key_id, sequence)

    async def publish_again(self, most: int) -> int:
        now = self._clock.now()
        query = select(api_key).where(due(api_key, now)).order_by(api_key.c.published_at).limit(most).with_for_update(skip_locked=True)
        rows = (await self._conn.execute(query)).mappings().all()
        for row in rows:
            sequence = row["sequence"] + 1
            same = api_key.c.key_id == row["key_id"]
            await self._conn.execute(update(api_key).where(same).values(sequence=sequence, published_at=now))
            await self._outgoing.add(AccessChanged(_key(row)), row["key_id"], sequence)
        return len(rows)


def _key(row: Mapping[Any, Any]) -> ApiKey:
    stored = {field.name: row[field.name] for field in fields(ApiKey)}
    return ApiKey(**stored | {"roles": tuple(stored["roles"]), "inference_endpoints": tuple(stored["inference_endpoints"])})
