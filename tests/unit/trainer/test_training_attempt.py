"""One attempt against fakes of everything that it asks: servers that are away, runs that end without it, attempts that went before."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from artifacts.memory import MemoryStore
from jobs import LeaseLost
from servicekit.clock import SystemClock
from servicekit.errors import Conflict, Invalid, Unavailable
from trainer.domain.training import Resources, Source, Status, Training
from trainer.handlers import Outcome
from trainer.ports import NewRun, StartedRun
from trainer.runner.attempt import Attempt, Options
from trainer.runner.keeper import LOST, Claim, read_outcome, run_kept
from trainer.runner.log import Log
from trainer.runner.venv import Venvs


class QuickClock(SystemClock):
    """Waits a hundredth of what is asked."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 100)


@dataclass
class FakeTracker:
    """Remembers what it is told. `away` calls of each kind fail before one succeeds; `ended` makes it refuse renewals."""

    away: int = 0
    ended: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    new: list[NewRun] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    renewed: asyncio.Event = field(default_factory=asyncio.Event)
    _refused: dict[str, int] = field(default_factory=dict)

    def _maybe_away(self, what: str) -> None:
        self._refused[what] = self._refused.get(what, 0) + 1
        if self._refused[what] <= self.away:
            raise Unavailable(f"{what}: the tracker is away")
        self.told.append(what)

    async def start_run(self, run: NewRun) -> StartedRun:
        self._maybe_away("start_run")
        self.new.append(run)
        self.runs["r1"] = "RUNNING"
        return StartedRun("r1", "hrr_token")

    async def status(self, run_id: str) -> str:
        self._maybe_away("status")
        return self.runs[run_id]

    async def renew(self, run_id: str, fencing_token: int) -> None:
        self.renewed.set()
        if self.ended:
            raise Conflict(self.ended)

    async def finish(self, run_id: str, status: str, reason: str, fencing_token: int) -> None:
        self._maybe_away("finish")
        if self.runs[run_id] not in ("RUNNING", status):
            raise Conflict("the run has ended already")
        self.runs[run_id], self.reasons[run_id] = status, reason

    async def store_file(self, run_id: str, path: str, file: Path) -> None:
        self._maybe_away("store_file")
        self.files[path] = await asyncio.to_thread(file.read_bytes)


@dataclass
class FakeTrainer:
    training: Training
    began_with: list[tuple[int, str]] = field(default_factory=list)

    async def get(self, training_id: str) -> Training:
        return self.training

    async def began(self, training_id: str, attempt: int, run_id: str) -> Training:
        self.began_with.append((attempt, run_id))
        return self.training

    async def upload_of(self, source: Source) -> None:
        return None


@dataclass
class FakeSources:
    """Writes files; `away` times it fails after having written half of them."""

    files: Mapping[str, str]
    away: int = 0

    async def fetch(self, source: Source, upload: Any, folder: Path) -> str:
        assert os.listdir(folder) == []
        for name, content in self.files.items():
            (folder / name).write_text(content)
            if self.away:
                self.away -= 1
                raise Unavailable("the store is away")
        return "c0ffee"


def training(**changes: Any) -> Training:
    fields: dict[str, Any] = {
        "training_id": "t1",
        "status": Status.QUEUED,
        "delivery": "",
        "experiment": "Default",
        "source": Source(upload_id="u"),
        "command": ("sh", "train.sh"),
        "environment": {},
        "resources": Resources(1, 256 * 2**20, 60, 2**22),
        "seed": 7,
        "run_name": "",
        "submitted_by": "ada",
        "max_attempts": 1,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Training(**{**fields, **changes})


@dataclass
class Scene:
    attempt: Attempt
    tracker: FakeTracker
    trainer: FakeTrainer
    sources: FakeSources
    store: MemoryStore


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    log = Log(tmp_path / "log.txt", 10_000)
    venvs = Venvs(tmp_path / "venvs", 2**40)

    def make(script: str = "exit 0", *, files: Mapping[str, str] | None = None, **changes: Any) -> Scene:
        tracker, trainer, store = FakeTracker(), FakeTrainer(training(**changes)), MemoryStore()
        sources = FakeSources({"train.sh": script, "requirements.lock": ""} if files is None else files)
        sdk = tmp_path / "sdk"
        sdk.mkdir()
        attempt = Attempt(
            "t1",
            2,
            9,
            tmp_path / "attempt",
            log,
            trainer=trainer,  # type: ignore[arg-type]  # as much of it as an attempt uses
            tracker=tracker,
            sources=sources,
            venvs=venvs,
            objects=store,
            clock=QuickClock(),
            options=Options(url="http://gateway", sdk=sdk, run_lease_s=60),
        )
        (tmp_path / "attempt").mkdir()
        return Scene(attempt, tracker, trainer, sources, store)

    yield make
    venvs.close()
    log.close()


async def test_servers_that_come_back_do_not_cost_the_training(scene: Callable[..., Scene]) -> None:
    one = scene("echo trained; exit 0", source=Source(upload_id="u", commit="x", dirty=True, diff="the diff"))
    one.tracker.away = 3
    one.sources.away = 2
    assert await one.attempt.run() == Outcome(succeeded=True)
    assert one.tracker.runs == {"r1": "FINISHED"}
    assert one.trainer.began_with == [(2, "r1")]
    run = one.tracker.new[0]
    assert (run.request_id, run.fencing_token, run.commit, run.dirty, run.user) == ("t1:2:9", 9, "c0ffee", True, "ada")
    digest = hashlib.sha256(b"the diff").hexdigest()
    assert await one.store.read(run.diff_key, sha256=digest, max_bytes=100) == b"the diff"
    assert one.tracker.files["source.diff"] == b"the diff"
    assert b"\ntrained\n" in one.tracker.files["log.txt"]
    # A finished run is complete: nothing is stored after its end.
    assert one.tracker.told[-2:] == ["store_file", "finish"]


async def test_a_run_that_an_earlier_attempt_finished_is_the_trainings_run(scene: Callable[..., Scene]) -> None:
    one = scene("echo never", run_id="r0", attempt=1)
    one.tracker.runs["r0"] = "FINISHED"
    assert await one.attempt.run() == Outcome(succeeded=True)
    assert one.tracker.new == []


async def test_a_run_that_an_earlier_attempt_left_is_ended_first(scene: Callable[..., Scene]) -> None:
    one = scene(run_id="r0", attempt=1)
    one.tracker.runs["r0"] = "RUNNING"
    assert (await one.attempt.run()).succeeded
    assert one.tracker.runs == {"r0": "FAILED", "r1": "FINISHED"}
    assert "died" in one.tracker.reasons["r0"]


async def test_a_run_that_the_tracker_has_ended_ends_the_attempt(scene: Callable[..., Scene], tmp_path: Path) -> None:
    one = scene("sleep 600")
    one.tracker.ended = "lease expired"
    outcome = await one.attempt.run()
    assert (outcome.succeeded, outcome.users_fault) == (False, False)
    assert "lease expired" in outcome.reason
    assert "finish" not in one.tracker.told


@pytest.mark.parametrize(
    ("files", "complaint"),
    [({"train.sh": ""}, "has no requirements.lock"), ({"requirements.lock": "-e ."}, "a pinned package is needed")],
)
async def test_a_source_that_cannot_work_is_refused_before_there_is_a_run(
    scene: Callable[..., Scene], files: Mapping[str, str], complaint: str
) -> None:
    one = scene(files=files)
    with pytest.raises(Invalid, match=complaint):
        await one.attempt.run()
    assert one.tracker.new == []
    assert one.trainer.began_with == []


async def test_a_lock_that_is_a_link_is_not_followed(scene: Callable[..., Scene], tmp_path: Path) -> None:
    one = scene(files={})
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t==1")

    async def fetch(source: Source, upload: Any, folder: Path) -> str:
        (folder / "requirements.lock").symlink_to(secret)
        return ""

    one.sources.fetch = fetch  # type: ignore[method-assign]
    with pytest.raises(Invalid, match="not a plain file"):
        await one.attempt.run()


async def test_a_full_disk_of_the_trainer_is_nobodys_fault(
    scene: Callable[..., Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the training's first word on: neither its log nor a copy of it can be written any more."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def first(log: Log, data: bytes) -> None:
        monkeypatch.setattr(Log, "copy", full)
        monkeypatch.setattr(Log, "note", full)
        full()

    monkeypatch.setattr(Log, "write", first)
    one = scene("echo up; sleep 600")
    assert await kept(one, tmp_path, FakeQueue(False)) == 0
    reason = "the trainer's disk: No space left on device"
    assert read_outcome(tmp_path) == Outcome(succeeded=False, reason=reason, users_fault=False)
    assert (one.tracker.runs, one.tracker.reasons) == ({"r1": "FAILED"}, {"r1": reason})
    assert b"running sh train.sh" in one.tracker.files["log.txt"]


async def test_a_bug_of_the_trainer_ends_the_run(scene: Callable[..., Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(log: Log, data: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Log, "write", wrong)
    one = scene("echo up; sleep 600")
    with pytest.raises(ZeroDivisionError):
        await one.attempt.run()
    assert (one.tracker.runs, one.tracker.reasons) == ({"r1": "FAILED"}, {"r1": "an internal error of the trainer"})


async def test_a_cancelled_attempt_ends_its_run_as_killed(scene: Callable[..., Scene]) -> None:
    one = scene("echo up; sleep 600")
    running = asyncio.create_task(one.attempt.run())
    async with asyncio.timeout(60):
        await one.tracker.renewed.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await one.attempt.abandon("cancelled") == Outcome(succeeded=False, reason="cancelled")
    assert (one.tracker.runs, one.tracker.reasons) == ({"r1": "KILLED"}, {"r1": "cancelled"})


async def test_a_cancellation_that_comes_too_late_changes_nothing(scene: Callable[..., Scene]) -> None:
    one = scene()
    assert (await one.attempt.run()).succeeded
    assert await one.attempt.abandon("cancelled") == Outcome(succeeded=True)
    assert one.tracker.runs == {"r1": "FINISHED"}


class FakeQueue:
    """A queue whose heartbeats answer what the test says."""

    def __init__(self, answer: bool | BaseException) -> None:
        self._answer = answer

    async def heartbeat(self, job: Any, lease_s: float) -> bool:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


CLAIM = Claim("t1", "01890000-0000-7000-8000-000000000001", "training", 2, 9, 5, 1, "")


async def kept(one: Scene, folder: Path, queue: FakeQueue, told: str = "") -> int:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    if told:
        future.set_result(told)
    async with asyncio.timeout(60):
        return await run_kept(one.attempt, queue, CLAIM, folder, future, 0.6)  # type: ignore[arg-type]  # as much of it as is used


async def test_the_outcome_is_written_down(scene: Callable[..., Scene], tmp_path: Path) -> None:
    assert await kept(scene("exit 3"), tmp_path, FakeQueue(False)) == 0
    assert read_outcome(tmp_path) == Outcome(succeeded=False, reason="exit code 3", users_fault=True)


@pytest.mark.parametrize(
    ("queue", "told", "reason"),
    [(FakeQueue(True), "", "cancelled"), (FakeQueue(False), "cancelled", "cancelled"), (FakeQueue(False), "stopped", "the trainer stops")],
)
async def test_an_attempt_is_ended_early(scene: Callable[..., Scene], tmp_path: Path, queue: FakeQueue, told: str, reason: str) -> None:
    assert await kept(scene("sleep 600"), tmp_path, queue, told) == 0
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize("answer", [Unavailable("the database is away"), "lost"])
async def test_whoever_loses_the_job_says_nothing_more(scene: Callable[..., Scene], tmp_path: Path, answer: Any) -> None:
    one = scene("sleep 600")
    assert await kept(one, tmp_path, FakeQueue(LeaseLost(LOST) if answer == "lost" else answer)) == 4
    assert read_outcome(tmp_path) is None
    assert "finish" not in one.tracker.told


def test_a_claim_survives_being_written_down(tmp_path: Path) -> None:
    CLAIM.write(tmp_path)
    assert Claim.read(tmp_path) == CLAIM
    assert (CLAIM.job.key, CLAIM.job.fencing_token, CLAIM.job.attempt) == ("t1", 9, 2)
