"""Connections to a runtime that cannot be opened: whoever waits is told, whatever the reason."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

import pytest
from gateway.upstream import Connection, Failure, Pool


class Waiting:
    """A receiver that notes how it failed."""

    wire = b""
    connection: Connection | None = None

    def __init__(self) -> None:
        self.deadline = monotonic() + 60
        self.failure: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()

    def failed(self, failure: Failure, *, stale: bool) -> None:
        self.failure.set_result(failure)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was not expected")


async def test_a_host_name_that_no_resolver_takes_fails_all_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool("x" * 64 + ".example", 80, max_connections=1, max_waiting=9, connect_timeout_s=5, idle_timeout_s=5, stream_above=1_000)
    waiting = [Waiting() for _ in range(3)]
    with caplog.at_level(logging.ERROR, "gateway.upstream"):
        for one in waiting:
            pool.submit(one)
        async with asyncio.timeout(20):
            assert await asyncio.gather(*(one.failure for one in waiting)) == [Failure.CONNECT] * 3
    assert "cannot connect to xxx" in caplog.text
    pool.close()
