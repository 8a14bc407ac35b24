"""What happened, in the past tense: what the registry tells other services. The unit of work stores these; nothing here publishes."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from registry.domain.access import ApiKey
from registry.domain.deliveries import Revision
from registry.domain.versions import Deliverable, Journey


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A version of a model; the id stays when the name changes."""

    model_id: UUID
    model: str
    version: int


@dataclass(frozen=True, slots=True)
class ModelRegistered:
    """A new version stands in Staging."""

    version: VersionRef
    journey: Journey
    deliverable: Deliverable
    evaluation_id: str


@dataclass(frozen=True, slots=True)
class ModelApprovalRequested:
    """People are asked whether a version may go to production."""

    version: VersionRef
    journey: Journey
    approval_id: UUID
    evaluation_id: str
    needed: int


@dataclass(frozen=True, slots=True)
class ModelPromoted:
    """The registry wants this version in production; `champion_version` is the one it replaces, 0 for none.

    `override`: an admin passed the gates by, so that no verdict about a champion binds it.
    """

    version: VersionRef
    journey: Journey
    endpoint: str
    deliverable: Deliverable
    evaluation_id: str
    promoted_by: str
    champion_version: int
    override: bool = False


@dataclass(frozen=True, slots=True)
class ModelArchived:
    """A version is out of use."""

    version: VersionRef
    journey: Journey
    reason: str


@dataclass(frozen=True, slots=True)
class ModelReevaluationRequested:
    """A version was judged against a champion that is champion no more."""

    model_id: UUID
    journey: Journey
    evaluation_id: str
    champion_version: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeliveryApplied:
    """A delivery has a new revision; a deletion is one too."""

    revision: Revision


@dataclass(frozen=True, slots=True)
class AccessChanged:
    """An API key was made, changed or revoked."""

    key: ApiKey


ModelEvent = ModelRegistered | ModelApprovalRequested | ModelPromoted | ModelArchived | ModelReevaluationRequested
DomainEvent = ModelEvent | DeliveryApplied | AccessChanged
