"""Spans in a SQLite file: found by trace or by attribute, followed along links in both directions; the oldest requests go first."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

INDEXED_PREFIX = "headrace."
INDEXED_SUFFIX = "_id"
"""String attributes whose name begins and ends so (`headrace.request_id`) can be searched for."""

_MOST_TRACES = 200
_SCHEMA = """
CREATE TABLE IF NOT EXISTS span (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, start_ns INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (trace_id, span_id)
);
CREATE TABLE IF NOT EXISTS mark (
    name TEXT NOT NULL, value TEXT NOT NULL, trace_id TEXT NOT NULL, PRIMARY KEY (name, value, trace_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS link (source TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (source, target)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS link_by_target ON link (target);
CREATE INDEX IF NOT EXISTS mark_by_trace ON mark (trace_id);
"""


@dataclass(frozen=True)
class Reference:
    """A span named by its ids (lower-case hex)."""

    trace_id: str
    span_id: str


@dataclass(frozen=True)
class Span:
    """One finished span. Times are nanoseconds since 1970; `parent_id` is empty for a root; `status` is unset, ok or error."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    status: str = "unset"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[Reference, ...] = ()

    @property
    def reference(self) -> Reference:
        return Reference(self.trace_id, self.span_id)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Span:
        links = tuple(Reference(**link) for link in body["links"])
        return cls(**{**body, "links": links})


@dataclass(frozen=True)
class Found:
    """The spans that belong together; `truncated` when there were more traces than are followed."""

    spans: list[Span]
    truncated: bool


class SpanStore:
    """Spans of one stack. Thread-safe; every method blocks for one small transaction."""

    def __init__(self, file: Path, *, most_spans: int = 300_000) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._most_spans = most_spans
        self._database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _SCHEMA)
        self._count = int(self._database.execute("SELECT count(*) FROM span").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def add(self, spans: Iterable[Span]) -> None:
        """Stores spans; one that is there already stays as it is."""
        with self._lock, self._database:
            self._database.execute("BEGIN")
            for span in spans:
                key = (span.trace_id, span.span_id)
                row = (*key, span.start_ns, json.dumps(span.as_dict()))
                self._count += self._database.execute("INSERT OR IGNORE INTO span VALUES (?, ?, ?, ?)", row).rowcount
                for link in span.links:
                    if link.trace_id != span.trace_id:
                        self._database.execute("INSERT OR IGNORE INTO link VALUES (?, ?)", (span.trace_id, link.trace_id))
                for name, value in span.attributes.items():
                    if name.startswith(INDEXED_PREFIX) and name.endswith(INDEXED_SUFFIX) and isinstance(value, str):
                        self._database.execute("INSERT OR IGNORE INTO mark VALUES (?, ?, ?)", (name, value, span.trace_id))
            self._drop_oldest()

    def count(self) -> int:
        """How many spans are stored."""
        with self._lock:
            return self._count

    def traces_with(self, attribute: str, value: str) -> list[str]:
        """The ids of the traces in which a span has this attribute, newest first."""
        with self._lock:
            rows = self._database.execute(
                "SELECT m.trace_id FROM mark m WHERE m.name = ? AND m.value = ?"
                " ORDER BY (SELECT max(rowid) FROM span s WHERE s.trace_id = m.trace_id) DESC",
                (attribute, value),
            )
            return [row[0] for row in rows]

    def connected(self, traces: Sequence[str]) -> Found:
        """All spans of these traces and of those that links lead to or come from, in the order in which they began."""
        with self._lock:
            reached = dict.fromkeys(traces[:_MOST_TRACES])
            truncated = len(traces) > _MOST_TRACES
            frontier = list(reached)
            while frontier:
                trace = frontier.pop(0)
                neighbours = self._database.execute(
                    "SELECT target FROM link WHERE source = ? UNION SELECT source FROM link WHERE target = ?", (trace, trace)
                )
                for (neighbour,) in neighbours.fetchall():
                    if neighbour in reached:
                        continue
                    if len(reached) == _MOST_TRACES:
                        truncated = True
                        break
                    reached[neighbour] = None
                    frontier.append(neighbour)
            spans = []
            for trace in reached:
                rows = self._database.execute("SELECT body FROM span WHERE trace_id = ?", (trace,))
                spans += [Span.from_dict(json.loads(body)) for (body,) in rows]
        return Found(sorted(spans, key=lambda span: span.start_ns), truncated)

    def _drop_oldest(self) -> None:
        if self._count <= self._most_spans:
            return
        # In large steps, so that the work is rare. What links connect tells how a version came about: single requests go first.
        excess = self._count - self._most_spans * 3 // 4
        single = "WHERE trace_id NOT IN (SELECT source FROM link UNION SELECT target FROM link)"
        for condition in (single, ""):
            chosen = f"SELECT rowid FROM span {condition} ORDER BY rowid LIMIT ?"  # noqa: S608 - one of the two above
            dropped = self._database.execute(f"DELETE FROM span WHERE rowid IN ({chosen})", (excess,)).rowcount  # noqa: S608
            self._count -= dropped
            excess -= dropped
        self._database.execute("DELETE FROM mark WHERE trace_id NOT IN (SELECT trace_id FROM span)")
        self._database.execute("DELETE FROM link WHERE source NOT IN (SELECT trace_id FROM span)")
