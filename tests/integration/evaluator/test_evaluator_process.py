"""`python -m evaluator` as it is run: migrated by command, started from settings alone, killed in the middle of an evaluation."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from evaluator import worker


class Process:
    """An evaluator in a process of its own, with the settings of another one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = os.environ | environment
        self.running: asyncio.subprocess.Process | None = None

    async def run(self, *arguments: str) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "evaluator", *arguments]
        return await asyncio.create_subprocess_exec(*command, env=self._environment, stdout=asyncio.subprocess.DEVNULL)

    async def start(self, announce: Path) -> None:
        self.running = await self.run("--announce", str(announce))
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(announce.exists):
                assert self.running.returncode is None, "it ended before it listened"
                await asyncio.sleep(0.05)
        assert "grpc" in json.loads(await asyncio.to_thread(announce.read_text))

    async def predicting(self) -> list[psutil.Process]:
        """Its processes, as soon as one of them runs a model."""
        assert self.running is not None
        async with asyncio.timeout(60):
            while True:
                children = psutil.Process(self.running.pid).children(recursive=True)
                if any(worker.__name__ in child.cmdline() for child in children):
                    return children
                await asyncio.sleep(0.02)

    async def end(self, how: signal.Signals) -> int:
        assert self.running is not None
        self.running.send_signal(how)
        code = await self.running.wait()
        self.running = None
        return code


@pytest.fixture
async def process() -> AsyncIterator[list[Process]]:
    """Put the processes in here that are to be gone after the test."""
    made: list[Process] = []
    yield made
    for one in made:
        if one.running is not None:
            await one.end(signal.SIGKILL)


async def test_killed_in_the_middle_another_one_does_it_again_and_it_is_told_once(
    start: Any, process: list[Process], topic_prefix: str, tmp_path: Path
) -> None:
    # One evaluator of the test's own makes the database and keeps the peers alive; its own work is stopped.
    evaluator = await start(topic_prefix, idle=True)
    settings = evaluator.settings
    one = Process(
        {
            "HEADRACE_DATABASE_URL": settings.database_url,
            "HEADRACE_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
            "HEADRACE_TOPIC_PREFIX": topic_prefix,
            "HEADRACE_SERVICE_TOKEN": settings.service_token.get_secret_value(),
            "HEADRACE_TRACKER_ADDRESS": settings.tracker_address,
            "HEADRACE_S3_ENDPOINT": settings.s3_endpoint,
            "HEADRACE_S3_ACCESS_KEY": settings.s3_access_key,
            "HEADRACE_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
            "HEADRACE_S3_BUCKET": settings.s3_bucket,
            "HEADRACE_STATE_DIR": str(settings.state_dir),
            "HEADRACE_JOB_LEASE_S": "3",
        }
    )
    process.append(one)
    migrated = await one.run("migrate")
    assert await migrated.wait() == 0
    await one.start(tmp_path / "first")
    await evaluator.apply(require=["parity"])
    run_id = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0, spins=30_000)))
    children = await one.predicting()
    await one.end(signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert not alive, "a process that runs a model outlived the evaluator"
    scratch = settings.state_dir / "scratch"
    (left,) = await asyncio.to_thread(lambda: [path for path in scratch.iterdir() if path.is_dir()])
    assert {path.name.rsplit("-", 1)[0] for path in left.iterdir()} == {"headrace-evaluate", "headrace-predict"}

    await one.start(tmp_path / "second")
    assert not left.exists(), "the holdout of the one that was killed is still there"
    assert (await evaluator.outcome_of(run_id)).type == "eval.passed"
    assert await one.end(signal.SIGTERM) == 0
    connection = await asyncpg.connect(evaluator.dsn)
    try:
        written = await connection.fetch("SELECT key, type FROM evaluator.outbox")
        (job,) = await connection.fetch("SELECT state, attempt FROM evaluator.job")
    finally:
        await connection.close()
    assert [tuple(event) for event in written] == [("flight-delays", "eval.passed")]
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
