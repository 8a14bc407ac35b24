"""What the trainer's use cases need from outside. The artifact store's port is `artifacts.ArtifactStore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from trainer.domain.conversion import Conversion
from trainer.domain.training import Event, Source, Training


@dataclass(frozen=True, slots=True)
class RequestKey:
    """What makes a repeated request known: who asked, and the id that they gave. Nobody else's request is ever answered by it."""

    caller: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Upload:
    """A packed source folder that somebody uploads, or has uploaded when it is `verified`."""

    upload_id: str
    uploaded_by: str
    key: str
    size_bytes: int
    sha256: str
    verified: bool


@dataclass(frozen=True, slots=True)
class AppliedDelivery:
    """What the trainer keeps of a delivery; the highest revision counts."""

    name: str
    revision: int
    deleted: bool
    experiment: str
    train_json: str
    applied_by: str


class Trainings(Protocol):
    async def add(self, training: Training, request: RequestKey | None) -> bool:
        """Stores a new training; False when the request is known already."""
        ...

    async def get(self, training_id: str) -> Training | None: ...

    async def lock(self, training_id: str) -> Training | None:
        """The training, held until the transaction ends."""
        ...

    async def by_request(self, request: RequestKey) -> Training | None: ...

    async def save(self, training: Training) -> None: ...

    async def last_upload(self, delivery: str) -> Source | None:
        """The newest uploaded source that was trained for a delivery."""
        ...

    async def page(self, delivery: str, before: str, limit: int) -> Sequence[Training]:
        """Newest first: those older than training `before` ("" for the newest); delivery "" is any."""
        ...


class Uploads(Protocol):
    async def add(self, upload: Upload) -> Upload:
        """Stores an upload; one by the same person with the same content is answered instead if there is one."""
        ...

    async def get(self, upload_id: str) -> Upload | None: ...

    async def verified(self, upload_id: str) -> None: ...


class Deliveries(Protocol):
    async def remember(self, delivery: AppliedDelivery) -> None:
        """Stores it unless a higher revision is known."""
        ...

    async def get(self, name: str) -> AppliedDelivery | None: ...

    async def claims(self, experiment: str) -> bool:
        """Whether a delivery that is not deleted takes its models from this experiment."""
        ...

    async def scheduled(self) -> Sequence[tuple[AppliedDelivery, datetime | None]]:
        """Deliveries that are not deleted and have a train section, each with the time until which its triggers have been looked at."""
        ...

    async def looked_at(self, name: str, until: datetime) -> None:
        """Notes until when the triggers of a delivery have been looked at."""
        ...


class Jobs(Protocol):
    """The queue of work, in the same transaction."""

    async def enqueue(self, training_id: str, max_attempts: int) -> str:
        """Queues the training's job and returns the job's id."""
        ...

    async def convert(self, conversion: Conversion) -> None:
        """Queues a conversion. Repeatable."""
        ...

    async def cancel(self, job_id: str) -> bool:
        """Cancels a job; True when it waited and is cancelled now, False when it runs (and will be stopped) or has ended."""
        ...


class UnitOfWork(Protocol):
    """One transaction: committed when its block ends well, undone when it raises."""

    @property
    def trainings(self) -> Trainings: ...

    @property
    def uploads(self) -> Uploads: ...

    @property
    def deliveries(self) -> Deliveries: ...

    @property
    def jobs(self) -> Jobs: ...

    async def emit(self, event: Event) -> None:
        """Has the event published if and only if this transaction commits. Its training must be held or new."""
        ...


class Store(Protocol):
    """Where the trainer keeps what it knows."""

    def transaction(self) -> AbstractAsyncContextManager[UnitOfWork]: ...


class Logs(Protocol):
    """The logs of trainings, growing while they run."""

    async def read(self, training_id: str, offset: int, limit: int) -> bytes:
        """What stands at and after `offset`, at most `limit` bytes; nothing when there is no more yet."""
        ...


@dataclass(frozen=True, slots=True)
class NewRun:
    """The run of one attempt, to be made at the tracker."""

    experiment: str
    name: str
    user: str
    request_id: str
    fencing_token: int
    lease_seconds: int
    commit: str
    dirty: bool
    diff_key: str
    command: str
    training_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StartedRun:
    run_id: str
    token: str


class Tracker(Protocol):
    """The tracker, as far as a training needs it. Raises the errors of servicekit.errors."""

    async def start_run(self, run: NewRun) -> StartedRun:
        """Makes the run, and its experiment if there is none; repeating it with the same request id answers the same run."""
        ...

    async def status(self, run_id: str) -> str:
        """RUNNING, FINISHED, FAILED or KILLED."""
        ...

    async def renew(self, run_id: str, fencing_token: int) -> None: ...

    async def finish(self, run_id: str, status: str, reason: str, fencing_token: int) -> None:
        """Ends a run. Repeatable."""
        ...

    async def store_file(self, run_id: str, path: str, file: Path) -> None:
        """Makes a file an artifact of the run. Repeatable."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a logged model: its path in the model's folder, and where it is stored."""

    path: str
    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """What a conversion made, stored under the key of its content."""

    sha256: str
    size_bytes: int
    key: str


class LoggedModels(Protocol):
    """The tracker, as far as a conversion needs it. Raises the errors of servicekit.errors."""

    async def files(self, conversion: Conversion) -> Sequence[StoredFile]: ...

    async def converted(self, conversion: Conversion, blob: StoredBlob, samples: StoredBlob) -> None:
        """Says what the conversion made. Repeatable."""
        ...

    async def refused(self, conversion: Conversion, reason: str) -> None:
        """Says why the model cannot be converted, for its author. Repeatable."""
        ...

    async def store_file(self, run_id: str, path: str, file: Path) -> None:
        """Makes a file an artifact of the run. Repeatable."""
        ...


class Sources(Protocol):
    """Fetches the code of a training."""

    async def fetch(self, source: Source, upload: Upload | None, folder: Path) -> str:
        """Puts the source into the empty folder and returns the commit it is ("" when not known).

        Raises Invalid when it cannot be had as it is, Transient when it may be had later.
        """
        ...
