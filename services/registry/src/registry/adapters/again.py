"""When the newest snapshot of a key of a compacted topic is published again.

A relay that stood still between reading and sending may store an older snapshot behind the newest, and compaction then drops the newest. So
each is published again: soon after it has changed, when that may happen, and ever more slowly afterwards, for every publication is a row
of the outbox for a week.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, DateTime, Interval, Table, func, literal

FIRST = timedelta(minutes=1)
"""After a change. From then on the wait doubles."""

MOST = timedelta(hours=1)


def due(table: Table, now: datetime) -> ColumnElement[bool]:
    """Whether it is a row's turn."""
    published = table.c.published_at
    doubled = func.greatest(published - table.c.changed_at, literal(FIRST, Interval()))
    return func.least(doubled, literal(MOST, Interval())) <= literal(now, DateTime(timezone=True)) - published
