"""One attempt of a training: source, run, environment, sandbox, log, end. Everything that it asks of other services is repeatable."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shlex
import signal
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from servicekit import trees
from servicekit.clock import Clock
from servicekit.errors import Conflict, Invalid, NotFound, Transient

from trainer.domain.training import Training
from trainer.handlers import Outcome, Trainer
from trainer.ports import NewRun, Sources, StartedRun, Tracker
from trainer.runner import provenance, sandbox
from trainer.runner.disk import FULL, of_disk
from trainer.runner.egress import Destination, Egress
from trainer.runner.log import Log
from trainer.runner.sandbox import Command, Ended, Limits
from trainer.runner.venv import LOCK, MAX_LOCK_BYTES, Venvs, check_lock

_log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 600.0
"""How long a server that is needed may be away before the attempt is given up, to be tried again later."""

RENEW_S = 5.0
"""Seconds between two renewals of the run's lease."""

SDK = "/headrace/sdk"
PACKAGES = "/headrace/packages"


@dataclass(frozen=True, slots=True)
class Options:
    """What is the same for all attempts. `url` is where the user's code finds Headrace, `sdk` the folder of the `headrace` package,
    `packages` what that imports, for code whose own environment has it not, `egress` all that it may reach."""

    url: str
    sdk: Path
    run_lease_s: int
    packages: Sequence[Path] = ()
    visible: Sequence[Path] = ()
    egress: frozenset[Destination] = frozenset()


class RunEnded(Exception):
    """The tracker has ended the run of an attempt that still goes on."""


class Attempt:
    """Runs once. `number` and `fencing_token` are those of the job's claim, `folder` an empty folder of its own."""

    def __init__(
        self,
        training_id: str,
        number: int,
        fencing_token: int,
        folder: Path,
        log: Log,
        *,
        trainer: Trainer,
        tracker: Tracker,
        sources: Sources,
        venvs: Venvs,
        objects: ArtifactStore,
        clock: Clock,
        options: Options,
    ) -> None:
        self._training_id = training_id
        self._number = number
        self._fencing_token = fencing_token
        self._folder = folder
        self._log = log
        self._trainer = trainer
        self._tracker = tracker
        self._sources = sources
        self._venvs = venvs
        self._objects = objects
        self._clock = clock
        self._options = options
        self._run: StartedRun | None = None

    async def run(self) -> Outcome:
        """Runs to the end and ends the run with it. When cancelled nothing of the user's code is left; then call `abandon`.

        Raises Invalid when it can never work, Transient when it may work later, also for the trouble of the trainer's own disk.
        """
        training = await self._persist(lambda: self._trainer.get(self._training_id))
        if await self._settle_previous(training.run_id):
            return Outcome(succeeded=True)
        try:
            self._log.note(f"attempt {self._number} of training {training.training_id}")
            outcome = await self._train(training)
        except RunEnded as exc:
            with contextlib.suppress(OSError):  # the run has ended, whether there is room to say so or not
                self._log.note(str(exc))
            return Outcome(succeeded=False, reason=str(exc))
        except Exception as exc:
            error = of_disk(exc)
            if error is not exc:
                # What is left of the attempt is told on the same disk.
                await asyncio.to_thread(trees.remove, self._folder / "source")
            if self._run is not None:
                await self._finish("FAILED", str(error) if isinstance(error, Invalid | Transient) else "an internal error of the trainer")
            if error is exc:
                raise
            raise error from exc
        if self._run is not None:
            await self._finish("FINISHED" if outcome.succeeded else "FAILED", outcome.reason)
        return outcome

    async def abandon(self, reason: str) -> Outcome:
        """Ends the run as KILLED after `run` was cancelled; succeeded when the run had finished before."""
        if self._run is not None:
            try:
                await self._finish("KILLED", reason)
            except Conflict:
                if await self._persist(lambda: self._tracker.status(self._run_id)) == "FINISHED":
                    return Outcome(succeeded=True)
        return Outcome(succeeded=False, reason=reason)

    @property
    def _run_id(self) -> str:
        return "" if self._run is None else self._run.run_id

    async def _settle_previous(self, previous: str) -> bool:
        """True when an earlier attempt has finished its run but died before it could say so: then the training is done. A run that
        an earlier attempt left running is ended."""
        if not previous:
            return False
        try:
            status = await self._persist(lambda: self._tracker.status(previous))
            if status == "RUNNING":
                reason = "its trainer died; the training is run again"
                await self._persist(lambda: self._tracker.finish(previous, "FAILED", reason, self._fencing_token))
        except (NotFound, Conflict) as exc:
            _log.warning("run %s of an earlier attempt: %s", previous, exc)
            return False
        return status == "FINISHED"

    async def _train(self, training: Training) -> Outcome:
        source = self._folder / "source"
        commit = await self._persist(lambda: self._fetch(training, source))
        lock = _read_lock(source)
        self._run = await self._persist(lambda: self._start_run(training, commit, lock))
        run = self._run
        self._log.note(f"run {run.run_id}")
        await self._persist(lambda: self._trainer.began(training.training_id, self._number, run.run_id))
        renewing = asyncio.create_task(self._renew(run), name="run lease")
        working = asyncio.create_task(self._work(training, run, source, lock), name="training")
        try:
            await asyncio.wait({renewing, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return await working
            await renewing
            raise RunEnded("the lease of the run could not be kept")
        finally:
            for task in (working, renewing):
                task.cancel()
            await asyncio.gather(working, renewing, return_exceptions=True)

    async def _work(self, training: Training, run: StartedRun, source: Path, lock: bytes) -> Outcome:
        diff = training.source.diff
        if diff:
            file = self._folder / "source.diff"
            await asyncio.to_thread(file.write_text, diff)
            await self._persist(lambda: self._tracker.store_file(run.run_id, "source.diff", file))
        pinned = self._folder / LOCK
        await asyncio.to_thread(pinned.write_bytes, lock)
        await self._persist(lambda: self._tracker.store_file(run.run_id, LOCK, pinned))
        scratch = self._folder / "venv"
        venv = await self._persist(lambda: self._venvs.ensure(lock, scratch, self._log.note, self._log.write))
        self._log.forget_tail()
        resources = training.resources
        limits = Limits(resources.memory_bytes, resources.disk_bytes, resources.timeout_seconds)
        self._log.note(f"running {shlex.join(training.command)}")
        ended = await sandbox.run(self._command(training, run, source, venv), limits, self._folder / "sandbox", self._log.write)
        outcome = judge(ended, limits, self._log.tail())
        self._log.note(outcome.reason.partition("\n")[0] or f"succeeded, peak memory {sandbox.human(ended.peak_memory_bytes)}")
        return outcome

    def _command(self, training: Training, run: StartedRun, source: Path, venv: Path) -> Command:
        words = list(training.command)
        if training.resources.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(training.resources.processes)]
            words = [words[0], *launcher, *words[1:]]
        environment = {
            **training.environment,
            "PATH": f"{venv / 'bin'}:{os.defpath}",
            "LANG": "C.UTF-8",
            "VIRTUAL_ENV": str(venv),
            "PYTHONPATH": SDK,
            "PYTHONUNBUFFERED": "1",
            "ORT_DISABLE_TELEMETRY": "1",  # else onnxruntime would try, and each training's log show that it was refused
            "PYTHONHASHSEED": str(training.seed),
            "HEADRACE_SEED": str(training.seed),
            "HEADRACE_PACKAGES": PACKAGES,
            "HEADRACE_URL": self._options.url,
            "HEADRACE_RUN_ID": run.run_id,
            "HEADRACE_TOKEN": run.token,
            # A script that logs with MLflow's client logs to the same run.
            "MLFLOW_TRACKING_URI": self._options.url,
            "MLFLOW_TRACKING_TOKEN": run.token,
            "MLFLOW_RUN_ID": run.run_id,
        }
        ours = [(self._options.sdk, f"{SDK}/headrace"), *((path, f"{PACKAGES}/{path.name}") for path in self._options.packages)]
        visible = [*sandbox.visible_python(venv), *ours, *self._options.visible]
        return Command(words, environment, source=source, visible=visible, egress=Egress(self._options.egress, self._log.note))

    async def _fetch(self, training: Training, folder: Path) -> str:
        await asyncio.to_thread(_empty, folder)  # a fetch that was cut off leaves a part
        upload = await self._trainer.upload_of(training.source)
        return await self._sources.fetch(training.source, upload, folder)

    async def _start_run(self, training: Training, commit: str, lock: bytes) -> StartedRun:
        diff = training.source.diff.encode()
        diff_key = ""
        if diff:
            diff_key = blob_key(hashlib.sha256(diff).hexdigest())
            await self._objects.put(diff_key, diff)
        return await self._tracker.start_run(
            NewRun(
                experiment=training.experiment,
                name=training.run_name,
                user=training.submitted_by,
                # The fencing token names the claim: an attempt that was handed back and taken again is another run.
                request_id=f"{training.training_id}:{self._number}:{self._fencing_token}",
                fencing_token=self._fencing_token,
                lease_seconds=self._options.run_lease_s,
                commit=commit,
                dirty=training.source.dirty,
                diff_key=diff_key,
                command=shlex.join(training.command)[:6_000],
                training_id=training.training_id,
                tags=await provenance.tags(training, self._number, lock),
            )
        )

    async def _renew(self, run: StartedRun) -> None:
        """Keeps the run alive; raises RunEnded when the tracker has ended it."""
        while True:
            await self._clock.sleep(min(RENEW_S, self._options.run_lease_s / 3))
            try:
                await self._tracker.renew(run.run_id, self._fencing_token)
            except Transient as exc:
                # Whether the lease holds is the tracker's to say, when it is back.
                _log.warning("the lease of run %s was not renewed: %s", run.run_id, exc)
            except Conflict as exc:
                raise RunEnded(f"the tracker has ended the run: {exc}") from exc

    async def _finish(self, status: str, reason: str) -> None:
        """Stores the log and ends the run. The log comes first: a finished run is complete."""
        file = self._folder / "log.txt"
        try:
            await asyncio.to_thread(self._log.copy, file)
        except OSError as exc:
            _log.warning("no room for a copy of the log of this attempt, that of all attempts is stored: %s", exc)
            file = self._log.file
        await self._persist(lambda: self._tracker.store_file(self._run_id, "log.txt", file))
        await self._persist(lambda: self._tracker.finish(self._run_id, status, reason, self._fencing_token))

    async def _persist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks again and again while a server is away; raises its Transient after PATIENCE_S."""
        until = self._clock.monotonic() + PATIENCE_S
        wait = 0.2
        while True:
            try:
                return await ask()
            except Transient as exc:
                if self._clock.monotonic() + wait > until:
                    raise
                _log.warning("%s; again in %.1f s", exc, wait)
            await self._clock.sleep(wait)
            wait = min(wait * 2, 5.0)


def judge(ended: Ended, limits: Limits, tail: str) -> Outcome:
    """What a command's end means, with the reason in words and the last lines that it printed."""
    last = f"\n{tail}" if tail else ""
    if ended.killed:
        return Outcome(succeeded=False, reason=f"{ended.killed}{last}", users_fault=True)
    if ended.error:
        reason = f"disk full: {sandbox.human(limits.disk_bytes)} are too few for the source" if ended.full else ended.error
        # What cannot start at all is the machine's fault, unless it is the source that does not fit.
        return Outcome(succeeded=False, reason=reason, users_fault=ended.full)
    if ended.code == 0:
        return Outcome(succeeded=True)
    if ended.full or any(sign in tail for sign in FULL):
        return Outcome(succeeded=False, reason=f"disk full: no space left of {sandbox.human(limits.disk_bytes)}{last}", users_fault=True)
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        hint = ", perhaps because the machine was out of memory" if name == "SIGKILL" else ""
        return Outcome(succeeded=False, reason=f"killed by {name}{hint}{last}", users_fault=True)
    return Outcome(succeeded=False, reason=f"exit code {ended.code}{last}", users_fault=True)


def _empty(folder: Path) -> None:
    trees.remove(folder)
    folder.mkdir(parents=True)


def _read_lock(source: Path) -> bytes:
    """The source's lock file. Never through a link: a repository may hold one that leads anywhere."""
    try:
        descriptor = os.open(source / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise Invalid(f"the source has no {LOCK}: its packages must be pinned with hashes (an empty file for none)") from None
    except OSError as exc:
        raise Invalid(f"{LOCK} of the source is not a plain file") from exc
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Invalid(f"{LOCK} of the source is not a plain file")
        lock = file.read(MAX_LOCK_BYTES + 1)
    check_lock(lock)
    return lock
