"""Filters and orderings: every spelling of MLflow's, what each kind allows, quoting, and what is refused before or while it is parsed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracker.domain.errors import Rejected
from tracker.domain.filters import (
    EVERYTHING,
    EXPERIMENTS,
    MAX_COMPARISONS,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_LISTED,
    NUMERIC,
    RUNS,
    And,
    Comparison,
    Filter,
    Kind,
    Not,
    Op,
    Or,
    OrderBy,
    comparisons,
    parse_filter,
    parse_order_by,
)


def one(text: str) -> Comparison:
    found = parse_filter(text, RUNS)
    assert isinstance(found, Comparison)
    return found


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_filter_is_everything(text: str) -> None:
    assert parse_filter(text, RUNS) == EVERYTHING
    assert parse_filter(text, RUNS, extended=True) == EVERYTHING


@pytest.mark.parametrize(
    ("kind", "spellings"),
    [
        (Kind.PARAM, ("params", "param", "parameter", "parameters")),
        (Kind.TAG, ("tag", "tags")),
    ],
)
def test_kinds_by_all_their_spellings(kind: Kind, spellings: tuple[str, ...]) -> None:
    for spelling in spellings:
        assert one(f"{spelling}.a = 'b'") == Comparison(kind, "a", Op.EQ, "b")
        assert one(f"`{spelling}`.a = 'b'") == Comparison(kind, "a", Op.EQ, "b")
    for spelling in ("metric", "metrics"):
        assert one(f"{spelling}.a = 1") == Comparison(Kind.METRIC, "a", Op.EQ, 1.0)
    for spelling in ("dataset", "datasets"):
        assert one(f"{spelling}.digest = 'b'") == Comparison(Kind.DATASET, "digest", Op.EQ, "b")
    for spelling in ("attribute.", "attributes.", "attr.", "run.", ""):
        assert one(f"{spelling}status = 'FAILED'") == Comparison(Kind.ATTRIBUTE, "status", Op.EQ, "FAILED")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("run_name", "run_name"),
        ("`Run Name`", "run_name"),
        ('"Run name"', "run_name"),
        ("attributes.`run name`", "run_name"),
        ("user_id", "user_id"),
        ("artifact_uri", "artifact_uri"),
        ("run_id", "run_id"),
    ],
)
def test_attributes_by_all_their_spellings(spelling: str, name: str) -> None:
    assert one(f"{spelling} LIKE 'x%'") == Comparison(Kind.ATTRIBUTE, name, Op.LIKE, "x%")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("params.`a b` = 'c'", "a b", "c"),
        ('params."a.b" = "c"', "a.b", "c"),
        ("params.'a/b' = 'c'", "a/b", "c"),
        ("params.mlflow.source.name = 'c'", "mlflow.source.name", "c"),
        ("params.and = 'c'", "and", "c"),
        ("params.ä = 'ö'", "ä", "ö"),
        ('params.a = "it\'s"', "a", "it's"),
        ("params.a = 'it''s'", "a", "it's"),
        ("params.a = 'x\\'", "a", "x\\"),
        ("params.a = '; DROP TABLE run; --'", "a", "; DROP TABLE run; --"),
        ("params.a = ''", "a", ""),
        ("params.a='b'", "a", "b"),
    ],
)
def test_quotes_around_keys_and_values(text: str, key: str, value: str) -> None:
    assert one(text) == Comparison(Kind.PARAM, key, Op.EQ, value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1.0), ("-0.5e3", -500.0), (".5", 0.5), ("+2", 2.0), ("1E5", 1e5), ("1e999", float("inf")), ("0", 0.0), ("7.", 7.0)],
)
def test_numbers(text: str, number: float) -> None:
    assert one(f"metrics.a<{text}") == Comparison(Kind.METRIC, "a", Op.LT, number)


@pytest.mark.parametrize(
    ("text", "number"), [("1700000000000", 1700000000000), ("1.5", 1.5), ("9223372036854775807", 2**63 - 1), ("99999999999999999999", 1e20)]
)
def test_times_are_whole_numbers_where_they_can_be(text: str, number: float) -> None:
    found = one(f"start_time >= {text}")
    assert found == Comparison(Kind.ATTRIBUTE, "start_time", Op.GE, number)
    assert type(found.value) is type(number)
    assert one(f"Created > {text}").key == one(f"created > {text}").key == "start_time"


def test_comparators_in_any_case_and_lists() -> None:
    assert one("tags.a ilike 'x'").op is Op.ILIKE
    assert one("tags.a Is Null") == Comparison(Kind.TAG, "a", Op.IS_NULL, None)
    assert one("params.a IS  NOT NULL") == Comparison(Kind.PARAM, "a", Op.IS_NOT_NULL, None)
    assert one("run_id in ('a', \"b\")") == Comparison(Kind.ATTRIBUTE, "run_id", Op.IN, ("a", "b"))
    assert one("dataset.name NOT IN ('a',)") == Comparison(Kind.DATASET, "name", Op.NOT_IN, ("a",))
    both = parse_filter("metrics.a > 1 and params.b = 'c' AND status = 'FINISHED'", RUNS)
    assert isinstance(both, And)
    assert [part.key for part in comparisons(both)] == ["a", "b", "status"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("metrics.a", "ends in the middle"),
        ("metrics.a >", "ends in the middle"),
        ("metrics.a == 1", "Invalid comparator '=='"),
        ("metrics.a <> 1", "Invalid comparator '<>'"),
        ("metrics.a > 'b'", "Expected numeric value type"),
        ("metrics.a LIKE 'b'", "Invalid comparator 'LIKE'"),
        ("metrics.a IS NULL", "Invalid comparator 'IS NULL'"),
        ("metrics.a = inf", "Invalid clause"),
        ("metrics.a = 0x10", "Invalid clause"),
        ("params.a = 1", "Expected a quoted string value"),
        ("params.a = b", "Invalid clause"),
        ("params.a = `b`", "Invalid clause"),
        ("params.a > 'b'", "Invalid comparator '>'"),
        ("params.a IN ('b')", "Invalid comparator 'IN'"),
        ("status IN ('b')", "Invalid comparator 'IN'"),
        ("status IS NULL", "Invalid comparator 'IS NULL'"),
        ("start_time LIKE 'b'", "Invalid comparator 'LIKE'"),
        ("start_time > '1'", "Expected numeric value type"),
        ("dataset.source = 'b'", "Invalid dataset key 'source'"),
        ("METRICS.a = 1", "Invalid entity type 'METRICS'"),
        ("runs.a = 'b'", "Invalid entity type 'runs'"),
        ("name = 'b'", "Invalid attribute key 'name'"),
        ("attributes.lifecycle_stage = 'active'", "Invalid attribute key"),
        ("run_id IN ()", "Invalid clause"),
        ("run_id IN ('a' 'b')", "Invalid clause"),
        ("params.a = 'b' metrics.c > 1", "Invalid clause"),
        ("params.a = 'b';", "Invalid clause"),
        ("params.a = 'b' -- and so on", "Invalid clause"),
        ("params.a = 'b", "Invalid clause"),
        ("'a' = params.a", "Invalid clause"),
        ("params.a-b = 'c'", "Invalid clause"),
        ("AND params.a = 'b'", "Invalid"),
        ("params.a = 'b' AND", "ends in the middle"),
        ("params.a = 'b' OR params.c = 'd'", "extension"),
        ("(params.a = 'b')", "extension"),
        ("NOT params.a = 'b'", "Invalid clause"),
        ("params.a = '\x00'", "the character 0"),
        ("params.a = '" + "x" * MAX_LENGTH + "'", "at most"),
        (" AND ".join(["params.a = 'b'"] * (MAX_COMPARISONS + 1)), "at most 100 comparisons"),
        ("run_id IN (" + ",".join(["'a'"] * (MAX_LISTED + 1)) + ")", "at most 5000 values"),
    ],
)
def test_what_is_wrong_is_refused_and_said(text: str, why: str) -> None:
    with pytest.raises(Rejected, match="filter: ") as refused:
        parse_filter(text, RUNS)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "(" * 50_000 + "params.a = 'b'" + ")" * 50_000,
        "not " * 40_000 + "params.a = 'b'",
        "(" * (MAX_DEPTH + 1) + "params.a = 'b'" + ")" * (MAX_DEPTH + 1),
        "not (" * (MAX_DEPTH + 1) + "params.a = 'b'" + ")" * (MAX_DEPTH + 1),
    ],
)
def test_what_nests_deep_is_refused_before_it_is_parsed(text: str) -> None:
    with pytest.raises(Rejected, match="deep"):
        parse_filter(text, RUNS, extended=True)


def test_what_is_just_as_deep_as_may_be_is_read() -> None:
    text = "(" * MAX_DEPTH + "params.a = '(((' and tags.b = 'not not'" + ")" * MAX_DEPTH
    assert len(list(comparisons(parse_filter(text, RUNS, extended=True)))) == 2
    assert isinstance(parse_filter("not " * MAX_DEPTH + "params.a = 'b'", RUNS, extended=True), Not)


def test_the_extension_binds_not_before_and_before_or() -> None:
    found = parse_filter("params.a = '1' or not params.b = '2' and (params.c = '3' or params.d = '4')", RUNS, extended=True)
    a, b, c, d = (Comparison(Kind.PARAM, key, Op.EQ, value) for key, value in zip("abcd", "1234", strict=True))
    assert found == Or((a, And((Not(b), Or((c, d))))))


def test_orderings() -> None:
    assert parse_order_by(["metrics.`a b` DESC", "params.x", "start_time asc", "`Run Name` desc"], RUNS) == (
        OrderBy(Kind.METRIC, "a b", False),
        OrderBy(Kind.PARAM, "x", True),
        OrderBy(Kind.ATTRIBUTE, "start_time", True),
        OrderBy(Kind.ATTRIBUTE, "run_name", False),
    )
    assert parse_order_by(["last_update_time DESC"], EXPERIMENTS) == (OrderBy(Kind.ATTRIBUTE, "last_update_time", False),)
    for clauses, why in [
        (["metrics.x", "metric.x DESC"], "duplicate"),
        (["created", "start_time"], "duplicate"),
        (["dataset.name"], "Invalid order_by entity"),
        (["nothing"], "Invalid attribute key"),
        (["metrics.x DESC DESC"], "Could not be parsed"),
        (["metrics.x; DROP TABLE run"], "Could not be parsed"),
        ([""], "Could not be parsed"),
        (["start_time\x00"], "character 0"),
        ([f"metrics.m{index}" for index in range(11)], "at most 10"),
    ]:
        with pytest.raises(Rejected, match="order_by: ") as refused:
            parse_order_by(clauses, RUNS)
        assert why in str(refused.value)
    with pytest.raises(Rejected, match="Invalid order_by entity"):
        parse_order_by(["tags.x"], EXPERIMENTS)


def test_experiments_have_words_of_their_own() -> None:
    assert parse_filter("name ILIKE '%x%' and tags.`mlflow.experiment.isGateway` IS NULL", EXPERIMENTS) == And(
        (
            Comparison(Kind.ATTRIBUTE, "name", Op.ILIKE, "%x%"),
            Comparison(Kind.TAG, "mlflow.experiment.isGateway", Op.IS_NULL, None),
        )
    )
    assert parse_filter("experiment_id IN ('1', '2')", EXPERIMENTS) == Comparison(Kind.ATTRIBUTE, "experiment_id", Op.IN, ("1", "2"))
    for text in ("metrics.a > 1", "run_name = 'a'", "experiment_id LIKE '1'", "name IN ('a')", "creation_time > 'a'"):
        with pytest.raises(Rejected):
            parse_filter(text, EXPERIMENTS)


_KEYS = st.text(st.characters(exclude_characters="`\x00", exclude_categories=["Cs"]), min_size=1, max_size=12)
_TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)


@st.composite
def _comparison(draw: st.DrawFn) -> Comparison:
    kind = draw(st.sampled_from([Kind.METRIC, Kind.PARAM, Kind.TAG]))
    key = draw(_KEYS)
    if kind is Kind.METRIC:
        return Comparison(kind, key, draw(st.sampled_from(sorted(NUMERIC))), draw(st.floats(allow_nan=False, allow_infinity=False)))
    op = draw(st.sampled_from([Op.EQ, Op.NE, Op.LIKE, Op.ILIKE, Op.IS_NULL, Op.IS_NOT_NULL]))
    return Comparison(kind, key, op, None if op in (Op.IS_NULL, Op.IS_NOT_NULL) else draw(_TEXTS))


def written(condition: Filter, quote: str) -> str:
    """The text of a filter, everything that can be in parentheses."""
    match condition:
        case Comparison(kind, key, op, value):
            right = (
                "" if value is None else repr(value) if isinstance(value, float) else quote + str(value).replace(quote, quote * 2) + quote
            )
            return f"{kind}.`{key}` {op} {right}"
        case Not(part):
            return f"NOT ({written(part, quote)})"
        case And(parts):
            return "(" + " AND ".join(written(part, quote) for part in parts) + ")"
        case Or(parts):
            return "(" + " OR ".join(written(part, quote) for part in parts) + ")"


_FILTERS: st.SearchStrategy[Filter] = st.recursive(
    _comparison(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Or(tuple(parts))),
        inner.map(Not),
    ),
    max_leaves=12,
)


@given(_FILTERS, st.sampled_from(["'", '"']))
def test_a_filter_that_was_written_is_read_as_it_was(condition: Filter, quote: str) -> None:
    assert parse_filter(written(condition, quote), RUNS, extended=True) == condition


@given(st.text(max_size=80), st.booleans())
def test_any_text_is_read_or_refused_and_nothing_else(text: str, extended: bool) -> None:
    with contextlib.suppress(Rejected):
        list(comparisons(parse_filter(text, RUNS, extended=extended)))
    with contextlib.suppress(Rejected):
        parse_order_by([text], RUNS)
