"""What must hold when trainers are killed, stopped, frozen or lose a job: a training runs once at a time, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from contracts.tracker.v1 import service_pb2 as tracker_pb2
from servicekit.errors import Conflict
from trainer.runner.keeper import CLAIM

SCRIPT = """
import socket, sys
with socket.create_connection(("127.0.0.1", 3128)) as line:
    line.sendall(b"CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\n\\r\\n")
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += line.recv(1)
    print("connected", flush=True)
    word = line.recv(10)
sys.exit(0 if word == b"go" else 5)
"""


@dataclass
class Meeting:
    """A server that every running training holds a connection to: it sees how many run at once, and tells them when to end."""

    port: int = 0
    most_at_once: int = 0
    met: int = 0
    lines: set[asyncio.StreamWriter] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    patient: bool = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lines.add(writer)
        self.met += 1
        self.most_at_once = max(self.most_at_once, len(self.lines))
        self.changed.set()
        if not self.patient:
            writer.write(b"go")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        self.lines.discard(writer)
        self.changed.set()
        writer.close()

    async def until(self, met: int, running: int) -> None:
        """Waits until so many have come in all, and so many are there."""
        async with asyncio.timeout(90):
            while (self.met, len(self.lines)) != (met, running):
                self.changed.clear()
                await self.changed.wait()

    def go(self) -> None:
        """Lets everybody end, those that are still to come too."""
        self.patient = False
        for line in self.lines:
            line.write(b"go")


@pytest.fixture
async def meeting(stack: Any) -> AsyncIterator[Meeting]:
    made = Meeting()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    stack.environment["HEADRACE_TRAINING_EGRESS"] = f"127.0.0.1:{made.port}"
    async with server:
        yield made


async def test_a_trainer_that_is_killed_takes_its_training_along_and_the_next_one_runs_it_again(stack: Any, meeting: Meeting) -> None:
    first = await stack.start_trainer()
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    below = first.descendants()
    assert below
    first.kill()
    await meeting.until(met=1, running=0)
    _, alive = await asyncio.to_thread(psutil.wait_procs, below, 30)
    assert alive == []

    await stack.start_trainer()
    await meeting.until(met=2, running=1)
    meeting.go()
    ended = await stack.ended(training.training_id)
    assert (ended.status, ended.attempt) == ("succeeded", 2)
    assert meeting.most_at_once == 1
    runs = await stack.runs(training.training_id)
    assert [(run.status, run.source.training_id) for run in runs] == [
        ("FAILED", training.training_id),
        ("FINISHED", training.training_id),
    ]
    assert "died" in runs[0].reason
    assert await stack.events(training.training_id) == ["job.submitted", "job.started", "job.started", "job.succeeded"]
    log = await stack.log(training.training_id)
    assert log.count("connected\n") == 2


async def test_killed_after_its_run_had_finished_it_is_not_run_again(stack: Any, meeting: Meeting) -> None:
    """The trainer dies between the end of the run and the end of the job."""
    first = await stack.start_trainer()
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    run_id = (await stack.get(training.training_id)).run_id
    first.kill()
    await meeting.until(met=1, running=0)
    await stack.tracker.FinishRun(tracker_pb2.FinishRunRequest(run_id=run_id, status="FINISHED"))
    await stack.start_trainer()
    ended = await stack.ended(training.training_id)
    assert (ended.status, ended.run_id) == ("succeeded", run_id)
    assert meeting.met == 1
    assert len(await stack.runs(training.training_id)) == 1
    assert await stack.events(training.training_id) == ["job.submitted", "job.started", "job.succeeded"]


async def test_a_process_of_an_attempt_that_dies_alone_is_replaced(stack: Any, meeting: Meeting) -> None:
    trainer = await stack.start_trainer()
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    next(process for process in trainer.descendants() if "trainer.runner" in process.cmdline()).kill()
    await meeting.until(met=2, running=1)
    meeting.go()
    ended = await stack.ended(training.training_id)
    assert (ended.status, ended.attempt) == ("succeeded", 2)
    assert meeting.most_at_once == 1


async def test_a_trainer_that_is_told_to_stop_hands_its_training_back(stack: Any, meeting: Meeting) -> None:
    first = await stack.start_trainer()
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    assert await asyncio.to_thread(first.stop) == 0
    await meeting.until(met=1, running=0)
    waiting = await stack.rows("SELECT state, attempt FROM trainer.job")
    assert [(row.state, row.attempt) for row in waiting] == [("queued", 0)]
    await stack.start_trainer()
    await meeting.until(met=2, running=1)
    meeting.go()
    ended = await stack.ended(training.training_id)
    assert (ended.status, ended.attempt) == ("succeeded", 1)  # what was handed back does not count as an attempt
    assert [(run.status, run.reason) for run in await stack.runs(training.training_id)] == [
        ("KILLED", "the trainer stops; the training is run again"),
        ("FINISHED", ""),
    ]


async def test_a_failure_of_the_users_code_is_counted_once_though_a_later_attempt_is_handed_back(stack: Any, meeting: Meeting) -> None:
    first = await stack.start_trainer(HEADRACE_MAX_ATTEMPTS="3")
    training = await stack.submit(SCRIPT.format(port=meeting.port), max_attempts=3)
    await meeting.until(met=1, running=1)
    for line in meeting.lines:
        line.write(b"no")
    await meeting.until(met=2, running=1)
    failures = "SELECT failures, reason FROM trainer.training"
    assert [row.failures for row in await stack.rows(failures)] == [1]
    assert await asyncio.to_thread(first.stop) == 0
    assert [(row.failures, row.reason) for row in await stack.rows(failures)] == [(1, "handed back")]
    await stack.start_trainer()
    await meeting.until(met=3, running=1)
    meeting.go()
    assert (await stack.ended(training.training_id)).status == "succeeded"


async def test_a_training_whose_job_is_lost_is_killed_and_says_nothing_more(stack: Any, meeting: Meeting) -> None:
    await stack.start_trainer(HEADRACE_RUN_LEASE_S="2")
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    run_id = (await stack.get(training.training_id)).run_id
    # Another trainer has it from now on.
    steal = (
        "UPDATE trainer.job SET fencing_token = fencing_token + 1, worker = 'another', lease_until = now() + interval '1 hour' RETURNING 1"
    )
    await stack.rows(steal)
    await meeting.until(met=1, running=0)
    async with asyncio.timeout(60):
        run = await stack.run(run_id)
        while run.status == "RUNNING":
            await asyncio.sleep(0.05)
            run = await stack.run(run_id)
    assert (run.status, run.reason) == ("FAILED", "lease expired")
    left = await stack.rows("SELECT state, worker FROM trainer.job")
    assert [(row.state, row.worker) for row in left] == [("running", "another")]
    assert (await stack.get(training.training_id)).status == "running"


async def test_a_frozen_trainer_keeps_its_training_and_another_does_not_take_it(stack: Any, meeting: Meeting) -> None:
    first = await stack.start_trainer(HEADRACE_JOB_LEASE_S="3")
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    first.process.send_signal(signal.SIGSTOP)
    try:
        renewed = (await stack.rows("SELECT lease_until FROM trainer.job"))[0].lease_until
        await stack.start_trainer(HEADRACE_JOB_LEASE_S="3", HEADRACE_STATE_DIR=str(stack.folder / "other"))
        async with asyncio.timeout(60):  # until the lease of the time of freezing is long over: the process of the attempt renews it
            over = False
            while not over:
                await asyncio.sleep(0.1)
                over = (await stack.rows("SELECT now() > :at AS over", at=renewed))[0].over
        now = await stack.rows("SELECT lease_until > now() AS held, attempt FROM trainer.job")
        assert [(row.held, row.attempt) for row in now] == [(True, 1)]
    finally:
        first.process.send_signal(signal.SIGCONT)
    # Thawed, it may believe that the lease is lost and end the attempt, or go on; never do two run at once.
    meeting.go()
    assert (await stack.ended(training.training_id)).status == "succeeded"
    assert meeting.most_at_once == 1


async def test_two_trainers_do_not_share_a_state_folder(stack: Any) -> None:
    await stack.start_trainer()
    with pytest.raises(AssertionError, match="ended while it started"):
        await stack.start_trainer()
    assert stack.started[1].process.wait(30) == 1


async def test_a_process_that_outlived_its_trainer_is_killed_by_the_next(stack: Any, meeting: Meeting) -> None:
    """Should a kernel not deliver the death signal: pid and start time are on file."""
    folder = stack.state_dir / "jobs" / "some-training" / "attempt-1"
    folder.mkdir(parents=True)
    outliving = await asyncio.create_subprocess_exec("sleep", "600")
    innocent = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        started = psutil.Process(outliving.pid).create_time()
        (folder / "process.json").write_text(json.dumps({"pid": outliving.pid, "started": started}))
        (folder / CLAIM).write_text("half of a cla")
        other = stack.state_dir / "jobs" / "some-training" / "attempt-2"
        other.mkdir()
        (other / "process.json").write_text(json.dumps({"pid": innocent.pid, "started": started - 1_000}))
        await stack.start_trainer()
        async with asyncio.timeout(30):
            assert await outliving.wait() == -signal.SIGKILL
        assert innocent.returncode is None
        assert not (folder / "process.json").exists()
    finally:
        for process in (outliving, innocent):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def test_writes_of_an_older_attempt_are_refused_by_the_tracker(stack: Any, meeting: Meeting) -> None:
    await stack.start_trainer()
    training = await stack.submit(SCRIPT.format(port=meeting.port))
    await meeting.until(met=1, running=1)
    run_id = (await stack.get(training.training_id)).run_id
    # A later claim of the same job takes the run over.
    rows = await stack.rows("SELECT requested_by, request_id, fencing_token FROM tracker.run WHERE run_id = :run", run=run_id)
    request = tracker_pb2.CreateRunRequest(request_id=rows[0].request_id, fencing_token=rows[0].fencing_token + 1)
    assert (await stack.tracker.CreateRun(request)).run.run_id == run_id
    finish = tracker_pb2.FinishRunRequest(run_id=run_id, status="FINISHED", fencing_token=rows[0].fencing_token)
    with pytest.raises(Conflict, match="newer attempt"):
        await stack.tracker.FinishRun(finish)
    # The older attempt learns it by the lease that it cannot renew, and ends.
    await meeting.until(met=1, running=0)
