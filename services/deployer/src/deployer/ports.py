"""What the handlers need from the world outside: a store with transactions, and runtimes that serve models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from servicekit.errors import DeadlineExceeded, Invalid, Transient

from deployer.domain.endpoint import Endpoint
from deployer.domain.events import Event
from deployer.domain.rollout import Rollout
from deployer.domain.route import Route
from deployer.domain.signature import Rows, Signature
from deployer.domain.version import Arm, Version


class Refused(Invalid):
    """The runtime does not take this model; the message is the runtime's own."""


class RuntimeLost(Transient):
    """The runtime went away while it was loading: the model may have been the reason."""


class LoadTooSlow(DeadlineExceeded):
    """The runtime had not loaded the model in its time. It may still be loading it."""


class Deposed(Transient):
    """Another process leads now; whoever sees this stops leading and changes nothing."""


class Runtime(Protocol):
    """A server that loads models under names given by us and answers inference requests.

    Every method may be repeated. All raise Unavailable when the runtime cannot be reached and DeadlineExceeded when it takes too long.
    """

    @property
    def name(self) -> str:
        """What deliveries call it, such as `triton`."""
        ...

    @property
    def upstream(self) -> str:
        """The address (`host:port`) at which gateways reach it."""
        ...

    async def load(self, model: str, content: bytes, signature: Signature) -> None:
        """Load an ONNX model under a name; nothing happens when the name is loaded. Never use a name for other bytes.

        Raises Refused, RuntimeLost when the runtime died of it, LoadTooSlow when it may still be loading it.
        """
        ...

    async def unload(self, model: str) -> None:
        """Unload a model, and return when it is gone. Nothing happens when it is not loaded."""
        ...

    async def infer(self, model: str, inputs: Rows, signature: Signature) -> Rows:
        """Answer rows: the proof that a model is ready. Raises Refused when the model answers with an error or is not there."""
        ...

    async def models(self) -> frozenset[str]:
        """The names of all models that are loaded."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


@dataclass(frozen=True)
class Delivery:
    """One revision of a delivery, as far as it concerns serving. `section` is None when the file has no `serve`."""

    name: str
    revision: int
    endpoint: str
    section: dict[str, Any] | None
    deleted: bool


@dataclass(frozen=True)
class EndpointRecord:
    """An endpoint as it is stored. `route` is the snapshot published last."""

    endpoint: Endpoint
    delivery: str
    route: Route | None = None
    generation: int = 0
    acknowledged: int = 0

    @property
    def watched(self) -> bool:
        """Whether the route is to be published again and again, and gateways report windows of it."""
        return self.route is not None and self.route.watched


@dataclass(frozen=True)
class RolloutRecord:
    """A rollout as it is stored, with what its events tell. `traceparent` is of the event that caused it.

    `decisions` rows are in its log: of two records, the one with more is the later one.
    """

    rollout: Rollout
    version: Version
    baseline_version: int = 0
    traceparent: str = ""
    created_at: datetime | None = None
    finished_at: datetime | None = None
    decisions: int = 0


@dataclass(frozen=True)
class Decision:
    """One row of a rollout's decision log."""

    sequence: int
    at: datetime
    source: str
    target: str
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model that was to be loaded: `state` is intended, loaded or gone; not `wanted` means that it must go."""

    name: str
    runtime: str
    endpoint: str
    arm: str
    wanted: bool
    state: str


@dataclass(frozen=True)
class Announcement:
    """A domain event of a rollout that others must hear of, with what it needs to be told. `revision` is the route's."""

    event: Event
    record: RolloutRecord
    revision: int
    baseline: Version | None


class UnitOfWork(Protocol):
    """One transaction. Whoever changes anything about an endpoint calls `lock` for it first."""

    async def fence(self, epoch: int) -> None:
        """Raises Deposed unless this epoch is still the leader's. Holds a new leader off until the transaction ends."""
        ...

    async def lock(self, endpoint: str) -> EndpointRecord | None:
        """The endpoint, with its row locked until the transaction ends."""
        ...

    async def add_endpoint(self, name: str, delivery: str) -> None:
        """Make an endpoint; nothing happens when it exists."""
        ...

    async def save_endpoint(self, record: EndpointRecord) -> None: ...

    async def rollout(self, rollout_id: str) -> RolloutRecord | None: ...

    async def add_rollout(self, record: RolloutRecord) -> None: ...

    async def save_rollout(self, record: RolloutRecord) -> None:
        """Store the rollout's state; sets the time at which it finished when it has."""
        ...

    async def log(self, rollout_id: str, source: str, target: str, reason: str, evidence: dict[str, Any]) -> None:
        """Append to the decision log."""
        ...

    async def set_deadline(self, rollout_id: str, seconds: float | None) -> None:
        """So many seconds from now, by the database's clock."""
        ...

    async def deadline_is_over(self, rollout_id: str) -> bool: ...

    async def arms(self, endpoint: str, ids: Iterable[str | None]) -> dict[str, Arm]:
        """These arms of an endpoint, by their ids; no entry for one that is None."""
        ...

    async def save_arm(self, arm: Arm) -> None:
        """Add or change an arm."""
        ...

    async def models(self, runtime: str | None = None) -> list[LoadedModel]:
        """All models that are not gone."""
        ...

    async def save_model(self, model: LoadedModel) -> None:
        """Add or change what is wanted of a runtime."""
        ...

    async def delivery(self, name: str, revision: int) -> Delivery | None:
        """This revision of a delivery; when it was never heard, the next one that was."""
        ...

    async def save_delivery(self, delivery: Delivery) -> bool:
        """Remember a revision; False when it was known."""
        ...

    async def publish(self, route: Route) -> None:
        """Have gateways told of a route. Also again, with the same revision: every publication is numbered."""
        ...

    async def route_is_older(self, endpoint: str, seconds: float) -> bool:
        """Whether the route's revision is older than this, by the database's clock."""
        ...

    async def announce(self, announcement: Announcement) -> None:
        """Have everybody told of an event."""
        ...

    async def enqueue_load(self, rollout_id: str) -> None:
        """Have the rollout's version loaded and warmed up by a job."""
        ...


@dataclass(frozen=True)
class Due:
    """What the leader has to look at, as of one moment."""

    begin: Sequence[str]
    """Endpoints where a rollout waits and none runs."""
    deadlines: Sequence[str]
    """Rollouts whose deadline is over."""
    unpublished: Sequence[str]
    """Endpoints whose route is watched and was last published some time ago."""
    unacknowledged: Sequence[tuple[str, int]]
    """Endpoints with a watched route of which it is not noted that all gateways serve it, or that need not be watched any more."""
    orphaned: Sequence[str]
    """Endpoints in use that no delivery names any more."""
    idle: Sequence[str]
    """Endpoints with loaded arms that nothing needs."""


class Store(Protocol):
    """Where everything is kept."""

    def transaction(self) -> AbstractAsyncContextManager[UnitOfWork]:
        """A transaction: commits at the end of the block, rolls back when it raises. Raises Unavailable when the database is away."""
        ...

    async def due(self, republish_after_s: float) -> Due:
        """What there is to do now."""
        ...

    async def live(self) -> list[RolloutRecord]:
        """All rollouts that run, and completed ones that are watched."""
        ...

    async def rollouts(self, endpoint: str, limit: int, before: str) -> list[RolloutRecord]:
        """Newest first, of one endpoint or (empty) of all, those older than the rollout `before` (empty: from the newest)."""
        ...

    async def find_rollout(self, rollout_id: str) -> RolloutRecord | None: ...

    async def decisions(self, rollout_id: str, after: int, limit: int) -> list[Decision]:
        """The log of a rollout, oldest first, from behind the decision of this sequence number (0: from the beginning)."""
        ...

    async def endpoints(self, name: str = "") -> list[EndpointRecord]:
        """All endpoints, or the one of this name."""
        ...
