"""What a rollout decides: moves, routes, deadlines, and what others hear of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployer.domain.rollout import Cause, Rollout


@dataclass(frozen=True)
class Moved:
    """The rollout is in another state, step or hold."""

    source: str
    target: str
    reason: str


@dataclass(frozen=True)
class Judged:
    """A merged window was taken as evidence; `detail` holds its counts and every guard's wealth.

    `logged`: the decision log keeps it. A held rollout has no deadline that ends it, so of its windows only those that changed something.
    """

    detail: dict[str, Any]
    logged: bool = True


@dataclass(frozen=True)
class RouteSet:
    """The endpoint's route from this revision on: weights in basis points by arm, summing to 10,000.

    `fallback` is what a gateway serves by when nobody publishes the route again. `shadow` names the arm that gets copies.
    """

    revision: int
    weights: tuple[tuple[str, int], ...]
    fallback: tuple[tuple[str, int], ...]
    shadow: str | None = None


@dataclass(frozen=True)
class RouteWithdrawn:
    """The endpoint has no route any more: its first version did not get through."""

    revision: int


@dataclass(frozen=True)
class DeadlineSet:
    """Tell the rollout `Deadline` after so many seconds from now; None: never."""

    seconds: float | None


@dataclass(frozen=True)
class CanaryStarted:
    weight: int


@dataclass(frozen=True)
class Advanced:
    step: int
    weight: int
    reason: str


@dataclass(frozen=True)
class Completed:
    first: bool
    reason: str


@dataclass(frozen=True)
class RolledBack:
    cause: Cause
    reason: str


@dataclass(frozen=True)
class Superseded:
    by_version: int


@dataclass(frozen=True)
class Reverted:
    reason: str


@dataclass(frozen=True)
class Alarmed:
    """A guard's `at_most` broke while the completed rollout was watched; `detail` holds the guards' wealths. Nothing is taken back."""

    reason: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class WatchEnded:
    """The rollback window is over: the version before may be unloaded, and nobody watches this one any more."""


Event = (
    Moved
    | Judged
    | RouteSet
    | RouteWithdrawn
    | DeadlineSet
    | CanaryStarted
    | Advanced
    | Completed
    | RolledBack
    | Superseded
    | Reverted
    | Alarmed
    | WatchEnded
)
Decision = tuple[Rollout, tuple[Event, ...]]
