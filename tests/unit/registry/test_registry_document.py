"""A delivery file as data with line numbers: what is read, what is refused, and that nothing else can happen."""

from __future__ import annotations

import functools
import json
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry.domain import document
from registry.domain.document import parse
from registry.domain.errors import DeliveryInvalid, Problem, TooLarge


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(DeliveryInvalid) as caught:
        parse(text)
    return caught.value.problems


def test_every_field_has_its_line() -> None:
    read = parse(
        dedent("""\
        # a comment
        serve:
          rollout:
            steps: [{weight: 5%},
                    {weight: 25%, requests: 500}]
            guards:
              - {bad: error, margin: 2%}
              - bad: latency_ms > 50
                margin: 2%
        """)
    )
    assert read.content == {
        "serve": {
            "rollout": {
                "steps": [{"weight": "5%"}, {"weight": "25%", "requests": 500}],
                "guards": [{"bad": "error", "margin": "2%"}, {"bad": "latency_ms > 50", "margin": "2%"}],
            }
        }
    }
    assert read.line_of("serve") == 2
    assert read.line_of("serve.rollout.steps[0].weight") == 4
    assert read.line_of("serve.rollout.steps[1].requests") == 5
    assert read.line_of("serve.rollout.guards[1]") == 8
    assert read.line_of("serve.rollout.guards[1].margin") == 9


def test_a_missing_field_has_the_line_of_what_is_around_it() -> None:
    read = parse("a:\n  b:\n    - c: 1\n")
    assert read.line_of("a.b[0].d.e") == 3
    assert read.line_of("a.b[7]") == 2
    assert read.line_of("nowhere[1].at.all") == 1
    assert read.line_of("") == 1


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),  # YAML 1.1 says True
        ("on", "on"),
        ("1:30", "1:30"),  # YAML 1.1 says 90
        ("010", 10),  # YAML 1.1 says 8
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1_000", "1_000"),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("2026-01-02", "2026-01-02"),  # YAML 1.1 says a date
        ("24h", "24h"),
        ("'5'", "5"),
        ("<<", "<<"),
    ],
)
def test_values_by_the_core_schema(written: str, value: object) -> None:
    read = parse(f"a: {written}").content["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "field", "says"),
    [
        ("a: 1\na: 2\n", 2, "a", "given twice: first in line 1"),
        ("a:\n  b: {c: 1, c: 2}\n", 2, "a.b.c", "given twice"),
        ("a: &x 1\nb: *x\n", 1, "a", "anchors and aliases"),
        ("a:\n  - *x\n", 2, "a[0]", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "a", "tags"),
        ("a: !secret x\n", 1, "a", "tags"),
        ("a: 1\n---\nb: 2\n", 2, "(file)", "second document"),
        ("1: x\n", 1, "(file)", "name of a field is text"),
        ("? [a]\n: x\n", 1, "(file)", "name of a field is text"),
        ("a:\n  null: x\n", 2, "a", "name of a field is text"),
        ("a: .inf\n", 1, "a", "finite"),
        ("a: 1e999\n", 1, "a", "too large"),
        ("a: 99999999999999999999\n", 1, "a", "too large"),
        ("a: 1\nb: [1, 2\n", 3, "b[1]", "not YAML"),
        ("a:\n  b: 1\n c: 2\n", 3, "a.b", "not YAML"),
        ("a: 1\n\tb: 2\n", 2, "a", "not YAML"),
        ("a: \x00\n", 1, "(file)", "may not stand in it"),
        ('a: 1\nb: "x\\0"\n', 2, "b", "the character 0"),
        ('a: ["\\uD800"]\n', 1, "a[0]", "half a surrogate pair"),
        ("- a\n", 1, "(file)", "mapping"),
        ("just text", 1, "(file)", "mapping"),
        ("", 1, "(file)", "mapping"),
    ],
)
def test_what_is_refused_names_line_and_field(text: str, line: int, field: str, says: str) -> None:
    found = problems(text)[-1]
    assert (found.line, found.field) == (line, field)
    assert says in found.message


def test_all_duplicates_are_told_at_once() -> None:
    assert [problem.field for problem in problems("a: 1\na: 2\nb: {c: 1, c: 1}\n")] == ["a", "b.c"]


def test_size_depth_and_number_of_values_are_limited() -> None:
    with pytest.raises(TooLarge):
        parse("a: " + "x" * document.MAX_BYTES)
    assert "nested" in problems("[" * 20_000)[-1].message
    assert "nested" in problems("a: " + "[" * 100 + "]" * 100)[-1].message
    assert "values" in problems("a: [" + "1," * (document.MAX_VALUES + 1) + "]")[-1].message


TEXT = functools.partial(st.text, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
"""Texts that a delivery file may hold."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT(min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _readable(value: object) -> bool:
    """Whether YAML's reader takes every character as it stands (it refuses control characters)."""
    text = json.dumps(value, ensure_ascii=False)
    return all(c in "\t" or " " <= c <= "~" or "\xa0" <= c <= "퟿" for c in text) and not set(text) & set("\u2028\u2029\ufeff")


@given(st.dictionaries(TEXT(min_size=1, max_size=8), JSON, max_size=4).filter(_readable))
def test_what_json_says_is_read_as_json_says_it(content: dict[str, object]) -> None:
    read = parse(json.dumps(content, ensure_ascii=False))
    assert document.canonical(read.content) == document.canonical(content)


@given(st.text(alphabet=st.sampled_from("ab:- {}[],&*!|>'\"#%\n\t?~1.\\"), max_size=60) | st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    try:
        read, refusal = parse(text), None
    except DeliveryInvalid as error:
        read, refusal = None, error
    if read is not None:
        json.dumps(read.content, allow_nan=False)
    if refusal is not None:
        lines = sum(text.count(end) for end in "\n\r\x85\u2028\u2029") + 1
        assert refusal.problems
        assert all(1 <= problem.line <= lines for problem in refusal.problems)


def test_canonical_tells_true_from_one() -> None:
    assert document.canonical({"a": True}) != document.canonical({"a": 1})
    assert document.canonical({"a": 1, "b": 2}) == document.canonical({"b": 2, "a": 1})
