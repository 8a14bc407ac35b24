"""What processes hold is let go in the order given, and one that fails does not keep the others from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from servicekit.lifecycle import Closing


def _close(name: str, closed: list[str], error: Exception | None = None) -> Callable[[], Awaitable[None]]:
    async def close() -> None:
        closed.append(name)
        if error is not None:
            raise error

    return close


async def test_closes_in_the_order_given_and_not_before_the_stop() -> None:
    closed: list[str] = []
    closing = Closing(_close("channel", closed), _close("broker", closed), _close("engine", closed))
    await closing.start()
    assert closed == []
    await closing.stop()
    assert closed == ["channel", "broker", "engine"]


async def test_one_that_fails_keeps_no_other_open_and_is_told_of() -> None:
    closed: list[str] = []
    error = ConnectionError("gone")
    closing = Closing(_close("broker", closed, error), _close("engine", closed))
    with pytest.raises(ExceptionGroup) as raised:
        await closing.stop()
    assert closed == ["broker", "engine"]
    assert raised.value.exceptions == (error,)
