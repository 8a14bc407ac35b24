"""How long a job waits, and what its table refuses to be called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import Backoff, State, schema


@given(attempt=st.integers(1, 10_000), luck=st.floats(0, 1), first=st.floats(0.001, 10), most=st.floats(10, 3600))
def test_it_grows_to_its_limit_and_never_beyond(attempt: int, luck: float, first: float, most: float) -> None:
    backoff = Backoff(first, most, random=lambda: luck)
    wait = backoff.after(attempt)
    assert first / 2 <= wait <= most
    assert backoff.after(attempt + 1) >= wait


def test_it_doubles_and_is_spread() -> None:
    assert [Backoff(1, 300, random=lambda: 1.0).after(n) for n in (1, 2, 3, 10)] == [1, 2, 4, 300]
    assert [Backoff(1, 300, random=lambda: 0.0).after(n) for n in (1, 2, 3, 10)] == [0.5, 1, 2, 150]


def test_which_states_are_final() -> None:
    assert {state for state in State if state.final} == {State.SUCCEEDED, State.FAILED, State.CANCELLED}


@pytest.mark.parametrize("name", ["", "Trainer", 'x"; DROP TABLE y', "a b", "1a"])
def test_a_schema_is_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="schema"):
        schema.table(name)
