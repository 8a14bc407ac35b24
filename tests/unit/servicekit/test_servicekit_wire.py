"""What every service's answers share: the length of a page and a point in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from servicekit.errors import Invalid
from servicekit.moments import moment
from servicekit.paging import page_size


@pytest.mark.parametrize(("asked", "given"), [(0, 100), (1, 1), (1_000, 1_000), (1_001, 1_000)])
def test_a_page_has_a_length(asked: int, given: int) -> None:
    assert page_size(asked) == given


def test_a_page_is_not_shorter_than_nothing() -> None:
    with pytest.raises(Invalid) as raised:
        page_size(-1)
    assert [violation.field for violation in raised.value.violations] == ["page_size"]


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-5, minutes=-30))])
def test_a_moment_is_the_same_in_every_zone(zone: timezone) -> None:
    at = datetime(2026, 2, 28, 23, 59, 59, 123_456, tzinfo=UTC)
    assert moment(at.astimezone(zone)).ToDatetime(UTC) == at
