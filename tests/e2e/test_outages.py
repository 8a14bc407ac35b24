"""A server is away for a while, under callers: the gateway serves on where it can, the rest resumes by itself, nothing is lost or doubled.

HEADRACE_OUTAGE_SECONDS says how long (10 by default; `make chaos` takes 60).
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from localstack import api
from localstack.layout import Stack

from tests.e2e.world import GOOD, WEAK, World, eventually, model_bytes

OUTAGE_S = float(os.environ.get("HEADRACE_OUTAGE_SECONDS", "10"))
pytestmark = [pytest.mark.outage, pytest.mark.timeout(600 + 20 * OUTAGE_S)]


@contextmanager
def away(system: Stack, part: str) -> Iterator[None]:
    """Kills a part (SIGKILL) and keeps it from being restarted within the block; waits until it is back."""
    rows = {row.name: row for row in api.status(system.paths.state)}
    supervisor, victim = rows["supervisor"].pid, rows[part].pid
    assert supervisor is not None
    assert victim is not None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(victim, signal.SIGKILL)
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)
    eventually(lambda: {row.name: row for row in api.status(system.paths.state)}[part].state == "ready", 60, f"{part} is back")


def wait_through() -> None:
    """Lets the outage last as long as it should: the one wait here that is for time itself."""
    end = time.monotonic() + OUTAGE_S
    while time.monotonic() < end:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def breakable(stack_servers: object) -> Iterator[Stack]:
    """A whole system of this module's own."""
    made: Stack = stack_servers.servers.new_system("outages")  # type: ignore[attr-defined]  # the fixture's class lives in conftest.py
    yield made
    api.down(made.paths.state)


@pytest.fixture
def world(breakable: Stack) -> Iterator[World]:
    """An endpoint that serves a weak model."""
    made = World(breakable, f"outage-{secrets.token_hex(3)}")
    try:
        made.apply()
        made.arrives(made.finish_run(model_bytes(WEAK)), "completed")
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("part", ["kafka", "postgres", "s3"])
def test_callers_notice_nothing_and_a_run_on_its_way_arrives(breakable: Stack, world: World, part: str) -> None:
    with world.calling(rate=30) as callers:
        run = world.finish_run(model_bytes(GOOD))
        with away(breakable, part):
            before = callers.sent
            wait_through()
            assert callers.sent > before
        journey = world.arrives(run, "completed", 180)
    assert not callers.failures
    assert sum(callers.answers.values()) == callers.sent
    assert journey["version"] == 2, "one run became one version"
    assert sorted(world.versions()) == [1, 2]
    rollouts = world.client.get("/api/v1/rollouts", endpoint=world.name)["rollouts"]
    assert sorted(rollout["ref"]["version"]["version"] for rollout in rollouts) == [1, 2], "one version had one rollout"
    assert world.client.get("/api/v1/dead-letters")["dead_letters"] == []


def test_triton_comes_back_with_its_models(breakable: Stack, world: World) -> None:
    with away(breakable, "triton"):
        answer = world.infer()
        assert answer.status_code in (502, 503, 504)
        assert isinstance(answer.json()["error"], str)
        wait_through()
    eventually(lambda: world.infer().status_code == 200, 60, "Triton serves its model again")
    run = world.finish_run(model_bytes(GOOD, seed=5))
    with world.calling(rate=30) as callers:
        world.arrives(run, "completed", 180)
    assert not callers.failures


@pytest.mark.parametrize("part", ["tracker", "registry", "evaluator", "deployer"])
def test_a_service_that_is_killed_goes_on_where_it_was(breakable: Stack, world: World, part: str) -> None:
    with world.calling(rate=30) as callers:
        run = world.finish_run(model_bytes(GOOD))
        with away(breakable, part):
            wait_a_moment(lambda: callers.sent)
        assert world.arrives(run, "completed", 180)["version"] == 2
    assert not callers.failures


def wait_a_moment(sent: Callable[[], int]) -> None:
    """Until callers have sent some more requests with the service away."""
    before = sent()
    eventually(lambda: sent() > before + 20)
