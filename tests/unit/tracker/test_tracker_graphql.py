"""The reading of GraphQL queries: the page's two, what GraphQL allows beside them, and what must not take the server's time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicekit.errors import Invalid
from tracker.entrypoints.mlflow.selections import MAX_DEPTH, Selection, project, read

GET_RUN = """
query GetRun($data: MlflowGetRunInput!) @component(name: "MLflow.ExperimentRunTracking") {
  mlflowGetRun(input: $data) {  # a comment
    apiError { code message __typename }
    run { info { ...Info, userId } data { metrics { key value } } __typename }
  }
}
fragment Info on MlflowRunInfo { runName: runName id: runUuid }
"""


def test_the_pages_query_is_read_with_its_unknown_directive() -> None:
    (asked,) = read(GET_RUN, {"data": {"runId": "x"}}, "GetRun")
    assert (asked.answered_as, asked.name, asked.arguments) == ("mlflowGetRun", "mlflowGetRun", {"input": {"runId": "x"}})
    error, run = asked.fields
    assert [one.name for one in error.fields] == ["code", "message", "__typename"]
    info = run.fields[0]
    assert [(one.answered_as, one.name) for one in info.fields] == [("runName", "runName"), ("id", "runUuid"), ("userId", "userId")]


def test_values_may_stand_in_the_query() -> None:
    (asked,) = read(
        '{ a(x: {b: [1, -2.5, "q\\"", true, null, ENUM], c: $v}) { ... on T @skip(if: true) { d } ... { d { e } } d { f } } }', {"v": 7}, ""
    )
    assert asked.arguments == {"x": {"b": [1, -2.5, 'q"', True, None, "ENUM"], "c": 7}}
    assert asked.fields == (Selection("d", "d", {}, (Selection("e", "e"), Selection("f", "f"))),)


MANY = " ".join(
    f"fragment {one} on T {{ {' '.join(f'x{i}: x {{ ...{after} }}' for i in range(9))} }}"
    for one, after in zip("ABCDEFG", "BCDEFGH", strict=True)
)
"""Millions of fields, were they counted when it is too late."""


@pytest.mark.parametrize(
    "query",
    [
        "", "{", "}", "{a", "{a(}", "{a(b)}", "{a(b:)}", "query Q(", "mutation { a }", "subscription { a }", "{a}{", "fragment F { a }",
        "{ ...Missing }", "query A {a} query B {b}", "fragment F on T {a}", "{a(b: \"x)}", "{a(b: 1.2.3)}", "{ a ?", "{" * 10_000,
        "{ a(b: " + "[" * 10_000, "{ ...F } fragment F on T { ...F }", "{ ...F } fragment F on T { a { ...F } }", "x" * 70_000,
        "{ ...A } fragment H on T { y } " + MANY, "#" * 60_000 + "\n?",
    ],
)  # fmt: skip
def test_what_is_no_query_is_refused(query: str) -> None:
    with pytest.raises(Invalid):
        read(query, {}, "")


def test_the_operation_is_chosen_by_its_name() -> None:
    both = "query A { a } query B { b }"
    assert read(both, {}, "B")[0].name == "b"
    with pytest.raises(Invalid, match="no operation"):
        read(both, {}, "C")


@given(st.text('{}()[]:!$@=|&."\\ \n#,abon123-', max_size=60))
def test_any_text_is_read_or_refused(query: str) -> None:
    try:
        read(query, {}, "")
    except Invalid:
        return


def test_depth_is_counted_where_fragments_are_used() -> None:
    deep = "{ a " * (MAX_DEPTH - 1) + "}" * (MAX_DEPTH - 1)
    assert read(deep, {}, "")
    with pytest.raises(Invalid, match="deep"):
        read("{ a " * (MAX_DEPTH + 2) + "}" * (MAX_DEPTH + 2), {}, "")


def test_of_a_value_only_what_is_asked_is_told() -> None:
    value = {"__typename": "T", "a": [{"__typename": "U", "b": 1, "c": 2}], "d": None}
    assert project(value, read("{ x: a { b } d { e } __typename }", {}, "")) == {"x": [{"b": 1}], "d": None, "__typename": "T"}
    for wrong in ("{ z }", "{ a { z } }", "{ a { b { c } } }"):
        with pytest.raises(Invalid):
            project(value, read(wrong, {}, ""))
