"""The rollout's decisions: `decide` is the whole of it. No clock, no store, no call to anything."""

from __future__ import annotations

from dataclasses import replace

from deployer.domain import judge
from deployer.domain.errors import CommandRefused
from deployer.domain.events import Completed, DeadlineSet, Decision, Reverted, WatchEnded
from deployer.domain.grammar import FULL
from deployer.domain.inputs import (
    Abort,
    Acknowledged,
    Begin,
    Command,
    Deadline,
    Input,
    Loaded,
    LoadFailed,
    Pause,
    Resume,
    Revert,
    RuntimeRestarted,
    Supersede,
    Warmed,
)
from deployer.domain.moves import ACKNOWLEDGE_S, abort, changed, ended, move, route_of, step_to
from deployer.domain.policy import OnDeadline
from deployer.domain.progress import judged, missing
from deployer.domain.rollout import JUDGED, UNROUTED, Cause, Hold, Rollout, State
from deployer.domain.windows import Merged


def decide(rollout: Rollout, given: Input) -> Decision:
    """Return the rollout after what it was told, and what follows from it.

    Anything that does not fit the state any more (it comes late, or twice) changes nothing, so every input may be repeated.
    Raises CommandRefused for a command that can never have an effect in this state.
    """
    match given:
        case Begin():
            return _begin(rollout, given)
        case Loaded():
            return move(rollout, State.WARMING, "the runtime has loaded it") if rollout.state is State.PREPARING else (rollout, ())
        case Warmed():
            return _warmed(rollout) if rollout.state is State.WARMING else (rollout, ())
        case LoadFailed():
            return abort(rollout, given.cause, given.message) if rollout.state in UNROUTED else (rollout, ())
        case RuntimeRestarted():
            lost = rollout.state in (State.PREPARING, State.WARMING, State.SHADOWING, State.STEPPING)
            return abort(rollout, Cause.RUNTIME, given.message) if lost else (rollout, ())
        case Merged():
            return judged(rollout, given)
        case Acknowledged():
            return _acknowledged(rollout, given.revision)
        case Deadline():
            return _deadline(rollout)
        case Pause() | Resume() | Abort() | Supersede() | Revert():
            return _command(rollout, given)


def _begin(rollout: Rollout, given: Begin) -> Decision:
    if rollout.state is not State.WAITING:
        return rollout, ()
    if given.live and rollout.champion is not None and rollout.champion != given.live:
        # Without a version that is live there is none to be judged against, whatever was champion once: such a verdict stands.
        against = f"version {rollout.champion}" if rollout.champion else "no champion"
        stale = replace(rollout, cause=Cause.SUPERSEDED, superseded_by=given.live, stale=True)
        return ended(stale, f"judged against {against}, but version {given.live} is live now: to be evaluated again")
    return move(
        rollout,
        State.PREPARING,
        "its turn has come" if given.baseline else "its turn has come; the endpoint has no version yet",
        DeadlineSet(rollout.policy.deadline_s),
        baseline=given.baseline,
        revision=given.revision,
    )


def _warmed(rollout: Rollout) -> Decision:
    if rollout.baseline is None:
        route = route_of(rollout, FULL)
        return move(rollout, State.COMPLETING, "it answers, and there is nothing to compare it with", route, revision=route.revision)
    if rollout.policy.shadow is not None:
        route = route_of(rollout, 0, shadow=True)
        return move(rollout, State.SHADOWING, "it answers its sample rows", route, revision=route.revision)
    return step_to(rollout, 0, "it answers its sample rows")


def _acknowledged(rollout: Rollout, revision: int) -> Decision:
    if revision < rollout.revision:
        return rollout, ()
    if rollout.state is State.ABORTING:
        return ended(rollout, rollout.reason)
    if rollout.state is State.REVERTING:
        return move(rollout, State.REVERTED, rollout.reason, Reverted(rollout.reason), DeadlineSet(None))
    if rollout.state is not State.COMPLETING:
        return rollout, ()
    first = rollout.baseline is None
    reason = "every gateway serves it" if first else f"{rollout.reason}; every gateway serves it"
    watched = judge.bounded(rollout.policy)
    window = rollout.policy.rollback_window_s if watched or not first else None
    return move(rollout, State.COMPLETED, reason, Completed(first, reason), DeadlineSet(window), revertible=not first, watched=watched)


def _deadline(rollout: Rollout) -> Decision:
    match rollout.state:
        case State.PREPARING | State.WARMING:
            return abort(rollout, Cause.DEADLINE, f"not ready at its deadline ({rollout.policy.deadline_s:g} s)")
        case State.SHADOWING | State.STEPPING | State.COMPLETING:
            reason = f"at its deadline ({rollout.policy.deadline_s:g} s): {missing(rollout)}"
            if rollout.policy.on_deadline is OnDeadline.ABORT:
                return abort(rollout, Cause.DEADLINE, f"given up {reason}")
            if rollout.hold is Hold.DEADLINE:
                return rollout, ()
            return changed(rollout, replace(rollout, hold=Hold.DEADLINE), f"held {reason}", DeadlineSet(None))
        case State.ABORTING:
            return ended(rollout, f"{rollout.reason} (not every gateway has acknowledged the route)")
        case State.REVERTING:
            reason = f"{rollout.reason} (not every gateway has acknowledged the route)"
            return move(rollout, State.REVERTED, reason, Reverted(reason), DeadlineSet(None))
        case State.COMPLETED if rollout.watched or rollout.revertible:
            return replace(rollout, revertible=False, watched=False), (WatchEnded(), DeadlineSet(None))
        case _:
            return rollout, ()


def _command(rollout: Rollout, command: Command) -> Decision:
    match command:
        case Pause():
            if rollout.state not in JUDGED:
                raise CommandRefused(f"a rollout can be paused while it is shadowing or stepping; this one is {rollout.state}")
            if rollout.hold is Hold.PAUSED:
                return rollout, ()
            return changed(rollout, replace(rollout, hold=Hold.PAUSED), command.reason)
        case Resume():
            if rollout.state not in JUDGED | {State.COMPLETING}:
                raise CommandRefused(f"there is nothing to resume: the rollout is {rollout.state}")
            if rollout.hold is None:
                return rollout, ()
            resumed = replace(rollout, hold=None, evidence=replace(rollout.evidence, interference_s=0.0))
            return changed(rollout, resumed, f"resumed by {command.by}", DeadlineSet(rollout.policy.deadline_s))
        case Abort():
            return _stop(rollout, Cause.OPERATOR, command.reason)
        case Supersede():
            reason = f"version {command.by_version} takes its place"
            return _stop(replace(rollout, superseded_by=command.by_version), Cause.SUPERSEDED, reason)
        case Revert():
            if rollout.state in (State.REVERTING, State.REVERTED):
                return rollout, ()
            if rollout.state is not State.COMPLETED:
                raise CommandRefused(f"only a completed rollout can be reverted; this one is {rollout.state}")
            if rollout.baseline is None:
                raise CommandRefused("it cannot be reverted: it is the endpoint's first version, and there is none before it")
            if not rollout.revertible:
                raise CommandRefused("it cannot be reverted any more: its rollback window is over")
            route = route_of(replace(rollout, revision=command.revision), 0, settled=True)
            return move(
                rollout,
                State.REVERTING,
                command.reason,
                route,
                DeadlineSet(ACKNOWLEDGE_S),
                revision=route.revision,
                revertible=False,
                watched=False,
            )


def _stop(rollout: Rollout, cause: Cause, reason: str) -> Decision:
    if rollout.state in (State.ABORTING, State.ROLLED_BACK, State.SUPERSEDED):
        return rollout, ()
    if rollout.state in (State.COMPLETED, State.REVERTING, State.REVERTED):
        raise CommandRefused(f"the rollout is {rollout.state}; a completed one is reverted, not aborted")
    return abort(rollout, cause, reason)
