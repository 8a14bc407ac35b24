"""Runs the jobs of trainings, each attempt in a process of its own, and draws the consequences when one ends.

A process that outlived its trainer is killed before its job can be taken again: it dies with its trainer (PR_SET_PDEATHSIG), its pid and
start time are on file for the next trainer to make sure, and it ends itself when it loses the job's lease. None is ever adopted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import IO

import psutil
from eventing.background import Background, Backoff
from jobs import Ended, Job, JobContext, JobQueue, LeaseLost, State
from servicekit import telemetry, trees
from servicekit.db import is_transient
from servicekit.errors import Conflict, Invalid, Transient
from sqlalchemy.ext.asyncio import AsyncConnection

from trainer.adapters.logs import job_dir
from trainer.adapters.store import KIND, SqlStore
from trainer.handlers import Outcome, Trainer
from trainer.runner import sandbox
from trainer.runner.child import Child
from trainer.runner.disk import of_disk
from trainer.runner.keeper import Claim, read_outcome

_PROCESS = "process.json"
_STOP_S = 20.0
_KEPT = ("attempt.json", "outcome.json")
_log = logging.getLogger(__name__)


class UsersFault(Transient):
    """The user's code failed, and may be run again."""


class Attempts:
    """Starts and stops the processes of attempts: the handler of the trainer's jobs."""

    def __init__(self, trainer: Trainer, store: SqlStore, state_dir: Path) -> None:
        self._trainer = trainer
        self._store = store
        self._state_dir = state_dir

    async def handle(self, job: Job, context: JobContext) -> None:
        """Runs one attempt to its end. Raises Invalid when it failed for good, Transient when it shall be tried again."""
        folder = job_dir(self._state_dir, job.key) / f"attempt-{job.fencing_token}"
        try:
            outcome = await self._run(job, context, folder)
        except OSError as exc:
            raise of_disk(exc) from exc
        if outcome.succeeded:
            return
        if not outcome.users_fault:
            raise Transient(outcome.reason)
        try:
            may_retry = (await self._trainer.get(job.key)).may_retry()
        except Exception as exc:
            if not isinstance(exc, Transient) and not is_transient(exc):
                raise
            raise UsersFault(outcome.reason) from exc  # it counts; whether it was the last is for the next attempt to ask
        raise UsersFault(outcome.reason) if may_retry else Invalid(outcome.reason)

    async def on_end(self, conn: AsyncConnection, job: Job, ended: Ended) -> None:
        """Draws the consequences of an attempt's end in the transaction that ends its job."""
        reason = ended.cause if ended.error is None else str(ended.error)
        outcome = Outcome(ended.state is State.SUCCEEDED, reason, users_fault=isinstance(ended.error, UsersFault | Invalid))
        await self._trainer.ended(self._store.on(conn), job.key, job.attempt, ended.state.value, outcome)

    def committed(self) -> None:
        """After a transaction of `on_end`."""
        self._store.committed()

    async def _run(self, job: Job, context: JobContext, folder: Path) -> Outcome:
        await asyncio.to_thread(trees.remove, folder)
        await asyncio.to_thread(folder.mkdir, parents=True)
        trace = telemetry.current_traceparent()
        claim = Claim(job.key, str(job.id), job.kind, job.attempt, job.fencing_token, job.max_attempts, os.getpid(), trace)
        claim.write(folder)
        child = Child([sys.executable, "-m", "trainer.runner", str(folder)], captured=False)
        try:
            _note_process(folder, child.pid)
            await child.wait()
        except asyncio.CancelledError:
            outcome = await self._end_early(child, context, folder)
            if not outcome.succeeded:
                raise
            # It had finished before it could be told: what is done is done.
            return outcome
        finally:
            await child.end()
            await asyncio.to_thread(_clean, folder)
        died = Outcome(succeeded=False, reason=f"the process of the attempt died ({_code(child.returncode)})")
        return read_outcome(folder) or died

    async def _end_early(self, child: Child, context: JobContext, folder: Path) -> Outcome:
        """Tells the process why it must end, and waits until it has; kills it at once when the job is somebody else's."""
        try:
            context.check()
        except LeaseLost as exc:
            return Outcome(succeeded=False, reason=str(exc))
        child.send_signal(signal.SIGUSR1 if context.cancel_requested else signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await child.wait()
        return read_outcome(folder) or Outcome(succeeded=False, reason="stopped")


class StateFolder:
    """Holds the state folder for this trainer alone, and clears away what a trainer that died has left there. A component."""

    name = "state folder"

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._held: IO[str] | None = None
        self.left: list[Claim] = []
        """Claims of attempts that a dead trainer had begun."""

    async def start(self) -> None:
        """Raises Conflict when another trainer holds the folder. No process of an earlier trainer is alive afterwards."""
        await asyncio.to_thread(self._take)

    async def stop(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _take(self) -> None:
        self._state_dir.mkdir(parents=True, exist_ok=True)
        held = (self._state_dir / "trainer.lock").open("w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise Conflict(f"another trainer uses {self._state_dir}") from None
        self._held = held
        for note in sorted(self._state_dir.glob(f"jobs/*/attempt-*/{_PROCESS}")):
            _kill_noted(note)
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # it died while it began: its lease will tell
                self.left.append(Claim.read(note.parent))
            _clean(note.parent)


class SandboxCheck:
    """Makes one sandbox at the start: a machine that cannot is told by `/readyz`, not by the first training that fails. A component."""

    name = "sandbox"

    def __init__(self) -> None:
        self._trouble: str | None = "not tried yet"

    async def start(self) -> None:
        try:
            await sandbox.check()
            self._trouble = None
        except Invalid as exc:
            self._trouble = str(exc)
            _log.error("%s", exc)

    async def stop(self) -> None:
        """Nothing is held."""

    def ready(self) -> str | None:
        """None when this machine can make sandboxes, else why not."""
        return self._trouble


class Recovery(Background):
    """Gives back the jobs that a dead trainer on this machine held, so that nobody has to wait for their leases. A component."""

    def __init__(self, folder: StateFolder, queue: JobQueue, attempts: Attempts) -> None:
        super().__init__("recovery")
        self._folder = folder
        self._queue = queue
        self._attempts = attempts

    async def _run(self) -> None:
        backoff = Backoff(most_s=5.0)
        for claim in self._folder.left:
            while not self._stopping.is_set():
                try:
                    await self._give_back(claim.job)
                    break
                except Exception as exc:
                    if not isinstance(exc, Transient) and not is_transient(exc):
                        raise
                    _log.warning("training %s cannot be given back: %r", claim.training_id, exc)
                    await self._pause(backoff.next())

    async def _give_back(self, job: Job) -> None:
        cause = "its trainer died"
        try:
            async with self._queue.engine.begin() as conn:
                state = await self._queue.fail(conn, job, cause, retry=True)
                await self._attempts.on_end(conn, job, Ended(state, cause))
        except LeaseLost:
            return  # it had ended, or somebody else has it
        self._attempts.committed()
        self._queue.notify()
        _log.warning("training %s was left by a trainer that died: %s", job.key, state)


def _note_process(folder: Path, pid: int) -> None:
    """Writes down the process, so that whoever comes after can tell it from another that got its pid."""
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return
    (folder / _PROCESS).write_text(json.dumps({"pid": pid, "started": started}))


def _kill_noted(note: Path) -> None:
    """Kills a noted process and everything below it, and waits until they are gone."""
    try:
        told = json.loads(note.read_text())
        process = psutil.Process(told["pid"])
        if abs(process.create_time() - told["started"]) > 1:
            return
        family = [process, *process.children(recursive=True)]
    except (ValueError, KeyError, psutil.NoSuchProcess):
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)
    _log.warning("killed process %s, which a trainer that died had left", told["pid"])


def _clean(folder: Path) -> None:
    """Removes what an attempt needed while it ran; what it said stays, and what cannot be removed. The note of its process goes first:
    nothing that the attempt left can make the next trainers do all this again."""
    try:
        (folder / _PROCESS).unlink(missing_ok=True)
        trees.remove(*(entry for entry in folder.iterdir() if entry.name not in _KEPT))
    except OSError as exc:
        _log.warning("the folder of an attempt stays as it is: %s", exc)


def _code(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


__all__ = ["KIND", "Attempts", "Recovery", "StateFolder"]
