"""When a cron trigger is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer.domain.schedule import LOOK_BACK, check_cron, last_due

SUNDAY = datetime(2026, 2, 1, 3, 30, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "minute"),
    [
        ("* * * * *", 30),
        ("*/7 * * * *", 28),
        ("5-20/5 * * * *", 20),
        ("0 3 * * *", 0),
        ("0,15 3 1 2 *", 15),
        ("10 3 * * 0", 10),
        ("10 3 * * 7", 10),
        ("20/4 * * * *", 28),
        ("10 3 1 * 3", 10),  # the first of the month, though no Wednesday: either will do
        ("10 3 9 * 0", 10),  # a Sunday, though not the ninth
    ],
)
def test_the_last_minute_at_which_it_was_due(cron: str, minute: int) -> None:
    assert check_cron(cron) == ""
    assert last_due(cron, SUNDAY - timedelta(minutes=59), SUNDAY) == SUNDAY.replace(minute=minute, second=0)


@pytest.mark.parametrize("cron", ["31 3 * * *", "0 4 * * *", "0 3 2 * *", "0 3 * 3 *", "0 3 * * 1-6", "0 3 2 * 1"])
def test_it_was_not_due(cron: str) -> None:
    assert check_cron(cron) == ""
    assert last_due(cron, SUNDAY - timedelta(minutes=59), SUNDAY) is None


def test_what_was_looked_at_is_not_due_again_and_what_is_long_ago_is_passed_over() -> None:
    assert last_due("30 3 * * *", SUNDAY - timedelta(seconds=21), SUNDAY) is not None
    assert last_due("30 3 * * *", SUNDAY.replace(second=0), SUNDAY) is None
    assert last_due("0 1 * * *", SUNDAY - timedelta(days=3), SUNDAY) is None


@settings(deadline=None)  # a machine may be busy
@given(st.integers(0, 10_000), st.integers(30, 5_000))
def test_every_minute_is_found_once_however_often_one_looks(start: int, step_s: int) -> None:
    at = SUNDAY + timedelta(minutes=start)
    end = at + timedelta(hours=2)
    found = []
    while at < end:
        until = at + timedelta(seconds=min(step_s, LOOK_BACK.total_seconds() - 60))
        if minute := last_due("*/30 * * * *", at, until):
            found.append(minute)
        at = until
    assert len(found) == len(set(found))
    if step_s < 1_800:
        assert len(found) >= 3


@pytest.mark.parametrize("text", ["* * * * *", "0 3 * * *", "*/5 0-6 1,15 1-12/2 0-7", "59 23 31 12 7"])
def test_cron_expressions(text: str) -> None:
    assert check_cron(text) == ""


@pytest.mark.parametrize(
    "text", ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "x * * * *", "* * * * * *"]
)
def test_what_is_no_cron_expression(text: str) -> None:
    assert check_cron(text)
