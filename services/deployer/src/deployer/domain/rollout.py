"""The rollout: its states, what it is told, what it decides. `decide` is the whole of it: no clock, no store, no call to anything.

waiting -> preparing -> warming -> shadowing -> stepping -> completing -> completed -> (reverting -> reverted);
aborting -> rolled_back (or superseded) from every state before completed. Shadowing and stepping can be held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from deployer.domain import judge
from deployer.domain.errors import CommandRefused
from deployer.domain.grammar import FULL, percent
from deployer.domain.judge import Evidence, Verdict
from deployer.domain.policy import OnDeadline, Policy
from deployer.domain.windows import Merged

ACKNOWLEDGE_S = 60.0
"""How long an end waits for gateways that are alive and do not acknowledge it. The version stays loaded until they do."""

INTERFERENCE_S = 60.0
"""How long, in seconds of windows, a rollout holds while its baseline suffers before it is given up."""

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
"""States in which traffic is evidence."""


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
    """

    id: str
    endpoint: str
    canary: str
    policy: Policy
    state: State = State.WAITING
    baseline: str | None = None
    revision: int = 0
    step: int = 0
    hold: Hold | None = None
    cause: Cause | None = None
    reason: str = ""
    superseded_by: int = 0
    revertible: bool = False
    evidence: Evidence = NO_EVIDENCE

    @property
    def weight(self) -> int:
        """The new version's share of callers' traffic now, in basis points."""
        if self.state is State.STEPPING:
            return self.policy.steps[self.step].weight
        return FULL if self.state in (State.COMPLETING, State.COMPLETED) else 0


# What a rollout can be told.


@dataclass(frozen=True)
class Begin:
    """It is this rollout's turn; the endpoint is served by `baseline` under `revision` (none and 0 when it is not served)."""

    baseline: str | None
    revision: int


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


# What it decides.


@dataclass(frozen=True)
class Moved:
    """The rollout is in another state, step or hold."""

    source: str
    target: str
    reason: str


@dataclass(frozen=True)
class Judged:
    """A merged window was taken as evidence; `detail` holds its counts and every guard's wealth."""

    detail: dict[str, Any]


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
class RevertWindowClosed:
    """The version before may be unloaded."""


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
    | RevertWindowClosed
)
Decision = tuple[Rollout, tuple[Event, ...]]


def decide(rollout: Rollout, given: Input) -> Decision:
    """Return the rollout after what it was told, and what follows from it.

    Anything that does not fit the state any more (it comes late, or twice) changes nothing, so every input may be repeated.
    Raises CommandRefused for a command that can never have an effect in this state.
    """
    match given:
        case Begin():
            return _begin(rollout, given)
        case Loaded():
            return _move(rollout, State.WARMING, "the runtime has loaded it") if rollout.state is State.PREPARING else (rollout, ())
        case Warmed():
            return _warmed(rollout) if rollout.state is State.WARMING else (rollout, ())
        case LoadFailed():
            return _abort(rollout, given.cause, given.message) if rollout.state in UNROUTED else (rollout, ())
        case RuntimeRestarted():
            lost = rollout.state in (State.PREPARING, State.WARMING, State.SHADOWING, State.STEPPING)
            return _abort(rollout, Cause.RUNTIME, given.message) if lost else (rollout, ())
        case Merged():
            return _judge(rollout, given)
        case Acknowledged():
            return _acknowledged(rollout, given.revision)
        case Deadline():
            return _deadline(rollout)
        case Pause() | Resume() | Abort() | Supersede() | Revert():
            return _command(rollout, given)


def _name(rollout: Rollout) -> str:
    step = f"({rollout.step})" if rollout.state is State.STEPPING else ""
    return f"{rollout.state}{step}" + (f", {rollout.hold}" if rollout.hold else "")


def _changed(before: Rollout, after: Rollout, reason: str, *events: Event) -> Decision:
    return replace(after, reason=reason), (Moved(_name(before), _name(after), reason), *events)


def _move(rollout: Rollout, state: State, reason: str, *events: Event, **changes: Any) -> Decision:
    return _changed(rollout, replace(rollout, state=state, hold=None, **changes), reason, *events)


def _route(rollout: Rollout, canary: int, shadow: bool = False, settled: bool = False) -> RouteSet:
    """The next revision of the route. Until it is settled, the share falls back to the baseline when nobody judges any more."""
    revision = rollout.revision + 1
    if rollout.baseline is None or canary == FULL:
        return RouteSet(revision, ((rollout.canary, FULL),), ((rollout.canary, FULL),))
    if settled:
        return RouteSet(revision, ((rollout.baseline, FULL),), ((rollout.baseline, FULL),))
    weights = ((rollout.baseline, FULL - canary), (rollout.canary, canary))
    return RouteSet(revision, weights, ((rollout.baseline, FULL), (rollout.canary, 0)), rollout.canary if shadow else None)


def _begin(rollout: Rollout, given: Begin) -> Decision:
    if rollout.state is not State.WAITING:
        return rollout, ()
    return _move(
        rollout,
        State.PREPARING,
        "its turn has come" if given.baseline else "its turn has come; the endpoint has no version yet",
        DeadlineSet(rollout.policy.deadline_s),
        baseline=given.baseline,
        revision=given.revision,
    )


def _warmed(rollout: Rollout) -> Decision:
    if rollout.baseline is None:
        route = _route(rollout, FULL)
        return _move(rollout, State.COMPLETING, "it answers, and there is nothing to compare it with", route, revision=route.revision)
    if rollout.policy.shadow is not None:
        route = _route(rollout, 0, shadow=True)
        return _move(rollout, State.SHADOWING, "it answers its sample rows", route, revision=route.revision)
    return _step(rollout, 0, "it answers its sample rows")


def _step(rollout: Rollout, step: int, reason: str) -> Decision:
    weight = rollout.policy.steps[step].weight
    route = _route(rollout, weight)
    told: Event = CanaryStarted(weight) if step == 0 else Advanced(step, weight, reason)
    evidence = rollout.evidence.restarted()
    return _move(rollout, State.STEPPING, reason, route, told, step=step, revision=route.revision, evidence=evidence)


def _abort(rollout: Rollout, cause: Cause, reason: str) -> Decision:
    ending = replace(rollout, cause=cause)
    if rollout.state in UNROUTED:
        return _ended(ending, reason)
    if rollout.baseline is None:
        # Gateways that drop a route have nothing left to acknowledge it by.
        withdrawn = RouteWithdrawn(rollout.revision + 1)
        after, events = _ended(replace(ending, revision=withdrawn.revision), reason)
        return after, (events[0], withdrawn, *events[1:])
    route = _route(rollout, 0, settled=True)
    return _changed(
        rollout,
        replace(ending, state=State.ABORTING, hold=None, revision=route.revision),
        reason,
        route,
        DeadlineSet(ACKNOWLEDGE_S),
    )


def _ended(rollout: Rollout, reason: str) -> Decision:
    if rollout.cause is Cause.SUPERSEDED:
        return _move(rollout, State.SUPERSEDED, reason, Superseded(rollout.superseded_by), DeadlineSet(None))
    cause = rollout.cause or Cause.OPERATOR
    return _move(rollout, State.ROLLED_BACK, reason, RolledBack(cause, reason), DeadlineSet(None))


def _acknowledged(rollout: Rollout, revision: int) -> Decision:
    if revision < rollout.revision:
        return rollout, ()
    if rollout.state is State.ABORTING:
        return _ended(rollout, rollout.reason)
    if rollout.state is State.REVERTING:
        return _move(rollout, State.REVERTED, rollout.reason, Reverted(rollout.reason), DeadlineSet(None))
    if rollout.state is not State.COMPLETING:
        return rollout, ()
    first = rollout.baseline is None
    reason = "every gateway serves it" if first else f"{rollout.reason}; every gateway serves it"
    window = None if first else rollout.policy.rollback_window_s
    return _move(rollout, State.COMPLETED, reason, Completed(first, reason), DeadlineSet(window), revertible=not first)


def _deadline(rollout: Rollout) -> Decision:
    match rollout.state:
        case State.PREPARING | State.WARMING:
            return _abort(rollout, Cause.DEADLINE, f"not ready at its deadline ({rollout.policy.deadline_s:g} s)")
        case State.SHADOWING | State.STEPPING | State.COMPLETING:
            reason = f"at its deadline ({rollout.policy.deadline_s:g} s): {_missing(rollout)}"
            if rollout.policy.on_deadline is OnDeadline.ABORT:
                return _abort(rollout, Cause.DEADLINE, f"given up {reason}")
            if rollout.hold is Hold.DEADLINE:
                return rollout, ()
            return _changed(rollout, replace(rollout, hold=Hold.DEADLINE), f"held {reason}", DeadlineSet(None))
        case State.ABORTING:
            return _ended(rollout, f"{rollout.reason} (not every gateway has acknowledged the route)")
        case State.REVERTING:
            reason = f"{rollout.reason} (not every gateway has acknowledged the route)"
            return _move(rollout, State.REVERTED, reason, Reverted(reason), DeadlineSet(None))
        case State.COMPLETED if rollout.revertible:
            return replace(rollout, revertible=False), (RevertWindowClosed(), DeadlineSet(None))
        case _:
            return rollout, ()


def _command(rollout: Rollout, command: Command) -> Decision:
    match command:
        case Pause():
            if rollout.state not in JUDGED:
                raise CommandRefused(f"a rollout can be paused while it is shadowing or stepping; this one is {rollout.state}")
            if rollout.hold is Hold.PAUSED:
                return rollout, ()
            return _changed(rollout, replace(rollout, hold=Hold.PAUSED), command.reason)
        case Resume():
            if rollout.state not in JUDGED | {State.COMPLETING}:
                raise CommandRefused(f"there is nothing to resume: the rollout is {rollout.state}")
            if rollout.hold is None:
                return rollout, ()
            resumed = replace(rollout, hold=None, evidence=replace(rollout.evidence, interference_s=0.0))
            return _changed(rollout, resumed, f"resumed by {command.by}", DeadlineSet(rollout.policy.deadline_s))
        case Abort():
            return _stop(rollout, Cause.OPERATOR, command.reason)
        case Supersede():
            reason = f"version {command.by_version} takes its place"
            return _stop(replace(rollout, superseded_by=command.by_version), Cause.SUPERSEDED, reason)
        case Revert():
            if rollout.state in (State.REVERTING, State.REVERTED):
                return rollout, ()
            if rollout.state is not State.COMPLETED or not rollout.revertible:
                raise CommandRefused(f"only a completed rollout within its rollback window can be reverted; this one is {rollout.state}")
            route = _route(replace(rollout, revision=command.revision), 0, settled=True)
            return _move(
                rollout,
                State.REVERTING,
                command.reason,
                route,
                DeadlineSet(ACKNOWLEDGE_S),
                revision=route.revision,
                revertible=False,
            )


def _stop(rollout: Rollout, cause: Cause, reason: str) -> Decision:
    if rollout.state in (State.ABORTING, State.ROLLED_BACK, State.SUPERSEDED):
        return rollout, ()
    if rollout.state in (State.COMPLETED, State.REVERTING, State.REVERTED):
        raise CommandRefused(f"the rollout is {rollout.state}; a completed one is reverted, not aborted")
    return _abort(rollout, cause, reason)


def _judge(rollout: Rollout, window: Merged) -> Decision:
    if rollout.state not in JUDGED or window.revision != rollout.revision:
        return rollout, ()
    shadowing = rollout.state is State.SHADOWING
    evidence = judge.weigh(rollout.evidence, window, rollout.policy, shadowing)
    verdict = judge.verdict(evidence, rollout.policy)
    judged = Judged(judge.explain(evidence, window, rollout.policy))
    after = replace(rollout, evidence=evidence)

    if verdict.harm:
        after, events = _abort(after, Cause.HARM, verdict.harm)
    elif verdict.breach:
        after, events = _abort(after, Cause.BREACH, verdict.breach)
    else:
        after, events = _progress(after, verdict, window.seconds)
    return after, (judged, *events)


def _progress(rollout: Rollout, verdict: Verdict, seconds: float) -> Decision:
    """Hold while the baseline suffers, go on when the step has seen enough; nothing else."""
    if verdict.interference:
        suffered = rollout.evidence.interference_s + seconds
        rollout = replace(rollout, evidence=replace(rollout.evidence, interference_s=suffered))
        if suffered >= INTERFERENCE_S:
            return _abort(rollout, Cause.INTERFERENCE, verdict.interference)
        if rollout.hold is None:
            return _changed(rollout, replace(rollout, hold=Hold.INTERFERENCE), f"held: {verdict.interference}")
        return rollout, ()
    if rollout.hold is Hold.INTERFERENCE:
        calm = replace(rollout, hold=None, evidence=replace(rollout.evidence, interference_s=0.0))
        return _changed(rollout, calm, "the baseline is itself again")
    if rollout.hold is not None or _missing(rollout):
        return rollout, ()
    return _NEXT[rollout.state](rollout)


def _after_shadow(rollout: Rollout) -> Decision:
    shadow = rollout.evidence.shadow
    reason = f"{shadow.compared} answers compared, {shadow.different} different"
    return _step(rollout, 0, reason)


def _after_step(rollout: Rollout) -> Decision:
    done = rollout.policy.steps[rollout.step]
    seen = f"{rollout.evidence.step_units} requests at {percent(done.weight)} without harm"
    if rollout.step + 1 < len(rollout.policy.steps):
        return _step(rollout, rollout.step + 1, seen)
    route = _route(rollout, FULL)
    reason = f"{seen}; shown to be no worse than each guard's margin"
    return _move(rollout, State.COMPLETING, reason, route, revision=route.revision)


_NEXT: dict[State, Callable[[Rollout], Decision]] = {State.SHADOWING: _after_shadow, State.STEPPING: _after_step}


def _missing(rollout: Rollout) -> str:
    """What the rollout still waits for, in words; empty when it may go on."""
    evidence = rollout.evidence
    match rollout.state:
        case State.SHADOWING:
            wanted = rollout.policy.shadow.requests if rollout.policy.shadow else 0
            compared = evidence.shadow.compared
            return f"{compared} of {wanted} shadow answers compared" if compared < wanted else ""
        case State.STEPPING:
            step = rollout.policy.steps[rollout.step]
            if evidence.step_units < step.requests:
                return f"{evidence.step_units} of {step.requests} canary requests seen at {percent(step.weight)}"
            if evidence.step_seconds < step.seconds:
                return f"{evidence.step_seconds:.0f} of {step.seconds:g} s spent at {percent(step.weight)}"
            if rollout.step + 1 == len(rollout.policy.steps):
                unproven = judge.unproven(evidence, rollout.policy)
                return f"not yet shown to be no worse by {', '.join(unproven)}" if unproven else ""
            return ""
        case _:
            return "not every gateway has acknowledged the route"
