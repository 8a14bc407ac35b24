"""What a rollout can be told: that its turn has come, what a runtime, gateways or an operator say, that its time is over."""

from __future__ import annotations

from dataclasses import dataclass

from deployer.domain.rollout import Cause
from deployer.domain.windows import Merged


@dataclass(frozen=True)
class Begin:
    """It is this rollout's turn; the endpoint is served by `baseline` under `revision` (none and 0 when it is not served).

    `live` is the number of the version that serves it; 0 when that is none, or one of another model: there the numbers say nothing.
    """

    baseline: str | None
    revision: int
    live: int = 0


@dataclass(frozen=True)
class Loaded:
    """The runtime has the model."""


@dataclass(frozen=True)
class Warmed:
    """The model has answered its sample rows rightly."""


@dataclass(frozen=True)
class LoadFailed:
    """The version cannot be brought up: its artifact, or what the runtime said about it."""

    cause: Cause
    message: str


@dataclass(frozen=True)
class RuntimeRestarted:
    """The runtime lost what it had loaded."""

    message: str


@dataclass(frozen=True)
class Acknowledged:
    """Every gateway that is alive serves by this revision of the route or a later one."""

    revision: int


@dataclass(frozen=True)
class Deadline:
    """The time set by the last DeadlineSet is over."""


@dataclass(frozen=True)
class Pause:
    reason: str


@dataclass(frozen=True)
class Resume:
    by: str


@dataclass(frozen=True)
class Abort:
    reason: str


@dataclass(frozen=True)
class Supersede:
    by_version: int


@dataclass(frozen=True)
class Revert:
    """Take a completed rollout back. `revision` is the endpoint's now: others may have been published since it completed."""

    reason: str
    revision: int


Command = Pause | Resume | Abort | Supersede | Revert
RuntimeEvent = Loaded | Warmed | LoadFailed | RuntimeRestarted
Input = Begin | RuntimeEvent | Merged | Acknowledged | Deadline | Command
