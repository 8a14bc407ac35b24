"""Filters of searches: what is read is what a plain reading of the text means, and nothing makes the reader stumble."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry.domain.errors import DomainError, Malformed
from registry.domain.filters import (
    MODEL_ATTRIBUTES,
    MODEL_ORDER,
    VERSION_ATTRIBUTES,
    Condition,
    Ordering,
    read_filter,
    read_order,
    without_prompts,
)

_KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
_VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
_SPACES = st.sampled_from([" ", "  ", "\t", "\n "])


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, Condition]:
    """A comparison as text and as what it means."""
    kind = draw(st.sampled_from(["tag", "attribute", "list", "number"]))
    gap = draw(_SPACES)
    if kind == "number":
        operator, number = draw(st.sampled_from(["=", "!=", "<", "<=", ">", ">="])), draw(st.integers(-(2**63) + 1, 2**63 - 1))
        return f"version_number{operator}{number}", Condition(False, "version_number", operator, number)
    mark = draw(st.sampled_from("'\""))
    quoted = st.builds(lambda value: (value, mark + value.replace(mark, mark * 2) + mark), _VALUES)
    if kind == "list":
        operator, values = draw(st.sampled_from(["IN", "NOT IN"])), draw(st.lists(quoted, min_size=1, max_size=3))
        return f"run_id {operator}{gap}({', '.join(text for _, text in values)})", Condition(
            False, "run_id", operator, tuple(value for value, _ in values)
        )
    operator, (value, text) = draw(st.sampled_from(["=", "!=", "LIKE", "ILIKE"])), draw(quoted)
    said = draw(st.sampled_from([operator, operator.lower()]))
    if kind == "attribute":
        return f"attribute.name{gap}{said}{gap}{text}", Condition(False, "name", operator, value)
    key = draw(_KEYS)
    return f"tags.`{key.replace('`', '``')}`{gap}{said}{gap}{text}", Condition(True, key, operator, value)


@given(st.lists(conditions(), max_size=4), st.sampled_from([" AND ", " and ", "\nAnd\t"]))
def test_what_is_written_is_read(written: list[tuple[str, Condition]], joined: str) -> None:
    assert list(read_filter(joined.join(text for text, _ in written), VERSION_ATTRIBUTES)) == [condition for _, condition in written]


@given(st.text(st.sampled_from("name tags.run_id=!<>LIKEINAND'\"`(),1 \x00\\;-"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for attributes in (MODEL_ATTRIBUTES, VERSION_ATTRIBUTES):
        try:
            read = read_filter(text, attributes)
        except DomainError:
            continue
        assert all(condition.tag or condition.key in attributes for condition in read)


def test_the_words_that_clients_and_pages_send() -> None:
    assert read_filter("name ilike '%x%'", MODEL_ATTRIBUTES) == (Condition(False, "name", "ILIKE", "%x%"),)
    assert read_filter("tags.mlflow.source.name = 'a'", MODEL_ATTRIBUTES) == (Condition(True, "mlflow.source.name", "=", "a"),)
    assert read_filter("run_id IN ('a','b',)", VERSION_ATTRIBUTES) == (Condition(False, "run_id", "IN", ("a", "b")),)
    assert read_filter("  ", MODEL_ATTRIBUTES) == ()
    rest, prompts = without_prompts(read_filter("name = 'a' AND tags.`mlflow.prompt.is_prompt` = 'True'", MODEL_ATTRIBUTES))
    assert (rest, prompts) == ((Condition(False, "name", "=", "a"),), True)
    assert without_prompts(rest) == (rest, False)


def test_orders() -> None:
    assert read_order(["name", "timestamp desc"], MODEL_ORDER) == (Ordering("name", True), Ordering("last_updated_timestamp", False))
    for wrong in (["x"], [""], ["name up"], ["name", "name DESC"], ["timestamp", "last_updated_timestamp"], ["name"] * 11):
        with pytest.raises(DomainError):
            read_order(wrong, MODEL_ORDER)


@pytest.mark.parametrize(
    "text", ["name = 'a", "name IN ('a'", "name IN ('a',", "tags.", "AND name = 'a'", "name = 'a' AND", "name NOT LIKE 'a'"]
)
def test_what_breaks_off_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        read_filter(text, MODEL_ATTRIBUTES)
