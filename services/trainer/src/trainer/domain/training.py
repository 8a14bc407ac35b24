"""A training from its submission to its end, and the events that tell of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from urllib.parse import urlsplit

from trainer.domain.errors import Problem, Refused, Rejected

MAX_WORDS, MAX_WORD = 1_000, 32_768
"""Words of a command, and characters in each."""

MAX_VARIABLES = 200
MAX_DIFF = 1_000_000
MAX_PROCESSES = 64
MAX_ATTEMPTS = 20
MAX_TIMEOUT_S = 30 * 86_400
MIN_MEMORY, MIN_DISK = 16 * 1024**2, 1024**2
MAX_REASON = 4_000
MAX_SEED = 2**32 - 1
"""The largest that both numpy's and Python's own seeds take."""

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
RESERVED = frozenset(
    {"PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"}
    | {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_RUN_ID"}
    | {spelled for name in _PROXIES for spelled in (name, name.upper())}
)
"""Variables that the trainer sets, beside all that begin with HEADRACE_."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})


@dataclass(frozen=True, slots=True)
class Source:
    """Where the code comes from: an uploaded folder, or a git repository. `commit`, `dirty` and `diff` are what git said of a folder."""

    upload_id: str = ""
    git_url: str = ""
    git_ref: str = ""
    commit: str = ""
    dirty: bool = False
    diff: str = ""

    def __bool__(self) -> bool:
        return bool(self.upload_id or self.git_url)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a training may use; 0 is the trainer's default. `memory_bytes` is resident memory of all its processes together."""

    processes: int = 0
    memory_bytes: int = 0
    timeout_seconds: int = 0
    disk_bytes: int = 0

    def over(self, defaults: Resources) -> Resources:
        """These, and what they leave out from `defaults`."""
        return Resources(
            self.processes or defaults.processes,
            self.memory_bytes or defaults.memory_bytes,
            self.timeout_seconds or defaults.timeout_seconds,
            self.disk_bytes or defaults.disk_bytes,
        )


@dataclass(frozen=True, slots=True)
class Training:
    """One training. `attempt` and `run_id` are those of the newest attempt; `failures` counts attempts that the user's code failed.

    `submitted_by` is its author; `started_by` is `schedule` when a cron trigger started it for them, else empty.
    """

    training_id: str
    status: Status
    delivery: str
    experiment: str
    source: Source
    command: Sequence[str]
    environment: Mapping[str, str]
    resources: Resources
    seed: int
    run_name: str
    submitted_by: str
    max_attempts: int
    created_at: datetime
    job_id: str = ""
    run_id: str = ""
    attempt: int = 0
    failures: int = 0
    reason: str = ""
    cancelled_by: str = ""
    finished_at: datetime | None = None
    event_sequence: int = 0
    started_by: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def _told(self, **changes: object) -> Training:
        return dataclasses.replace(self, event_sequence=self.event_sequence + 1, **changes)  # type: ignore[arg-type]  # fields by name

    def submitted(self) -> tuple[Training, JobSubmitted]:
        made = self._told(status=Status.QUEUED)
        return made, JobSubmitted(made)

    def started(self, attempt: int, run_id: str) -> tuple[Training, JobStarted]:
        """One attempt began. Raises Refused when the training has ended or a newer attempt has begun."""
        self._check_open()
        if attempt < self.attempt:
            raise Refused(f"attempt {self.attempt} of training {self.training_id} has begun, this is {attempt}")
        made = self._told(status=Status.RUNNING, attempt=attempt, run_id=run_id, reason="")
        return made, JobStarted(made)

    def succeeded(self, at: datetime) -> tuple[Training, JobSucceeded]:
        self._check_open()
        made = self._told(status=Status.SUCCEEDED, finished_at=at, reason="")
        return made, JobSucceeded(made)

    def failed(self, at: datetime, reason: str) -> tuple[Training, JobFailed]:
        """No attempt is left."""
        self._check_open()
        made = self._told(status=Status.FAILED, finished_at=at, reason=reason[:MAX_REASON])
        return made, JobFailed(made)

    def cancelled(self, at: datetime, by: str) -> tuple[Training, JobCancelled]:
        self._check_open()
        made = self._told(status=Status.CANCELLED, finished_at=at, cancelled_by=by, reason=f"cancelled by {by}")
        return made, JobCancelled(made)

    def waiting(self, reason: str, *, users_fault: bool) -> Training:
        """An attempt ended badly and another will follow. No event tells of it."""
        self._check_open()
        return dataclasses.replace(self, status=Status.QUEUED, reason=reason[:MAX_REASON], failures=self.failures + users_fault)

    def may_retry(self) -> bool:
        """Whether the user's code may fail this time and be run again: only as often as was asked for."""
        return self.failures + 1 < self.max_attempts

    def _check_open(self) -> None:
        if self.ended:
            raise Refused(f"training {self.training_id} has ended: {self.status}")


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    training: Training


@dataclass(frozen=True, slots=True)
class JobStarted:
    training: Training


@dataclass(frozen=True, slots=True)
class JobSucceeded:
    training: Training


@dataclass(frozen=True, slots=True)
class JobFailed:
    training: Training


@dataclass(frozen=True, slots=True)
class JobCancelled:
    training: Training


Event = JobSubmitted | JobStarted | JobSucceeded | JobFailed | JobCancelled


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, when all is put together: by the caller and, where the caller said nothing, by the delivery."""

    delivery: str = ""
    experiment: str = ""
    source: Source = field(default_factory=Source)
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    seed: int = 0
    run_name: str = ""
    max_attempts: int = 0


def check_request(request: Request, prefix: str = "") -> None:
    """Raises Rejected with everything that is wrong with a request; fields get `prefix` before their names."""
    problems = [
        *check_source(f"{prefix}source", request.source),
        *check_command(f"{prefix}command", request.command, request.resources.processes),
        *check_environment(f"{prefix}environment", request.environment),
        *check_resources(f"{prefix}resources", request.resources),
        *check_seed(f"{prefix}seed", request.seed),
    ]
    if not 0 <= request.max_attempts <= MAX_ATTEMPTS:
        problems.append(Problem(f"{prefix}max_attempts", f"0 (the default) to {MAX_ATTEMPTS}"))
    for name, text in (("experiment", request.experiment), ("run_name", request.run_name)):
        if len(text) > 500 or "\x00" in text:
            problems.append(Problem(f"{prefix}{name}", "at most 500 characters, none of them the character 0"))
    if problems:
        raise Rejected(problems[:20])


def check_source(field: str, source: Source) -> list[Problem]:
    if bool(source.upload_id) == bool(source.git_url):
        return [Problem(field, "either an uploaded folder or a git repository")]
    problems = []
    if source.git_url:
        problems += check_git(f"{field}.git", source.git_url, source.git_ref)
        if source.commit or source.diff or source.dirty:
            problems.append(Problem(field, "commit, dirty and diff tell of an uploaded folder only"))
    if len(source.commit) > 64 or (not source.commit.isalnum() and source.commit):
        problems.append(Problem(f"{field}.commit", "not a commit id"))
    if len(source.diff) > MAX_DIFF or "\x00" in source.diff:
        problems.append(Problem(f"{field}.diff", f"at most {MAX_DIFF} characters, none of them the character 0"))
    return problems


def check_git(field: str, url: str, ref: str) -> list[Problem]:
    """What is wrong with a git source. https only: git's other transports read local files, run commands, or show the trainer's keys."""
    problems = []
    if not _git_url_is_plain(url):
        problems.append(Problem(f"{field}.url", "https://host/path, without a user or a password"))
    if not _REF.fullmatch(ref) or ".." in ref or ref.endswith(".lock"):
        problems.append(Problem(f"{field}.ref", "a branch, tag or commit is needed"))
    return problems


def _git_url_is_plain(url: str) -> bool:
    if len(url) > 2_000 or not url.isprintable() or any(c.isspace() for c in url):
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain_host = "@" not in parts.netloc and bool(_HOST.fullmatch(parts.hostname or ""))
    return parts.scheme == "https" and plain_host and len(parts.path) > 1 and port != 0


def check_command(field: str, command: Sequence[str], processes: int) -> list[Problem]:
    if not command:
        return [Problem(field, "at least one word is needed")]
    if len(command) > MAX_WORDS:
        return [Problem(field, f"at most {MAX_WORDS} words")]
    problems = [
        Problem(f"{field}[{index}]", f"at most {MAX_WORD} characters, none of them the character 0")
        for index, word in enumerate(command)
        if len(word) > MAX_WORD or "\x00" in word
    ]
    if not command[0]:
        problems.append(Problem(f"{field}[0]", "the name of a program is needed"))
    starts_python = command[0] in ("python", "python3") and len(command) > 1 and (command[1] == "-m" or not command[1].startswith("-"))
    if processes > 1 and not starts_python:
        problems.append(Problem(field, "several processes are started by torchrun: [python, script.py, ...] or [python, -m, module, ...]"))
    return problems


def check_environment(field: str, environment: Mapping[str, str]) -> list[Problem]:
    problems = []
    if len(environment) > MAX_VARIABLES:
        problems.append(Problem(field, f"at most {MAX_VARIABLES} variables"))
    for name, value in environment.items():
        where = f"{field}.{name[:50]}"
        if not _VARIABLE.fullmatch(name) or len(name) > 200:
            problems.append(Problem(where, "letters, digits and _, not beginning with a digit"))
        elif name in RESERVED or name.startswith("HEADRACE_"):
            problems.append(Problem(where, "is set by the trainer"))
        if len(value) > MAX_WORD or "\x00" in value:
            problems.append(Problem(where, f"at most {MAX_WORD} characters, none of them the character 0"))
    return problems


def check_resources(field: str, resources: Resources) -> list[Problem]:
    """0 is the default and always right."""
    problems = []
    if not 0 <= resources.processes <= MAX_PROCESSES:
        problems.append(Problem(f"{field}.processes", f"1 to {MAX_PROCESSES}"))
    if resources.memory_bytes != 0 and resources.memory_bytes < MIN_MEMORY:
        problems.append(Problem(f"{field}.memory", "at least 16MiB"))
    if not 0 <= resources.timeout_seconds <= MAX_TIMEOUT_S:
        problems.append(Problem(f"{field}.timeout", "1s to 30d"))
    if resources.disk_bytes != 0 and resources.disk_bytes < MIN_DISK:
        problems.append(Problem(f"{field}.disk", "at least 1MiB"))
    return problems


def check_seed(field: str, seed: int) -> list[Problem]:
    return [] if 0 <= seed <= MAX_SEED else [Problem(field, f"0 to {MAX_SEED}")]
