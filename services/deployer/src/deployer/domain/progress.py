"""What traffic makes of a rollout: harm ends it, a suffering baseline holds it, enough evidence without harm moves it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deployer.domain import judge
from deployer.domain.events import Alarmed, Decision, Judged
from deployer.domain.grammar import FULL, percent
from deployer.domain.judge import Verdict
from deployer.domain.moves import abort, changed, move, route_of, step_to
from deployer.domain.rollout import JUDGED, Cause, Hold, Rollout, State
from deployer.domain.windows import Merged

INTERFERENCE_S = 60.0
"""How long, in seconds of windows, a rollout holds while its baseline suffers before it is given up."""


def judged(rollout: Rollout, window: Merged) -> Decision:
    """What follows from a merged window. One of another revision of the route is no evidence."""
    if not rollout.judged or window.revision != rollout.revision:
        return rollout, ()
    if rollout.state not in JUDGED:
        return _watched(rollout, window)
    shadowing = rollout.state is State.SHADOWING
    evidence = judge.weigh(rollout.evidence, window, rollout.policy, shadowing)
    verdict = judge.verdict(evidence, rollout.policy)
    after = replace(rollout, evidence=evidence)

    if verdict.harm:
        after, events = abort(after, Cause.HARM, verdict.harm)
    elif verdict.breach:
        after, events = abort(after, Cause.BREACH, verdict.breach)
    else:
        after, events = _progress(after, verdict, window.seconds)
    shown = judge.unproven(evidence, rollout.policy) != judge.unproven(rollout.evidence, rollout.policy)
    logged = rollout.hold is None or shown or bool(events)
    return after, (Judged(judge.explain(evidence, window, rollout.policy), logged), *events)


def _watched(rollout: Rollout, window: Merged) -> Decision:
    """Raise the alarm, once, when the endpoint breaks a guard's `at_most` after all. The version stays: its end is a person's decision.

    Windows that show nothing leave no row in the log: there would be one a second for the whole rollback window.
    """
    watch = judge.watch(rollout.watch, window, rollout.policy)
    after = replace(rollout, watch=watch)
    breach = judge.verdict(watch, rollout.policy).breach
    if not breach:
        return after, ()
    way_out = "it can be reverted" if rollout.revertible else "there is no version before it"
    reason = f"{breach}, since it completed; {way_out}"
    return replace(after, alarm=breach, reason=reason), (Alarmed(reason, judge.explain(watch, window, rollout.policy)),)


def _progress(rollout: Rollout, verdict: Verdict, seconds: float) -> Decision:
    """Hold while the baseline suffers, go on when the step has seen enough; nothing else."""
    if verdict.interference:
        suffered = rollout.evidence.interference_s + seconds
        rollout = replace(rollout, evidence=replace(rollout.evidence, interference_s=suffered))
        if suffered >= INTERFERENCE_S:
            return abort(rollout, Cause.INTERFERENCE, verdict.interference)
        if rollout.hold is None:
            return changed(rollout, replace(rollout, hold=Hold.INTERFERENCE), f"held: {verdict.interference}")
        return rollout, ()
    if rollout.hold is Hold.INTERFERENCE:
        calm = replace(rollout, hold=None, evidence=replace(rollout.evidence, interference_s=0.0))
        return changed(rollout, calm, "the baseline is itself again")
    if rollout.hold is not None or missing(rollout):
        return rollout, ()
    return _NEXT[rollout.state](rollout)


def _after_shadow(rollout: Rollout) -> Decision:
    shadow = rollout.evidence.shadow
    reason = f"{shadow.compared} answers compared, {shadow.different} different"
    return step_to(rollout, 0, reason)


def _after_step(rollout: Rollout) -> Decision:
    done = rollout.policy.steps[rollout.step]
    seen = f"{rollout.evidence.step_units} requests at {percent(done.weight)} without harm"
    if rollout.step + 1 < len(rollout.policy.steps):
        return step_to(rollout, rollout.step + 1, seen)
    route = route_of(rollout, FULL)
    reason = f"{seen}; shown to be no worse than each guard's margin"
    return move(rollout, State.COMPLETING, reason, route, revision=route.revision)


_NEXT: dict[State, Callable[[Rollout], Decision]] = {State.SHADOWING: _after_shadow, State.STEPPING: _after_step}


def missing(rollout: Rollout) -> str:
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
