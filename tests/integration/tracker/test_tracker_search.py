"""Searches over runs in a real PostgreSQL, against a plain-Python oracle: random filters, orders and pages over random runs."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servicekit import db, migrate
from servicekit.access import Caller
from servicekit.errors import Forbidden, Invalid
from sqlalchemy import text
from tracker import bootstrap
from tracker.adapters import logged
from tracker.adapters.search import SqlSearches
from tracker.adapters.tables import SCHEMA
from tracker.domain.filters import NUMERIC, And, Comparison, Filter, Kind, Not, Op, Or, OrderBy
from tracker.domain.run import Run, RunSource, Status
from tracker.domain.search import FoundRun, Query
from tracker.entrypoints.mlflow.wire import run_info
from tracker.searches import Asked, Searches

VIEWER = Caller("gateway", "vic", frozenset({"viewer"}))
ALL = ("active", "deleted")

METRICS, PARAMS, TAGS = ("loss", "a b"), ("lr", "it's"), ("mlflow.note", "x.y")
NUMBERS = (0.0, -1.5, 1.0, 1e300, -1e300, 0.1, math.nan)
TEXTS = ("", "a", "A", "ab", "a%", "_", "it's", '"', "\\", "é", "x" * 150, "x" * 149 + "y", "; DROP TABLE run; --")
PATTERNS = (*TEXTS, "%", "a%", "%B%", "_b", "x%y")


@dataclass(frozen=True)
class Row:
    """A run as the oracle knows it."""

    run_id: str
    experiment: int
    name: str
    user: str
    status: str
    stage: str
    started: int
    ended: int
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: tuple[tuple[str, str, str | None], ...] = ()
    whole: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "run_name": self.name,
            "user_id": self.user,
            "status": self.status,
            "artifact_uri": f"mlflow-artifacts:/{self.experiment}/{self.run_id}/artifacts",
            "start_time": self.started,
            "end_time": self.ended or None,
        }

    def value(self, kind: Kind, key: str) -> Any:
        own: dict[Kind, dict[str, Any]] = {Kind.METRIC: self.metrics, Kind.PARAM: self.params, Kind.TAG: self.tags}
        return own.get(kind, self.attributes).get(key)


def like(value: str, pattern: str, *, fold: bool) -> bool:
    parts = [".*" if char == "%" else "." if char == "_" else re.escape(char) for char in pattern]
    return re.fullmatch("".join(parts), value, re.DOTALL | re.ASCII | (re.IGNORECASE if fold else 0)) is not None


def holds(row: Row, condition: Filter) -> bool:
    match condition:
        case And(parts):
            return all(holds(row, part) for part in parts)
        case Or(parts):
            return any(holds(row, part) for part in parts)
        case Not(part):
            return not holds(row, part)
        case Comparison(Kind.DATASET, key, op, value):
            at = ("name", "digest", "context").index(key)
            return any(one[at] is not None and compared(one[at], op, value) for one in row.datasets)
        case Comparison(kind, key, op, value):
            own = row.value(kind, key)
            if op in (Op.IS_NULL, Op.IS_NOT_NULL):
                return (own is None) == (op is Op.IS_NULL)
            return own is not None and compared(own, op, value)


def compared(own: Any, op: Op, value: Any) -> bool:
    match op:
        case Op.EQ:
            return bool(own == value)
        case Op.NE:
            return bool(own != value)
        case Op.LT:
            return bool(own < value)
        case Op.LE:
            return bool(own <= value)
        case Op.GT:
            return bool(own > value)
        case Op.GE:
            return bool(own >= value)
        case Op.LIKE | Op.ILIKE:
            return like(own, value, fold=op is Op.ILIKE)
        case Op.IN:
            return own in value
        case Op.NOT_IN:
            return own not in value
    raise AssertionError(op)


def by(order: Sequence[OrderBy], left: Row, right: Row) -> int:
    for one in order:
        a, b = left.value(one.kind, one.key), right.value(one.kind, one.key)
        level = [2 if own is None else 1 if own != own else 0 for own in (a, b)]
        if level[0] != level[1]:
            return level[0] - level[1]
        if level[0] == 0 and a != b:
            return (-1 if a < b else 1) * (1 if one.ascending else -1)
    if not any((one.kind, one.key) == (Kind.ATTRIBUTE, "start_time") for one in order) and left.started != right.started:
        return right.started - left.started
    return -1 if left.run_id < right.run_id else 1


def expected(rows: Sequence[Row], query: Query) -> list[str]:
    found = [row for row in rows if row.experiment in query.experiments and row.stage in query.stages and holds(row, query.condition)]
    place = functools.cmp_to_key(functools.partial(by, query.order))
    return [row.run_id for row in sorted(found, key=place)]


_texts = st.sampled_from(TEXTS)


def _rows(draw: Any, count: int) -> list[Row]:
    def some(keys: Sequence[str], values: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {key: draw(values) for key in keys if draw(st.integers(0, 3))}

    rows = []
    for index in range(count):
        used = tuple(
            (name, digest, draw(st.sampled_from([None, "train", "a%"])))
            for name in ("d", "it's")
            for digest in ("1",)
            if draw(st.booleans())
        )
        rows.append(
            Row(
                run_id=f"{draw(st.integers(0, 2**64)):032x}"[:30] + f"{index:02x}",
                experiment=draw(st.sampled_from([1, 1, 2])),
                name=draw(_texts),
                user=draw(st.sampled_from(["ada", "Ada", "bob"])),
                status=draw(st.sampled_from(["RUNNING", "FINISHED", "FAILED"])),
                stage=draw(st.sampled_from(["active", "active", "deleted"])),
                started=draw(st.sampled_from([1, 2, 3, 1_700_000_000_000])),
                ended=draw(st.sampled_from([0, 5, 1_700_000_000_001])),
                metrics=some(METRICS, st.sampled_from(NUMBERS)),
                params=some(PARAMS, _texts),
                tags=some(TAGS, _texts),
                datasets=used,
                whole=draw(st.booleans()),
            )
        )
    return rows


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    kind = draw(st.sampled_from(list(Kind)))
    if kind is Kind.METRIC:
        number = draw(st.sampled_from([number for number in NUMBERS if number == number] + [math.inf]))
        return Comparison(kind, draw(st.sampled_from((*METRICS, "none"))), draw(st.sampled_from(sorted(NUMERIC))), number)
    if kind is Kind.ATTRIBUTE and (key := draw(st.sampled_from(["start_time", "end_time", "other"]))) != "other":
        value = draw(st.sampled_from([0, 1, 2, 2.5, 1_700_000_000_000, 2**63 - 1, 1e30, -1e30]))
        return Comparison(kind, key, draw(st.sampled_from(sorted(NUMERIC))), value)
    texts = st.sampled_from(PATTERNS)
    lists = [Op.IN, Op.NOT_IN]
    ops = [Op.EQ, Op.NE, Op.LIKE, Op.ILIKE]
    if kind is Kind.ATTRIBUTE:
        key = draw(st.sampled_from(["run_id", "run_name", "user_id", "status", "artifact_uri"]))
        ops += lists if key == "run_id" else []
        texts = st.one_of(texts, st.sampled_from(["ada", "FINISHED", "mlflow-artifacts:/1/%", "0%"]))
    elif kind is Kind.DATASET:
        key = draw(st.sampled_from(["name", "digest", "context"]))
        ops += lists
        texts = st.one_of(texts, st.sampled_from(["d", "1", "train"]))
    else:
        key = draw(st.sampled_from((*PARAMS, *TAGS)))
        ops += [Op.IS_NULL, Op.IS_NOT_NULL]
    op = draw(st.sampled_from(ops))
    if op in lists:
        return Comparison(kind, key, op, tuple(draw(st.lists(texts, min_size=1, max_size=3))))
    return Comparison(kind, key, op, None if op in (Op.IS_NULL, Op.IS_NOT_NULL) else draw(texts))


filters: st.SearchStrategy[Filter] = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=0, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Or(tuple(parts))),
        inner.map(Not),
    ),
    max_leaves=6,
)

_keys = st.one_of(
    st.sampled_from(METRICS).map(lambda key: (Kind.METRIC, key)),
    st.sampled_from(PARAMS).map(lambda key: (Kind.PARAM, key)),
    st.sampled_from(TAGS).map(lambda key: (Kind.TAG, key)),
    st.sampled_from(["start_time", "end_time", "run_name", "user_id", "run_id", "artifact_uri"]).map(lambda key: (Kind.ATTRIBUTE, key)),
)
orders = st.lists(_keys, max_size=3, unique=True).flatmap(
    lambda keys: st.tuples(*(st.booleans().map(functools.partial(OrderBy, kind, key)) for kind, key in keys))
)


class Searched:
    """A database with runs, in a loop of its own: hypothesis calls tests that are not coroutines."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.engine = db.create_engine(url)
        self.store = SqlSearches(self.engine, 10)

    def fill(self, rows: Sequence[Row]) -> None:
        self.runner.run(self._fill(rows))

    async def _fill(self, rows: Sequence[Row]) -> None:
        async with self.engine.begin() as conn:
            for table in ("run_logged", "run_dataset", "described_dataset", "metric_latest", "param", "tag", "run"):
                await conn.execute(text(f"DELETE FROM tracker.{table}"))
            for row in rows:
                values = {"run": row.run_id, "exp": row.experiment, "start": row.started}
                await conn.execute(
                    text(
                        "INSERT INTO tracker.run (run_id, experiment_id, name, user_name, status, lifecycle_stage, started_ms, finished_ms,"
                        " reason, parent_run_id, source_commit, source_dirty, source_diff_key, source_command, training_id, lease_seconds,"
                        " fencing_token, event_sequence, deleted_ms) VALUES"
                        " (:run, :exp, :name, :user, :status, :stage, :start, :ended, '', '', '', false, '', '', '', 0, 0, 1, 0)"
                    ),
                    {**values, "name": row.name, "user": row.user, "status": row.status, "stage": row.stage, "ended": row.ended},
                )
                for table, own in (("param", row.params), ("tag", row.tags)):
                    for key, value in own.items():
                        await conn.execute(
                            text(f"INSERT INTO tracker.{table} VALUES (:run, :key, :value, :exp, :start)"),
                            {**values, "key": key, "value": value},
                        )
                for key, number in row.metrics.items():
                    await conn.execute(
                        text("INSERT INTO tracker.metric_latest VALUES (:run, :key, 7, 8, :value, :exp, :start)"),
                        {**values, "key": key, "value": number},
                    )
                for name, digest, context in row.datasets:
                    used = {"run": row.run_id, "exp": row.experiment, "name": name, "digest": digest}
                    await conn.execute(
                        text(
                            "INSERT INTO tracker.described_dataset VALUES (:exp, :name, :digest, 't', 's', '', '') ON CONFLICT DO NOTHING"
                        ),
                        {key: value for key, value in used.items() if key != "run"},
                    )
                    await conn.execute(
                        text(
                            "INSERT INTO tracker.run_dataset (run_id, experiment_id, name, digest, tags) VALUES"
                            " (:run, :exp, :name, :digest, CAST(:tags AS jsonb))"
                        ),
                        {**used, "tags": msgspec.json.encode({} if context is None else {"mlflow.data.context": context}).decode()},
                    )
                if row.whole:
                    await conn.execute(logged.KEEP_WHOLE, {"run_id": row.run_id})

    def pages(self, query: Query, size: int) -> list[Any]:
        async def all_pages() -> list[Any]:
            found: list[Any] = []
            place = None
            while True:
                page = await self.store.runs(query, place, size)
                found += page
                if len(page) < size:
                    return found
                place = page[-1].place

        return self.runner.run(all_pages())


@pytest.fixture
def searched(database: Any) -> Iterator[Searched]:
    with asyncio.Runner() as runner:
        runner.run(migrate.upgrade(database.sqlalchemy, SCHEMA, bootstrap.MIGRATIONS))
        found = Searched(database.sqlalchemy, runner)

        async def experiments() -> None:
            async with found.engine.begin() as conn:
                await conn.execute(
                    text(
                        "INSERT INTO tracker.experiment (id, name, lifecycle_stage, created_ms, last_update_ms)"
                        " VALUES (1, 'one', 'active', 0, 0), (2, 'two', 'active', 0, 0)"
                    )
                )

        try:
            runner.run(experiments())
            yield found
        finally:
            runner.run(found.engine.dispose())


def _id(found: FoundRun) -> str:
    return str(msgspec.json.decode(found.json)["info"]["run_id"])


def _run(row: Row) -> Run:
    status = Status(row.status)
    return Run(row.run_id, row.experiment, row.name, row.user, status, row.stage, row.started, row.ended, RunSource(), "", "", 0, 1, 0)


def test_random_filters_orders_and_pages_find_what_the_oracle_finds(searched: Searched) -> None:
    held: list[Row] = []

    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.data())
    def of_some_runs(data: st.DataObject) -> None:
        held[:] = _rows(data.draw, 24)
        searched.fill(held)
        for _ in range(25):
            query = Query(
                stages=data.draw(st.sampled_from([("active",), ("deleted",), ALL])),
                condition=data.draw(filters),
                order=data.draw(orders),
                experiments=data.draw(st.sampled_from([(1,), (2,), (1, 2), (2, 9)])),
            )
            found = searched.pages(query, data.draw(st.sampled_from([1, 3, 50])))
            assert [_id(one) for one in found] == expected(held, query)
            for one in found:
                row = next(row for row in held if row.run_id == _id(one))
                told = msgspec.json.decode(one.json)
                assert told["info"] == run_info(_run(row))
                assert {pair["key"]: pair["value"] for pair in told["data"]["params"]} == row.params
                assert {pair["key"]: pair["value"] for pair in told["data"]["tags"]} == row.tags
                metrics = {pair["key"]: float(pair["value"]) for pair in told["data"]["metrics"]}
                assert repr(metrics) == repr(dict(sorted(row.metrics.items())))
                assert [pair["dataset"]["name"] for pair in told["inputs"]["dataset_inputs"]] == [name for name, _, _ in row.datasets]

    of_some_runs()


def test_tokens_are_good_for_their_own_search_only(searched: Searched) -> None:
    searched.fill([Row(f"{index:032x}", 1, "n", "ada", "FINISHED", "active", index, 0, {"loss": float(index)}) for index in range(5)])
    searches = Searches(searched.store, extended=False)

    def search(**asked: Any) -> Any:
        return searched.runner.run(searches.runs(VIEWER, Asked(("active",), experiments=(1,), max_results=2, **asked)))

    first, token = search(order_by=["metrics.loss DESC"])
    assert [int(_id(one), 16) for one in first] == [4, 3]
    second, token = search(order_by=["metrics.loss DESC"], page_token=token)
    assert [int(_id(one), 16) for one in second] == [2, 1]
    last, end = search(order_by=["metrics.loss DESC"], page_token=token)
    assert ([int(_id(one), 16) for one in last], end) == ([0], "")
    for wrong in (
        {"order_by": ["metrics.loss"], "page_token": token},
        {"order_by": ["metrics.loss DESC"], "page_token": token, "filter": "metrics.loss > 0"},
        {"page_token": token},
        {"page_token": "x"},
        {"page_token": "eyJvZmZzZXQiOiAxfQ=="},
        {"page_token": "é"},
    ):
        with pytest.raises(Invalid, match="page token"):
            search(**wrong)


def test_a_search_that_takes_too_long_says_what_to_narrow(searched: Searched) -> None:
    searched.fill([Row("0" * 32, 1, "n", "ada", "FINISHED", "active", 1, 0)])

    async def held_up() -> None:
        store = SqlSearches(searched.engine, 0.2)
        async with searched.engine.begin() as conn:
            await conn.execute(text("LOCK TABLE tracker.run IN ACCESS EXCLUSIVE MODE"))
            await store.runs(Query(("active",), experiments=(1,)), None, 10)

    with pytest.raises(Invalid, match=r"took longer than 0\.2 s and was ended\. Narrow it"):
        searched.runner.run(held_up())
    assert len(searched.pages(Query(("active",), experiments=(1,)), 10)) == 1


def test_who_may_not_search_and_what_is_wrong_is_told(searched: Searched) -> None:
    searches = Searches(searched.store, extended=False)

    def search(caller: Caller = VIEWER, **asked: Any) -> Any:
        return searched.runner.run(searches.runs(caller, Asked(("active",), experiments=(1,), **asked)))

    assert search() == ([], "")
    with pytest.raises(Forbidden):
        search(Caller("gateway", "run:1", frozenset(), "1" * 32, 1))
    for asked, why in (
        ({"max_results": 0}, "at least 1"),
        ({"max_results": 50_001}, "at most 50000"),
        ({"filter": "params.a = 'b' OR params.c = 'd'"}, "extension"),
        ({"filter": "metrics.x"}, "ends in the middle"),
        ({"order_by": ["dataset.name"]}, "Invalid order_by entity"),
    ):
        with pytest.raises(Invalid, match=why):
            search(**asked)
    assert search(filter="params.a = 'b' OR params.c = 'd'", extended=True) == ([], "")
    everybody = Searches(searched.store, extended=True)
    asked_for = Asked(("active",), filter="NOT (params.a = 'b')", experiments=(1,))
    assert searched.runner.run(everybody.runs(VIEWER, asked_for)) == ([], "")
