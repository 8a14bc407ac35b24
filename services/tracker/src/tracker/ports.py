"""What the tracker's use cases need from outside: a unit of work on its store. The artifact store's port is `artifacts.ArtifactStore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from tracker.domain.artifact import Artifact, Dataset, Listed, Upload
from tracker.domain.conversion import Conversion
from tracker.domain.logged_model import LoggedModel, LoggedModelView, ModelSearch
from tracker.domain.model import BlobRef, DeliverableModel
from tracker.domain.record import DatasetInput, ModelMetric, ModelOutput, Record
from tracker.domain.run import DatasetRef, Event, Experiment, Facts, Metric, Run


@dataclass(frozen=True, slots=True)
class RequestKey:
    """What makes a repeated request known: who asked, and the id that they gave. Nobody else's request is ever answered by it."""

    caller: str
    request_id: str


class Experiments(Protocol):
    async def add(self, name: str, created_ms: int, request: RequestKey | None) -> Experiment | None:
        """Makes an experiment; None when the name or the request is known already."""
        ...

    async def get(self, experiment_id: int) -> Experiment | None: ...

    async def by_name(self, name: str) -> Experiment | None: ...

    async def by_request(self, request: RequestKey) -> Experiment | None: ...

    async def share(self, experiment_id: int) -> Experiment | None:
        """The experiment without its tags, held against its deletion but not against others that add runs to it."""
        ...

    async def lock(self, experiment_id: int) -> Experiment | None:
        """The experiment without its tags, held until the transaction ends."""
        ...

    async def page(self, after_id: int, limit: int) -> Sequence[Experiment]:
        """By id, those after `after_id`."""
        ...

    async def save(self, experiment: Experiment) -> bool:
        """Stores name, lifecycle stage and time of update of one that is held; False when another has the name."""
        ...

    async def set_tags(self, experiment_id: int, tags: Mapping[str, str]) -> None: ...

    async def delete_tag(self, experiment_id: int, key: str) -> bool:
        """Whether there was one."""
        ...

    async def in_training(self, experiment_id: int) -> bool:
        """Whether it has a run that a training started and that has not ended."""
        ...

    async def move_runs(self, experiment_id: int, lifecycle_stage: str, deleted_ms: int) -> None:
        """Gives all its runs a lifecycle stage and a time of deletion."""
        ...


class Runs(Protocol):
    async def add(self, run: Run, request: RequestKey | None) -> bool:
        """Stores a new run, its lease counted from the database's now; False when the request is known already."""
        ...

    async def get(self, run_id: str) -> Run | None: ...

    async def lock(self, run_id: str) -> Run | None:
        """The run, held until the transaction ends: nobody else changes it, logs to it or ends it."""
        ...

    async def share(self, run_id: str) -> Run | None:
        """The run, held against its end but not against others that log to it."""
        ...

    async def lock_by_request(self, request: RequestKey) -> Run | None: ...

    async def save(self, run: Run) -> None:
        """Stores what changes of a run that is held: name, parent, source, status, reason, end, deletion, lease, attempt and sequence."""
        ...

    async def renew_lease(self, run: Run) -> datetime:
        """Counts the run's lease from the database's now; returns when it ends."""
        ...

    async def lock_expired(self, limit: int) -> Sequence[tuple[Run, int]]:
        """Running runs whose lease is over by the database's clock, held, with that clock's milliseconds; passes over what others hold."""
        ...

    async def page(self, experiment_id: int, status: str, before: tuple[int, str] | None, limit: int) -> Sequence[Run]:
        """Newest first: those older than (started_ms, run_id) `before`."""
        ...

    async def facts(self, run_ids: Sequence[str]) -> Mapping[str, Facts]:
        """What each of the runs has logged."""
        ...

    async def log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None: ...

    async def log_params(self, run_id: str, params: Mapping[str, str]) -> Mapping[str, str]:
        """Stores those that are new; returns those that are there with another value, with that value."""
        ...

    async def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None: ...

    async def tag(self, run_id: str, key: str) -> str | None: ...

    async def delete_tag(self, run_id: str, key: str) -> bool:
        """Whether there was one."""
        ...

    async def history(self, run_id: str, key: str, after: Metric | None, limit: int) -> Sequence[Metric]:
        """Points of one metric by (step, timestamp, value)."""
        ...

    async def log_model(self, run_id: str, model: DeliverableModel) -> None:
        """Stores a model; one of the same name is replaced, and keeps its place."""
        ...

    async def log_inputs(self, run_id: str, inputs: Sequence[DatasetRef]) -> None: ...


class Records(Protocol):
    """What only MLflow's API keeps of runs, and runs as it shows them."""

    async def get(self, run_id: str) -> Record | None: ...

    async def log_datasets(self, run: Run, inputs: Sequence[DatasetInput]) -> None:
        """Repeatable: a data set that the run has is left as it is."""
        ...

    async def log_model_inputs(self, run_id: str, model_ids: Sequence[str]) -> None: ...

    async def log_model_outputs(self, run_id: str, outputs: Sequence[ModelOutput]) -> None: ...

    async def log_model_metrics(self, run_id: str, metrics: Sequence[ModelMetric]) -> None: ...


class Conversions(Protocol):
    """Models that wait until they are converted, and what became of those that do no more."""

    async def add(self, run_id: str, conversion: Conversion) -> bool:
        """Whether it is new: one that is there, settled or not, stays as it is."""
        ...

    async def waiting(self, run_id: str) -> Sequence[Conversion]: ...

    async def find(self, run_id: str, owner: str, folder: str) -> tuple[Conversion, bool] | None:
        """The conversion, and whether it is settled."""
        ...

    async def settle(self, run_id: str, owner: str, folder: str) -> None: ...


class Artifacts(Protocol):
    async def add_upload(self, upload: Upload) -> None: ...

    async def find_complete(self, owner: str, path: str, dataset: str, sha256: str) -> Upload | None:
        """The newest verified upload of this content to this place, if what it brought is still there."""
        ...

    async def get_upload(self, upload_id: str) -> Upload | None: ...

    async def complete_upload(self, upload: Upload) -> None:
        """Marks it as verified, with size and hash as given here, and makes it its owner's artifact at its path, if it has an owner."""
        ...

    async def drop_upload(self, upload_id: str) -> None: ...

    async def drop_uploads(self, keys: Sequence[str]) -> None:
        """Forgets the uploads to these keys."""
        ...

    async def get(self, owner: str, path: str) -> Artifact | None: ...

    async def below(self, owner: str, path: str) -> Sequence[Artifact]:
        """The artifact at `path` and all below it, by path; "" is the top."""
        ...

    async def folder(self, owner: str, path: str, after: str, limit: int) -> Sequence[Listed]:
        """What lies directly in a folder, by name: those named after `after`."""
        ...

    async def remove(self, owner: str, path: str) -> Sequence[str]:
        """Forgets the artifact at `path` and all below it; returns their keys."""
        ...

    async def find_blob(self, sha256: str) -> BlobRef | None:
        """A blob that has been verified."""
        ...

    async def add_blob(self, blob: BlobRef) -> None:
        """Remembers a verified blob. Repeatable."""
        ...


class LoggedModels(Protocol):
    async def add(self, model: LoggedModel) -> None: ...

    async def get(self, model_id: str) -> LoggedModel | None:
        """Deleted ones too."""
        ...

    async def lock(self, model_id: str) -> LoggedModel | None:
        """The model, held until the transaction ends."""
        ...

    async def save(self, model: LoggedModel) -> None:
        """Stores one that is held."""
        ...

    async def log_params(self, model_id: str, params: Mapping[str, str]) -> Mapping[str, str]:
        """Stores those that are new; returns those that are there with another value, with that value."""
        ...

    async def set_tags(self, model_id: str, tags: Mapping[str, str]) -> None: ...

    async def delete_tag(self, model_id: str, key: str) -> bool:
        """Whether there was one."""
        ...

    async def views(self, models: Sequence[LoggedModel]) -> Sequence[LoggedModelView]:
        """The models with what was logged of them."""
        ...

    async def search(self, search: ModelSearch) -> Sequence[LoggedModel]:
        """Those that are not deleted."""
        ...


class Datasets(Protocol):
    async def add(self, dataset: Dataset) -> Dataset:
        """Stores the next version of a data set (`version` is given here); with content that it has, answers that version."""
        ...

    async def get(self, name: str, version: int) -> Dataset | None:
        """Version 0 is the newest."""
        ...

    async def find(self, name: str, sha256: str) -> Dataset | None: ...

    async def holdout_of(self, sha256: str) -> Dataset | None:
        """A holdout that has this content, under whatever name."""
        ...

    async def all(self) -> Sequence[Dataset]:
        """Every version, by name, newest first."""
        ...


class UnitOfWork(Protocol):
    """One transaction: committed when its block ends well, undone when it raises."""

    @property
    def experiments(self) -> Experiments: ...

    @property
    def runs(self) -> Runs: ...

    @property
    def records(self) -> Records: ...

    @property
    def artifacts(self) -> Artifacts: ...

    @property
    def conversions(self) -> Conversions: ...

    @property
    def logged_models(self) -> LoggedModels: ...

    @property
    def datasets(self) -> Datasets: ...

    async def emit(self, event: Event) -> None:
        """Has the event published if and only if this transaction commits. Its run must be held or new."""
        ...


class Store(Protocol):
    """Where the tracker keeps what it knows."""

    def transaction(self) -> AbstractAsyncContextManager[UnitOfWork]: ...

    async def log_point(self, run_id: str, metric: Metric, fencing_token: int | None) -> bool:
        """Stores one point of a run that runs, for the attempt of a token or (None) for anybody, in one round trip.

        False when nothing was stored: then a transaction does it, or tells why it cannot be done. Repeatable.
        """
        ...
