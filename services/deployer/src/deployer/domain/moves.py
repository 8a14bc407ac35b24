"""How a rollout gets from one state into another, with the routes, deadlines and announcements that belong to each move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deployer.domain.events import (
    Advanced,
    CanaryStarted,
    DeadlineSet,
    Decision,
    Event,
    Moved,
    RolledBack,
    RouteSet,
    RouteWithdrawn,
    Superseded,
)
from deployer.domain.grammar import FULL
from deployer.domain.rollout import UNROUTED, Cause, Rollout, State

ACKNOWLEDGE_S = 60.0
"""How long an end waits for gateways that are alive and do not acknowledge it. The version stays loaded until they do."""


def _name(rollout: Rollout) -> str:
    step = f"({rollout.step})" if rollout.state is State.STEPPING else ""
    return f"{rollout.state}{step}" + (f", {rollout.hold}" if rollout.hold else "")


def changed(before: Rollout, after: Rollout, reason: str, *events: Event) -> Decision:
    return replace(after, reason=reason), (Moved(_name(before), _name(after), reason), *events)


def move(rollout: Rollout, state: State, reason: str, *events: Event, **changes: Any) -> Decision:
    return changed(rollout, replace(rollout, state=state, hold=None, **changes), reason, *events)


def route_of(rollout: Rollout, canary: int, shadow: bool = False, settled: bool = False) -> RouteSet:
    """The next revision of the route. Until it is settled, the share falls back to the baseline when nobody judges any more."""
    revision = rollout.revision + 1
    if rollout.baseline is None or canary == FULL:
        return RouteSet(revision, ((rollout.canary, FULL),), ((rollout.canary, FULL),))
    if settled:
        return RouteSet(revision, ((rollout.baseline, FULL),), ((rollout.baseline, FULL),))
    weights = ((rollout.baseline, FULL - canary), (rollout.canary, canary))
    return RouteSet(revision, weights, ((rollout.baseline, FULL), (rollout.canary, 0)), rollout.canary if shadow else None)


def step_to(rollout: Rollout, step: int, reason: str) -> Decision:
    weight = rollout.policy.steps[step].weight
    route = route_of(rollout, weight)
    told: Event = CanaryStarted(weight) if step == 0 else Advanced(step, weight, reason)
    evidence = rollout.evidence.restarted()
    return move(rollout, State.STEPPING, reason, route, told, step=step, revision=route.revision, evidence=evidence)


def abort(rollout: Rollout, cause: Cause, reason: str) -> Decision:
    ending = replace(rollout, cause=cause)
    if rollout.state in UNROUTED:
        return ended(ending, reason)
    if rollout.baseline is None:
        # Gateways that drop a route have nothing left to acknowledge it by.
        withdrawn = RouteWithdrawn(rollout.revision + 1)
        after, events = ended(replace(ending, revision=withdrawn.revision), reason)
        return after, (events[0], withdrawn, *events[1:])
    route = route_of(rollout, 0, settled=True)
    return changed(
        rollout,
        replace(ending, state=State.ABORTING, hold=None, revision=route.revision),
        reason,
        route,
        DeadlineSet(ACKNOWLEDGE_S),
    )


def ended(rollout: Rollout, reason: str) -> Decision:
    if rollout.cause is Cause.SUPERSEDED:
        return move(rollout, State.SUPERSEDED, reason, Superseded(rollout.superseded_by), DeadlineSet(None))
    cause = rollout.cause or Cause.OPERATOR
    return move(rollout, State.ROLLED_BACK, reason, RolledBack(cause, reason), DeadlineSet(None))
