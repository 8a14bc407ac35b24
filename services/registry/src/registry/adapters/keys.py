"""API keys in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.outgoing import Outgoing
from registry.adapters.tables import api_key
from registry.domain.access import ApiKey
from registry.domain.events import AccessChanged

_EXCLUSIVELY = text("SELECT pg_advisory_xact_lock(hashtextextended('registry.keys', 0))")


class SqlKeys:
    """Implements ports.KeyRepository within one transaction."""

    def __init__(self, conn: AsyncConnection, outgoing: Outgoing) -> None:
        self._conn = conn
        self._outgoing = outgoing

    async def all(self, exclusively: bool = False) -> Sequence[ApiKey]:
        if exclusively:
            await self._conn.execute(_EXCLUSIVELY)
        rows = (await self._conn.execute(select(api_key).order_by(api_key.c.created_at, api_key.c.key_id))).mappings()
        return [_key(row) for row in rows]

    async def store(self, key: ApiKey) -> None:
        row = {column.name: getattr(key, column.name) for column in api_key.columns}
        row |= {"roles": list(key.roles), "inference_endpoints": list(key.inference_endpoints)}
        changed = {"revision": key.revision, "revoked": key.revoked}
        await self._conn.execute(upsert(api_key).values(row).on_conflict_do_update(index_elements=["key_id"], set_=changed))
        # A revision is one event, so the revision is the key's sequence too.
        await self._outgoing.add(AccessChanged(key), key.key_id, key.revision)


def _key(row: Mapping[Any, Any]) -> ApiKey:
    fields = {column.name: row[column] for column in api_key.columns}
    return ApiKey(**fields | {"roles": tuple(fields["roles"]), "inference_endpoints": tuple(fields["inference_endpoints"])})
