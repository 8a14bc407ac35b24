"""Keeps a job's lease while its attempt runs, and ends the attempt when the lease is lost, the job cancelled or the trainer stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from jobs import Job, JobQueue, LeaseLost
from servicekit.errors import Invalid, Transient, explain

from trainer.handlers import Outcome
from trainer.runner.attempt import Attempt

CLAIM, OUTCOME = "attempt.json", "outcome.json"
LOST = "lost"
REASONS: Mapping[str, str] = {"cancelled": "cancelled", "stopped": "the trainer stops; the training is run again"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """What the trainer tells the process of an attempt: the job's claim, which training, who the parent is."""

    training_id: str
    job_id: str
    kind: str
    attempt: int
    fencing_token: int
    max_attempts: int
    parent_pid: int
    traceparent: str

    @property
    def job(self) -> Job:
        return Job(UUID(self.job_id), self.kind, self.training_id, {}, self.attempt, self.fencing_token, self.max_attempts)

    def write(self, folder: Path) -> None:
        (folder / CLAIM).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Claim:
        return cls(**json.loads((folder / CLAIM).read_text()))


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Says how the attempt ended; whoever reads it finds all of it or nothing."""
    partial = folder / f"{OUTCOME}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(outcome)))
    partial.replace(folder / OUTCOME)


def read_outcome(folder: Path) -> Outcome | None:
    """How the attempt ended; None when its process died before it could say so."""
    try:
        told: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
    except FileNotFoundError:
        return None
    return Outcome(**told)


async def run_kept(attempt: Attempt, queue: JobQueue, claim: Claim, folder: Path, told: asyncio.Future[str], lease_s: float) -> int:
    """Runs the attempt and writes its outcome; the process's exit code. `told` is resolved with why to end it early."""
    working = asyncio.create_task(_work(attempt), name="attempt")
    keeping = asyncio.create_task(_keep(queue, claim.job, lease_s), name="lease")
    try:
        pending: set[asyncio.Future[Any]] = {working, keeping, told}
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            write_outcome(folder, await working)
            return 0
        why = told.result() if told.done() else await keeping
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if why == LOST:
            # Another holder may have the job by now: not a word more from here.
            _log.error("the lease of training %s is lost", claim.training_id)
            return 4
        if not working.cancelled() and working.exception() is None and working.result().succeeded:
            write_outcome(folder, working.result())
        else:
            write_outcome(folder, await attempt.abandon(REASONS[why]))
        return 0
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _work(attempt: Attempt) -> Outcome:
    try:
        return await attempt.run()
    except (Invalid, Transient) as exc:
        return Outcome(succeeded=False, reason=str(exc), users_fault=isinstance(exc, Invalid))
    except Exception as exc:
        error = explain(exc)  # logs a bug with its stack
        return Outcome(succeeded=False, reason=str(error), users_fault=not isinstance(error, Transient))


async def _keep(queue: JobQueue, job: Job, lease_s: float) -> str:
    """Sends heartbeats; returns why the attempt must end: "cancelled" or LOST."""
    loop = asyncio.get_running_loop()
    renewed = loop.time()
    while True:
        await asyncio.sleep(lease_s / 6)
        asked = loop.time()
        try:
            async with asyncio.timeout(max(0.1, renewed + lease_s - asked)):
                if await queue.heartbeat(job, lease_s):
                    return "cancelled"
            renewed = asked
        except LeaseLost:
            return LOST
        except (Transient, TimeoutError) as exc:
            # Counted from before the question, so this clock runs out before the database's.
            if loop.time() - renewed >= lease_s:
                return LOST
            _log.warning("the lease was not renewed: %s", exc)
