"""What the registry's use cases need of the outside, as Protocols: a store with transactions, and the services that validate sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol
from uuid import UUID

from registry.domain.access import ApiKey
from registry.domain.approvals import Approval
from registry.domain.audit import Audit
from registry.domain.deliveries import Claim, Revision
from registry.domain.events import DomainEvent
from registry.domain.filters import Condition, Ordering
from registry.domain.models import Model
from registry.domain.versions import Journey, Stage, Version

Lock = Literal["", "share", "update"]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in a list."""

    model_id: UUID
    name: str
    latest: int
    champion: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class VersionView:
    """A version with what is said of it elsewhere."""

    model_id: UUID
    model: str
    version: Version
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CataloguedVersion:
    """A version as clients list it. `user` registered it, or trained it when nobody did; `storage` is what to download."""

    model: str
    number: int
    stage: Stage
    reason: str
    run_id: str
    source: str
    path: str
    storage: str
    logged_model: str
    run_link: str
    description: str
    tags: Mapping[str, str]
    user: str
    created_at: datetime
    updated_at: datetime
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model as clients list it; `latest` is the newest version of each stage in which one stands."""

    model_id: UUID
    name: str
    description: str
    tags: Mapping[str, str]
    created_at: datetime
    updated_at: datetime
    aliases: Mapping[str, int]
    latest: tuple[CataloguedVersion, ...]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A stored row of the audit log."""

    id: int
    entry: Audit


class DeliveryRepository(Protocol):
    """Deliveries and their revisions."""

    async def exclusively(self) -> None:
        """Keeps every other change of deliveries waiting until this transaction ends."""
        ...

    async def current(self, name: str, lock: Lock = "") -> Revision | None:
        """The newest revision, also when it is a deletion; None when the name was never used."""
        ...

    async def revision(self, name: str, number: int) -> Revision | None: ...

    async def standing(self) -> Sequence[Revision]:
        """The newest revision of every delivery that is not deleted, by name."""
        ...

    async def predecessors(self, name: str, claims: Sequence[Claim]) -> tuple[Revision, ...]:
        """What a new revision comes after: the newest revision of the delivery itself and the newest, by whatever delivery and deleted or
        not, that names each claim; where that one serves nothing, also the newest that did. Each once."""
        ...

    async def holders(self, claims: Sequence[Claim], other_than: str) -> Mapping[Claim, str]:
        """Which of the claims another delivery holds, and its name."""
        ...

    async def store(self, revision: Revision) -> None:
        """Stores a new newest revision with its claims, and tells it to the other services."""
        ...

    async def publish_again(self, most: int) -> int:
        """Tells the newest snapshots whose turn it is once more, this many at most, under the locks of their rows; how many."""
        ...


class ModelRepository(Protocol):
    """Models with their versions, aliases and requests for approval."""

    async def lock(
        self, model: str | UUID, versions: Sequence[int] = (), run_id: str = "", logged_model: str = "", stage: str = ""
    ) -> Model | None:
        """The model by name or id, its row locked, with these versions: numbered so, of the run, of the logged model, in the stage,
        champion, rolling out, with a pending request. Deleted versions are among them; a deleted model is found by its id only."""
        ...

    async def create(self, model_id: UUID, name: str, at: datetime) -> bool:
        """Makes the model unless there is one of this name; whether it did. Waits for one who is making it now."""
        ...

    async def save(self, model: Model) -> None:
        """Stores what has changed, its events and its rows of the audit log. Raises errors.Taken when another model has its new name."""
        ...

    async def awaiting(self, delivery: str) -> Sequence[UUID]:
        """Ids of the models with a pending request for approval under this delivery."""
        ...

    async def journey(self, model: str, number: int) -> Journey | None:
        """The journey of a version, without locking anything."""
        ...

    async def approval(self, approval_id: UUID) -> Approval | None: ...

    async def approvals(self, status: str, model: str) -> Sequence[Approval]:
        """Newest first; empty arguments do not restrict."""
        ...

    async def summaries(self) -> Sequence[ModelSummary]: ...

    async def view(self, model: str, number: int, alias: str) -> VersionView | None:
        """A version by number, or by alias when the number is 0."""
        ...

    async def views(self, model: str, below: int, limit: int) -> Sequence[VersionView] | None:
        """Newest first, those numbered below `below` (0: all); None when there is no such model."""
        ...


class CatalogueReader(Protocol):
    """Models and versions as clients list and search them. What was deleted is not there."""

    async def model(self, name: str) -> CatalogueEntry | None: ...

    async def models(
        self, conditions: Sequence[Condition], prompts: bool, order: Sequence[Ordering], offset: int, limit: int
    ) -> Sequence[CatalogueEntry]:
        """Those for which all conditions hold; of prompts and models only the one or the other."""
        ...

    async def version(self, name: str, number: int) -> CataloguedVersion | None: ...

    async def by_alias(self, name: str, alias: str) -> CataloguedVersion | None: ...

    async def versions(
        self, conditions: Sequence[Condition], prompts: bool, order: Sequence[Ordering], offset: int, limit: int
    ) -> Sequence[CataloguedVersion]:
        """Those for which all conditions hold; of prompts and models only the one or the other."""
        ...


class KeyRepository(Protocol):
    """API keys."""

    async def all(self, exclusively: bool = False) -> Sequence[ApiKey]:
        """Every key, oldest first; `exclusively` keeps other changes of keys waiting until this transaction ends."""
        ...

    async def store(self, key: ApiKey) -> None:
        """Stores a key at its new revision, and tells it to the gateways."""
        ...

    async def publish_again(self, most: int) -> int:
        """Tells the newest snapshots whose turn it is once more, this many at most, under the locks of their rows; how many."""
        ...


class AuditLog(Protocol):
    """The audit log. Rows are added and read, nothing else."""

    async def add(self, entries: Sequence[Audit]) -> None: ...

    async def read(self, target: str, below: int, limit: int) -> Sequence[AuditRow]:
        """Newest first, ids below `below` (0: all), of a target and what lies under it (empty: everything)."""
        ...


class Session(Protocol):
    """One transaction."""

    @property
    def deliveries(self) -> DeliveryRepository: ...

    @property
    def models(self) -> ModelRepository: ...

    @property
    def catalogue(self) -> CatalogueReader: ...

    @property
    def keys(self) -> KeyRepository: ...

    @property
    def audit(self) -> AuditLog: ...


class Store(Protocol):
    """Where everything is kept."""

    def transaction(self) -> AbstractAsyncContextManager[Session]:
        """A transaction: committed when the block ends well, and then the events in it are on their way; else rolled back."""
        ...

    def snapshot(self) -> AbstractAsyncContextManager[Session]:
        """For reading only: all that is read within the block is of one moment."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A domain event on the wire: type, topic without prefix, what it is about, and the message."""

    type: str
    topic: str
    subject: str
    payload: bytes


class Encode(Protocol):
    """Puts a domain event into the words of the wire."""

    def __call__(self, event: DomainEvent) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class SectionVerdict:
    """What a service says of its section: (field path from the top, sentence) for each problem; the fields that loosen a gate."""

    problems: tuple[tuple[str, str], ...] = ()
    loosened: tuple[str, ...] = ()


class SectionValidator(Protocol):
    """The service that a section belongs to."""

    async def validate(self, delivery: str, section: str, section_json: str, previous_json: str) -> SectionVerdict:
        """Changes nothing. Raises Transient when the service does not answer."""
        ...
