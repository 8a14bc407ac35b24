"""Something is away for a while, under callers: the gateway serves on where it can, the rest resumes by itself, nothing is lost or doubled.

HEADRACE_OUTAGE_SECONDS says how long (10 by default; `make chaos` takes 60).
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from headrace.http import Unreachable
from localstack import api
from localstack.layout import Stack

from tests.e2e.trainings import Waiting, delivery_that_trains, ended, make_source, training
from tests.e2e.world import GOOD, WEAK, World, eventually, model_bytes

OUTAGE_S = float(os.environ.get("HEADRACE_OUTAGE_SECONDS", "10"))
LATE_S = 180.0
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

    def is_back() -> bool:
        row = {row.name: row for row in api.status(system.paths.state)}[part]
        return row.state == "ready" and row.pid != victim

    eventually(is_back, 60, f"{part} is back")


def wait_through() -> None:
    """Lets the outage last as long as it should: the one wait here that is for time itself."""
    end = time.monotonic() + OUTAGE_S
    while time.monotonic() < end:
        time.sleep(0.1)


def wait_a_moment(sent: Callable[[], int]) -> None:
    """Until callers have sent some more requests with something away."""
    before = sent()
    eventually(lambda: sent() > before + 20)


@pytest.fixture(scope="module")
def breakable(stack_servers: object) -> Iterator[Stack]:
    """A whole system of this module's own."""
    made: Stack = stack_servers.servers.new_system("outages")  # type: ignore[attr-defined]  # the fixture's class lives in conftest.py
    yield made
    api.down(made.paths.state)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder that trains."""
    return make_source(tmp_path_factory.mktemp("outages"))


def serving(system: Stack, text: Callable[[World], str] = World.delivery) -> World:
    """An endpoint of a name that is not used yet, which serves a weak model."""
    world = World(system, f"outage-{secrets.token_hex(3)}")
    world.apply(text(world))
    world.arrives(world.finish_run(model_bytes(WEAK)), "completed")
    return world


@pytest.fixture
def world(breakable: Stack) -> Iterator[World]:
    made = serving(breakable)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(breakable: Stack) -> Iterator[World]:
    """For short outages, one after another; each adds a version of its own."""
    made = serving(breakable)
    yield made
    made.close()


def holds_together(world: World, run: str) -> None:
    """The run becomes one version, by one rollout, and no event is left over."""
    journey = world.arrives(run, "completed", LATE_S)
    versions = world.versions()
    assert journey["version"] == max(versions), "one run became one version"
    assert versions[journey["version"]]["aliases"] == ["champion"]
    rollouts = world.client.get("/api/v1/rollouts", endpoint=world.name)["rollouts"]
    assert sorted(rollout["ref"]["version"]["version"] for rollout in rollouts) == sorted(versions), "one version had one rollout"
    letters = world.client.get("/api/v1/dead-letters")
    assert (letters["dead_letters"], letters.get("unreachable", [])) == ([], [])


@contextmanager
def training_on_its_way(system: Stack, source: Path) -> Iterator[tuple[World, Waiting]]:
    """A delivery of its own, and a training of it that is in the middle."""
    world = World(system, f"outage-{secrets.token_hex(3)}")
    try:
        world.apply(delivery_that_trains(world))
        with Waiting(world, source) as waiting:
            waiting.until_waiting(attempt=1)
            yield world, waiting
    finally:
        world.close()


def trained(world: World, waiting: Waiting, attempts: int) -> None:
    """The training has succeeded after so many attempts, never two at once, and what it made serves."""
    told = ended(world, waiting.id, LATE_S)
    assert (told["status"], told["attempt"], waiting.most_at_once) == ("succeeded", attempts, 1), told
    assert world.arrives(told["run_id"], "completed", LATE_S)["version"] == 1
    assert list(world.versions()) == [1], "one training became one version"


@pytest.mark.parametrize("part", ["kafka", "postgres", "s3"])
def test_callers_notice_nothing_and_what_is_on_its_way_arrives(breakable: Stack, world: World, source: Path, part: str) -> None:
    with training_on_its_way(breakable, source) as (other, waiting), world.calling(rate=30) as callers:
        run = world.finish_run(model_bytes(GOOD))
        with away(breakable, part):
            waiting.go()
            before = callers.sent
            wait_through()
            assert callers.sent > before
        holds_together(world, run)
        trained(other, waiting, attempts=1)
    assert not callers.failures
    assert sum(callers.answers.values()) == callers.sent


def test_triton_comes_back_with_its_models_and_a_rollout_waits_for_it(breakable: Stack, world: World) -> None:
    with away(breakable, "triton"):
        run = world.finish_run(model_bytes(GOOD, seed=5))
        answer = world.infer()
        assert answer.status_code in (502, 503, 504)
        assert isinstance(answer.json()["error"], str)
        wait_through()
    eventually(lambda: world.infer().status_code == 200, 60, "Triton serves its model again")
    with world.calling(rate=30) as callers:
        holds_together(world, run)
    assert not callers.failures


@pytest.mark.parametrize("part", ["tracker", "registry", "evaluator", "deployer", "otlp"])
def test_a_part_that_is_killed_goes_on_where_it_was(breakable: Stack, shared: World, part: str) -> None:
    with shared.calling(rate=30) as callers:
        run = shared.finish_run(model_bytes(GOOD, seed=hash_of(part)))
        with away(breakable, part):
            wait_a_moment(lambda: callers.sent)
        holds_together(shared, run)
    assert not callers.failures


def test_a_trainer_killed_in_the_middle_trains_again_and_never_twice_at_once(breakable: Stack, shared: World, source: Path) -> None:
    with training_on_its_way(breakable, source) as (world, waiting), shared.calling(rate=30) as callers:
        first = training(world, waiting.id)["run_id"]
        with away(breakable, "trainer"):
            waiting.until_gone()
            with pytest.raises(Unreachable):
                training(world, waiting.id)
            wait_a_moment(lambda: callers.sent)
        assert waiting.until_waiting(attempt=2) != first
        waiting.go()
        trained(world, waiting, attempts=2)
        lost = world.client.get(f"/api/v1/runs/{first}")["run"]
        assert (lost["status"], lost["reason"]) == ("FAILED", "its trainer died; the training is run again")
    assert not callers.failures


def test_a_gateway_that_is_killed_serves_again_and_what_was_on_its_way_arrives(breakable: Stack, shared: World) -> None:
    """Only what is asked while it is away fails, and by the connection alone."""
    with shared.calling(rate=30) as callers:
        run = shared.finish_run(model_bytes(GOOD, seed=hash_of("gateway")))
        with away(breakable, "gateway"):
            wait_a_moment(lambda: callers.sent)
        answered = sum(callers.answers.values())
        eventually(lambda: sum(callers.answers.values()) > answered + 20, 60, "it answers again")
        failed = sum(callers.failures.values())
        holds_together(shared, run)
        assert sum(callers.failures.values()) == failed
    assert callers.failures
    assert set(callers.failures) <= {"ConnectError", "ReadError", "RemoteProtocolError"}


def hash_of(word: str) -> int:
    """A number that is another for each word: the seed of a model that predicts alike but is another file."""
    return int.from_bytes(word.encode())


def test_nothing_of_the_system_is_left_out(breakable: Stack) -> None:
    """Every part that runs is taken away by one of the tests above."""
    taken: set[Any] = {"trainer", "gateway", "triton"}
    for test in (test_callers_notice_nothing_and_what_is_on_its_way_arrives, test_a_part_that_is_killed_goes_on_where_it_was):
        taken.update(*(mark.args[1] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"))
    assert {row.name for row in api.status(breakable.paths.state)} - {"supervisor", "setup"} == taken
