"""The rollout: its states, and what is kept of it. What it can be told stands in `inputs`, what follows from that in `events`.

waiting -> preparing -> warming -> shadowing -> stepping -> completing -> completed -> (reverting -> reverted);
aborting -> rolled_back (or superseded) from every state before completed. Shadowing and stepping can be held. A completed one is
watched for a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deployer.domain.grammar import FULL
from deployer.domain.judge import Evidence
from deployer.domain.policy import Policy

NO_EVIDENCE = Evidence()


class State(StrEnum):
    """Where a rollout is."""

    WAITING = "waiting"
    PREPARING = "preparing"
    WARMING = "warming"
    SHADOWING = "shadowing"
    STEPPING = "stepping"
    COMPLETING = "completing"
    COMPLETED = "completed"
    REVERTING = "reverting"
    REVERTED = "reverted"
    ABORTING = "aborting"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"


UNROUTED = frozenset({State.WAITING, State.PREPARING, State.WARMING})
"""States in which no route has named the new version yet."""

LIVE = frozenset({State.PREPARING, State.WARMING, State.SHADOWING, State.STEPPING, State.COMPLETING, State.REVERTING, State.ABORTING})
"""States of which an endpoint has one rollout at most."""

ENDED = frozenset({State.COMPLETED, State.REVERTED, State.ROLLED_BACK, State.SUPERSEDED})
JUDGED = frozenset({State.SHADOWING, State.STEPPING})
"""States in which traffic is evidence for or against going on."""


class Cause(StrEnum):
    """Why a rollout ended without completing."""

    HARM = "harm"
    BREACH = "breach"
    INTERFERENCE = "interference"
    DEADLINE = "deadline"
    RUNTIME = "runtime"
    ARTIFACT = "artifact"
    OPERATOR = "operator"
    SUPERSEDED = "superseded"


class Hold(StrEnum):
    """Why a rollout stays where it is."""

    PAUSED = "paused"
    DEADLINE = "deadline"
    INTERFERENCE = "interference"


@dataclass(frozen=True)
class Rollout:
    """One version on its way onto one endpoint. `canary` and `baseline` name arms; no baseline: the endpoint's first version.

    `revision` is the revision of the endpoint's route that this rollout published last, or found. Windows of another are no evidence.
    `champion` is the version that its `evaluation` compared it with (0: there was none); None: no verdict binds it, as it was promoted
    past the gates. `stale`: another version was live when its turn came. A completed rollout is `watched` for its rollback window:
    `watch` is that evidence, `alarm` what it showed, if anything.
    """

    id: str
    endpoint: str
    canary: str
    policy: Policy
    state: State = State.WAITING
    baseline: str | None = None
    evaluation: str = ""
    champion: int | None = None
    revision: int = 0
    step: int = 0
    hold: Hold | None = None
    cause: Cause | None = None
    reason: str = ""
    superseded_by: int = 0
    stale: bool = False
    revertible: bool = False
    watched: bool = False
    alarm: str = ""
    evidence: Evidence = NO_EVIDENCE
    watch: Evidence = NO_EVIDENCE

    @property
    def weight(self) -> int:
        """The new version's share of callers' traffic now, in basis points."""
        if self.state is State.STEPPING:
            return self.policy.steps[self.step].weight
        return FULL if self.state in (State.COMPLETING, State.COMPLETED) else 0

    @property
    def judged(self) -> bool:
        """Whether traffic is evidence now."""
        return self.state in JUDGED or (self.state is State.COMPLETED and self.watched and not self.alarm)
