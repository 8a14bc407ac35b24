"""The audit log in PostgreSQL. Rows are inserted and read; a trigger refuses everything else."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.tables import audit
from registry.domain.audit import Audit
from registry.ports import AuditRow

_FIELDS = ("at", "actor", "action", "target", "before", "after", "reason")


class SqlAudit:
    """Implements ports.AuditLog within one transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, entries: Sequence[Audit]) -> None:
        for entry in entries:  # one by one: the order of the ids is the order in which it happened
            row = {field: getattr(entry, field) for field in _FIELDS} | {"before": dict(entry.before), "after": dict(entry.after)}
            await self._conn.execute(insert(audit).values(row))

    async def read(self, target: str, below: int, limit: int) -> Sequence[AuditRow]:
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if target:
            under = [func.starts_with(audit.c.target, f"{target}{mark}") for mark in "/@"]
            query = query.where(or_(audit.c.target == target, *under))
        if below:
            query = query.where(audit.c.id < below)
        rows = (await self._conn.execute(query)).mappings()
        return [AuditRow(row["id"], Audit(**{field: row[field] for field in _FIELDS})) for row in rows]
