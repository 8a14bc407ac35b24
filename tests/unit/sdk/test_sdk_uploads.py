"""How long a part of an upload is tried again while the object store is away."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from headrace import uploads
from headrace.http import HeadraceError, Unreachable


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, in seconds; nothing else moves the clock."""
    made: list[float] = []
    monkeypatch.setattr(uploads, "time", SimpleNamespace(monotonic=lambda: sum(made), sleep=made.append))
    return made


def store(pauses: list[float], back_after_s: float, status: int | None = None) -> httpx.Client:
    """An object store that is away (refuses connections, or answers `status`) until so many seconds have passed."""

    def answer(request: httpx.Request) -> httpx.Response:
        if sum(pauses) >= back_after_s:
            return httpx.Response(200, headers={"etag": '"e"'})
        if status is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(status, text="away")

    return httpx.Client(transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("status", [None, 503])
def test_a_store_that_was_away_for_a_minute_gets_the_part_of_a_training(pauses: list[float], status: int | None) -> None:
    with store(pauses, 60, status) as client:
        assert uploads.put_part(client, "http://s3/part", b"x", patience_s=300) == "e"
    assert 60 <= sum(pauses) < 70


@pytest.mark.parametrize(("status", "error"), [(None, Unreachable), (503, HeadraceError)])
def test_somebody_at_a_prompt_is_told_soon(pauses: list[float], status: int | None, error: type[Exception]) -> None:
    with store(pauses, 60, status) as client, pytest.raises(error, match="object store"):
        uploads.put_part(client, "http://s3/part", b"x")
    assert 5 < sum(pauses) < 15


def test_a_refusal_is_final(pauses: list[float]) -> None:
    with store(pauses, 60, 403) as client, pytest.raises(HeadraceError, match="403"):
        uploads.put_part(client, "http://s3/part", b"x", patience_s=300)
    assert pauses == []
