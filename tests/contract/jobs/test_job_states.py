"""Random lives of jobs on a real PostgreSQL against a model that fits on a page: nobody but the holder ends a job, tokens only grow,
and what has ended stays as it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule, run_state_machine_as_test
from jobs import Backoff, Job, JobQueue, LeaseLost, State, schema
from servicekit.clock import SystemClock, SystemIds
from servicekit.db import create_engine
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")


@dataclass
class Model:
    """What a job should be."""

    max_attempts: int
    state: State = State.QUEUED
    attempt: int = 0
    token: int = 0
    lapsed: bool = False
    cancel: bool = False

    @property
    def claimable(self) -> bool:
        due = self.state is State.QUEUED or (self.state is State.RUNNING and self.lapsed)
        return due and not self.cancel and self.attempt < self.max_attempts


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture
def shared(runner: asyncio.Runner, database: Any) -> Iterator[tuple[asyncio.Runner, JobQueue]]:
    engine = create_engine(database.sqlalchemy)
    queue = JobQueue(engine, "svc", SystemClock(), SystemIds(), Backoff(first_s=0, most_s=0))

    async def prepare() -> None:
        async with engine.begin() as conn:
            await conn.execute(text("CREATE SCHEMA svc"))
            await conn.run_sync(schema.create, "svc")

    runner.run(prepare())
    yield runner, queue
    runner.run(engine.dispose())


def machine(runner: asyncio.Runner, queue: JobQueue) -> type[RuleBasedStateMachine]:
    class Jobs(RuleBasedStateMachine):
        claims = Bundle("claims")

        def __init__(self) -> None:
            super().__init__()
            self.models: dict[str, Model] = {}
            runner.run(self._sql("TRUNCATE svc.job"))

        async def _sql(self, statement: str, **parameters: object) -> Any:
            async with queue.engine.begin() as conn:
                result = await conn.execute(text(statement), parameters)
                return result.all() if result.returns_rows else []

        def write(self, action: Callable[[AsyncConnection], Awaitable[T]]) -> T:
            async def run() -> T:
                async with queue.engine.begin() as conn:
                    return await action(conn)

            return runner.run(run())

        def is_holder(self, job: Job) -> bool:
            model = self.models[job.key]
            return model.state is State.RUNNING and model.token == job.fencing_token

        def as_holder(self, job: Job, action: Callable[[AsyncConnection], Awaitable[T]]) -> T | None:
            """Does it as the holder; for anyone else it must fail with LeaseLost."""
            if self.is_holder(job):
                return self.write(action)
            with pytest.raises(LeaseLost):
                self.write(action)
            return None

        @rule(key=st.sampled_from("ab"), max_attempts=st.integers(1, 3))
        def enqueue(self, key: str, max_attempts: int) -> None:
            self.write(lambda conn: queue.enqueue(conn, "train", key, {"k": key}, max_attempts))
            self.models.setdefault(key, Model(max_attempts))

        @precondition(lambda self: self.models)
        @rule(target=claims)
        def claim(self) -> Any:
            job = runner.run(queue.claim(["train"], "me", 3600))
            if job is None:
                assert not any(model.claimable for model in self.models.values())
                return multiple()
            model = self.models[job.key]
            assert model.claimable
            model.state, model.lapsed = State.RUNNING, False
            model.attempt += 1
            model.token += 1
            assert (job.attempt, job.fencing_token) == (model.attempt, model.token)
            return job

        @precondition(lambda self: any(model.state is State.RUNNING for model in self.models.values()))
        @rule(key=st.sampled_from("ab"))
        def lapse(self, key: str) -> None:
            runner.run(self._sql("UPDATE svc.job SET lease_until = now() - interval '1 s' WHERE key = :key AND state = 'running'", key=key))
            if key in self.models and self.models[key].state is State.RUNNING:
                self.models[key].lapsed = True

        @rule(job=claims)
        def heartbeat(self, job: Job) -> None:
            async def beat(conn: AsyncConnection) -> bool:
                return await queue.heartbeat(job, 3600)

            asked = self.as_holder(job, beat)
            if asked is not None:
                assert asked == self.models[job.key].cancel
                self.models[job.key].lapsed = False

        @rule(job=claims)
        def complete(self, job: Job) -> None:
            held = self.is_holder(job)
            self.as_holder(job, lambda conn: queue.complete(conn, job))
            if held:
                self.models[job.key].state = State.SUCCEEDED

        @rule(job=claims, retry=st.booleans())
        def fail(self, job: Job, retry: bool) -> None:
            state = self.as_holder(job, lambda conn: queue.fail(conn, job, "because", retry))
            if state is not None:
                model = self.models[job.key]
                again = retry and model.attempt < model.max_attempts
                model.state = State.CANCELLED if model.cancel else State.QUEUED if again else State.FAILED
                assert state is model.state

        @rule(job=claims)
        def end_cancelled(self, job: Job) -> None:
            held = self.is_holder(job)
            self.as_holder(job, lambda conn: queue.end_cancelled(conn, job))
            if held:
                self.models[job.key].state = State.CANCELLED

        @rule(job=consumes(claims))
        def release(self, job: Job) -> None:
            held = self.is_holder(job)
            self.as_holder(job, lambda conn: queue.release(conn, job))
            if held:
                model = self.models[job.key]
                model.attempt -= 1
                model.state = State.CANCELLED if model.cancel else State.QUEUED

        @precondition(lambda self: self.models)
        @rule(key=st.sampled_from("ab"))
        def cancel(self, key: str) -> None:
            rows = runner.run(self._sql("SELECT id FROM svc.job WHERE key = :key", key=key))
            if not rows:
                return
            state = self.write(lambda conn: queue.cancel(conn, rows[0].id))
            model = self.models[key]
            if model.state is State.QUEUED:
                model.state = State.CANCELLED
            model.cancel = model.cancel or model.state is State.RUNNING
            assert state is model.state

        @precondition(lambda self: any(model.lapsed for model in self.models.values()))
        @rule()
        def bury(self) -> None:
            graves = self.write(lambda conn: queue.bury(conn, ["train"]))
            expected = {
                key: State.CANCELLED if model.cancel else State.FAILED
                for key, model in self.models.items()
                if model.state is State.RUNNING and model.lapsed and (model.cancel or model.attempt >= model.max_attempts)
            }
            assert {job.key: state for job, state, _ in graves} == expected
            for key, state in expected.items():
                self.models[key].state = state
                self.models[key].token += 1

        @invariant()
        def table_and_model_agree(self) -> None:
            records = {record.key: record for record in runner.run(queue.list())}
            assert {key: (record.state, record.attempt, record.fencing_token) for key, record in records.items()} == {
                key: (model.state, model.attempt, model.token) for key, model in self.models.items()
            }

    return Jobs


def test_every_life_of_a_job_follows_the_model(shared: tuple[asyncio.Runner, JobQueue]) -> None:
    run_state_machine_as_test(
        machine(*shared),
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)),
    )
