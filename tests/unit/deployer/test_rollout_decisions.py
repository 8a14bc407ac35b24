"""The rollout's decisions, told as stories: what it is told, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from deployer.domain.decisions import decide
from deployer.domain.errors import CommandRefused
from deployer.domain.events import (
    Advanced,
    Alarmed,
    CanaryStarted,
    Completed,
    DeadlineSet,
    Event,
    Judged,
    Reverted,
    RolledBack,
    RouteSet,
    RouteWithdrawn,
    Superseded,
    WatchEnded,
)
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
from deployer.domain.judge import Evidence
from deployer.domain.moves import ACKNOWLEDGE_S
from deployer.domain.policy import OnDeadline, Policy, parse
from deployer.domain.rollout import Cause, Hold, Rollout, State
from deployer.domain.windows import Counts, Merged, ShadowCounts


def policy(**changes: Any) -> Policy:
    rollout: dict[str, Any] = {
        "shadow": {"share": 1.0, "requests": 20},
        "steps": [{"weight": "5%", "requests": 20}, {"weight": "50%", "requests": 40, "time": "5s"}],
        "guards": [
            {"bad": "error", "margin": "20%", "at_most": "40%"},
            {"bad": "latency_ms > 50", "margin": "20%"},
            {"bad": "shadow_difference", "at_most": "30%"},
        ],
        "rollback_window": "10m",
    }
    return parse({"endpoint": "e", "rollout": rollout | changes})


def fresh(wanted: Policy | None = None) -> Rollout:
    return Rollout(id="r1", endpoint="e", canary="v2-g2", policy=wanted or policy())


def tell(rollout: Rollout, *inputs: Input) -> tuple[Rollout, list[Event]]:
    told: list[Event] = []
    for given in inputs:
        rollout, events = decide(rollout, given)
        told.extend(events)
    return rollout, told


def at(state: State, wanted: Policy | None = None, step: int = 0) -> Rollout:
    """A rollout that has come to a state by the ordinary way."""
    rollout, _ = tell(fresh(wanted), Begin("v1-g1", 7), Loaded())
    if state is State.WARMING:
        return rollout
    rollout, _ = tell(rollout, Warmed())
    if state is State.SHADOWING:
        return rollout
    rollout, _ = tell(rollout, copies(rollout, compared=20))
    for _ in range(step):
        rollout, _ = tell(rollout, traffic(rollout, 20))
    if state is State.STEPPING:
        assert rollout.step == step
        return rollout
    for _ in range(400):
        rollout, _ = decide(rollout, traffic(rollout, 20))
    assert rollout.state is State.COMPLETING
    return rollout


def traffic(
    rollout: Rollout, canary: int, bad: int = 0, baseline: int = 100, baseline_bad: int = 0, guard: str = "error", **changes: Any
) -> Merged:
    merged = Merged(rollout.revision, 1.0, Counts(canary, {guard: bad}), Counts(baseline, {guard: baseline_bad}), ShadowCounts(), 1, False)
    return replace(merged, **changes)


def copies(rollout: Rollout, compared: int, different: int = 0, errors: int = 0, baseline_bad: int = 0) -> Merged:
    shadow = ShadowCounts(compared, different, errors)
    return traffic(rollout, 0, baseline=200, baseline_bad=baseline_bad, shadow=shadow)


def routes(events: list[Event]) -> list[RouteSet]:
    return [event for event in events if isinstance(event, RouteSet)]


def test_the_first_version_of_an_endpoint_gets_everything_at_once_and_completes_when_acknowledged() -> None:
    rollout, events = tell(fresh(), Begin(None, 0), Loaded(), Warmed())
    assert rollout.state is State.COMPLETING
    assert routes(events) == [RouteSet(1, (("v2-g2", 10_000),), (("v2-g2", 10_000),))]
    assert not any(isinstance(event, CanaryStarted) for event in events)
    rollout, events = tell(rollout, Acknowledged(0))
    assert rollout.state is State.COMPLETING
    rollout, events = tell(rollout, Acknowledged(1))
    assert rollout.state is State.COMPLETED
    assert any(isinstance(event, Completed) and event.first for event in events)
    assert not rollout.revertible


def test_a_good_version_walks_through_shadow_and_steps() -> None:
    rollout, events = tell(fresh(), Begin("v1-g1", 7), Loaded(), Warmed())
    assert rollout.state is State.SHADOWING
    assert routes(events)[-1] == RouteSet(8, (("v1-g1", 10_000), ("v2-g2", 0)), (("v1-g1", 10_000), ("v2-g2", 0)), shadow="v2-g2")
    rollout, events = tell(rollout, copies(rollout, compared=19))
    assert rollout.state is State.SHADOWING
    rollout, events = tell(rollout, copies(rollout, compared=1))
    assert (rollout.state, rollout.step, rollout.weight) == (State.STEPPING, 0, 500)
    assert routes(events)[-1] == RouteSet(9, (("v1-g1", 9_500), ("v2-g2", 500)), (("v1-g1", 10_000), ("v2-g2", 0)))
    assert CanaryStarted(500) in events
    rollout, events = tell(rollout, traffic(rollout, 20))
    assert (rollout.step, rollout.weight) == (1, 5000)
    assert any(isinstance(event, Advanced) and event.weight == 5000 for event in events)
    windows = 0
    while rollout.state is State.STEPPING and windows < 400:
        rollout, events = tell(rollout, traffic(rollout, 10))
        windows += 1
    assert rollout.state is State.COMPLETING
    # A margin of 20 % takes some windows to show, however good the canary is.
    assert windows > 5
    assert routes(events)[-1].weights == (("v2-g2", 10_000),)
    rollout, events = tell(rollout, Acknowledged(rollout.revision))
    assert rollout.state is State.COMPLETED
    assert rollout.revertible
    assert DeadlineSet(600.0) in events


def test_without_a_shadow_rule_the_canary_starts_at_once() -> None:
    rollout, events = tell(fresh(policy(shadow=None, guards=[{"bad": "error", "margin": "5%"}])), Begin("v1-g1", 7), Loaded(), Warmed())
    assert rollout.state is State.STEPPING
    assert CanaryStarted(500) in events


def test_a_step_needs_its_time_too() -> None:
    wanted = policy(steps=[{"weight": "5%", "requests": 5, "time": "3s"}, {"weight": "10%", "requests": 5}])
    rollout = at(State.STEPPING, wanted)
    for expected in (0, 0, 1):
        rollout, _ = tell(rollout, traffic(rollout, 100))
        assert rollout.step == expected


def test_a_gap_restarts_the_minimum_of_the_step_and_keeps_the_evidence() -> None:
    rollout = at(State.STEPPING)
    rollout, _ = tell(rollout, traffic(rollout, 15))
    rollout, _ = tell(rollout, traffic(rollout, 15, gap=True))
    assert rollout.step == 0
    assert rollout.evidence.step_units == 15
    assert rollout.evidence.windows == 3
    rollout, _ = tell(rollout, traffic(rollout, 5))
    assert rollout.step == 1


@pytest.mark.parametrize("guard", ["error", "latency_ms>50"])
def test_a_worse_canary_is_rolled_back(guard: str) -> None:
    rollout = at(State.STEPPING)
    windows = 0
    events: list[Event] = []
    while rollout.state is State.STEPPING and windows < 50:
        rollout, events = tell(rollout, traffic(rollout, 5, bad=3, guard=guard))
        windows += 1
    assert windows < 15
    assert (rollout.state, rollout.cause) == (State.ABORTING, Cause.HARM)
    assert f"{guard}: the canary is worse" in rollout.reason
    assert routes(events)[-1].weights == (("v1-g1", 10_000),)
    rollout, events = tell(rollout, Acknowledged(rollout.revision))
    assert rollout.state is State.ROLLED_BACK
    assert RolledBack(Cause.HARM, rollout.reason) in events


def test_harm_is_judged_while_paused_too() -> None:
    rollout, _ = tell(at(State.STEPPING), Pause("wait for the press"))
    for _ in range(20):
        rollout, _ = tell(rollout, traffic(rollout, 20, bad=20))
    assert rollout.cause is Cause.HARM


def test_copies_that_differ_too_often_end_the_rollout_before_it_had_traffic() -> None:
    rollout = at(State.SHADOWING, policy(shadow={"share": 1.0, "requests": 1000}))
    for _ in range(30):
        rollout, _ = tell(rollout, copies(rollout, compared=4, different=1, errors=6))
    assert (rollout.state, rollout.cause) == (State.ABORTING, Cause.HARM)
    assert "shadow answers differ" in rollout.reason


def test_copies_without_an_answer_are_not_progress() -> None:
    rollout = at(State.SHADOWING, policy(guards=[{"bad": "error", "margin": "5%"}]))
    for _ in range(30):
        rollout, _ = tell(rollout, copies(rollout, compared=0, errors=10))
    assert rollout.state is State.SHADOWING
    rollout, _ = tell(rollout, Deadline())
    assert rollout.hold is Hold.DEADLINE
    assert "0 of 20 shadow answers compared" in rollout.reason


def test_an_endpoint_that_is_bad_as_a_whole_stops_the_rollout_without_calling_it_harm() -> None:
    rollout = at(State.STEPPING)
    for _ in range(60):
        rollout, _ = tell(rollout, traffic(rollout, 10, bad=6, baseline=100, baseline_bad=60))
    assert rollout.cause is Cause.BREACH
    assert "endpoint as a whole" in rollout.reason


def test_a_baseline_that_gets_worse_holds_the_rollout_and_then_ends_it() -> None:
    wanted = policy(guards=[{"bad": "error", "margin": "10%"}], shadow={"share": 1.0, "requests": 40})
    rollout = at(State.SHADOWING, wanted)
    rollout, _ = tell(rollout, copies(rollout, compared=20), copies(rollout, compared=20))
    assert rollout.state is State.STEPPING
    suffering = traffic(rollout, 2, bad=1, baseline=100, baseline_bad=50)
    windows = 0
    while rollout.hold is None and windows < 100:
        rollout, _ = tell(rollout, replace(suffering, revision=rollout.revision))
        windows += 1
    assert rollout.hold is Hold.INTERFERENCE
    assert rollout.state is State.STEPPING
    for _ in range(61):
        rollout, _ = tell(rollout, replace(suffering, revision=rollout.revision))
    assert (rollout.state, rollout.cause) == (State.ABORTING, Cause.INTERFERENCE)


def test_a_baseline_that_recovers_lets_the_rollout_go_on() -> None:
    wanted = policy(guards=[{"bad": "error", "margin": "10%"}], shadow={"share": 1.0, "requests": 40})
    rollout = at(State.SHADOWING, wanted)
    rollout, _ = tell(rollout, copies(rollout, compared=20), copies(rollout, compared=20))
    while rollout.hold is None:
        rollout, _ = tell(rollout, traffic(rollout, 1, baseline=100, baseline_bad=50))
    rollout, _ = tell(rollout, *[traffic(rollout, 0, baseline=100)] * 40)
    assert rollout.hold is None
    assert rollout.evidence.interference_s == 0.0


def test_no_traffic_is_never_success() -> None:
    rollout = at(State.STEPPING)
    rollout, events = tell(rollout, *[traffic(rollout, 0, baseline=0)] * 500)
    assert (rollout.state, rollout.step) == (State.STEPPING, 0)
    rollout, events = tell(rollout, Deadline())
    assert rollout.hold is Hold.DEADLINE
    assert "0 of 20 canary requests seen at 5 %" in rollout.reason
    rollout, _ = tell(rollout, traffic(rollout, 100))
    assert rollout.step == 0
    rollout, events = tell(rollout, Resume("ann"))
    assert DeadlineSet(rollout.policy.deadline_s) in events
    rollout, _ = tell(rollout, traffic(rollout, 1))
    assert rollout.step == 1


def test_a_deadline_may_abort() -> None:
    rollout, _ = tell(at(State.STEPPING, policy(on_deadline="abort")), Deadline())
    assert rollout.policy.on_deadline is OnDeadline.ABORT
    assert (rollout.state, rollout.cause) == (State.ABORTING, Cause.DEADLINE)


def test_a_version_that_is_not_ready_at_the_deadline_is_given_up() -> None:
    rollout, events = tell(fresh(), Begin("v1-g1", 7), Deadline())
    assert (rollout.state, rollout.cause) == (State.ROLLED_BACK, Cause.DEADLINE)
    assert routes(events) == []


@pytest.mark.parametrize("cause", [Cause.RUNTIME, Cause.ARTIFACT])
@pytest.mark.parametrize("state", [State.PREPARING, State.WARMING])
def test_a_version_that_cannot_be_loaded_leaves_the_traffic_alone(cause: Cause, state: State) -> None:
    rollout, _ = tell(fresh(), Begin("v1-g1", 7))
    if state is State.WARMING:
        rollout, _ = tell(rollout, Loaded())
    rollout, events = tell(rollout, LoadFailed(cause, "unsupported opset 99"))
    assert (rollout.state, rollout.reason) == (State.ROLLED_BACK, "unsupported opset 99")
    assert RolledBack(cause, "unsupported opset 99") in events
    assert routes(events) == []
    assert rollout.revision == 7


@pytest.mark.parametrize("state", [State.WARMING, State.SHADOWING, State.STEPPING])
def test_a_runtime_that_restarts_under_a_rollout_ends_it(state: State) -> None:
    rollout, _ = tell(at(state), RuntimeRestarted("triton is empty"))
    assert rollout.cause is Cause.RUNTIME


def test_a_runtime_that_restarts_later_is_not_the_rollouts_business() -> None:
    completing = at(State.COMPLETING)
    assert decide(completing, RuntimeRestarted("triton is empty")) == (completing, ())


def test_paused_rollouts_stay_until_resumed() -> None:
    rollout, _ = tell(at(State.STEPPING), Pause("lunch"), Pause("lunch"))
    assert (rollout.hold, rollout.reason) == (Hold.PAUSED, "lunch")
    rollout, _ = tell(rollout, traffic(rollout, 100))
    assert rollout.step == 0
    rollout, _ = tell(rollout, Resume("ann"), Resume("ann"), traffic(rollout, 1))
    assert rollout.step == 1


def test_an_aborted_first_version_withdraws_its_route() -> None:
    rollout, _ = tell(fresh(), Begin(None, 4), Loaded(), Warmed())
    rollout, events = tell(rollout, Abort("wrong model"), Abort("wrong model"))
    assert (rollout.state, rollout.cause) == (State.ROLLED_BACK, Cause.OPERATOR)
    assert RouteWithdrawn(6) in events


def test_an_abort_ends_although_a_gateway_never_acknowledges() -> None:
    rollout, events = tell(at(State.STEPPING), Abort("no"))
    assert DeadlineSet(ACKNOWLEDGE_S) in events
    rollout, _ = tell(rollout, Deadline())
    assert rollout.state is State.ROLLED_BACK
    assert "not every gateway" in rollout.reason


def test_a_superseded_rollout_says_by_what() -> None:
    waiting, events = tell(fresh(), Supersede(3))
    assert waiting.state is State.SUPERSEDED
    assert Superseded(3) in events
    running, _ = tell(at(State.STEPPING), Supersede(3))
    assert running.state is State.ABORTING
    running, events = tell(running, Acknowledged(running.revision))
    assert running.state is State.SUPERSEDED
    assert Superseded(3) in events


def test_a_completed_rollout_can_be_reverted_within_its_window() -> None:
    rollout, _ = tell(at(State.COMPLETING), Acknowledged(99))
    rollout, events = tell(rollout, Revert("customers complain", 20), Revert("customers complain", 21))
    assert rollout.state is State.REVERTING
    assert routes(events) == [RouteSet(21, (("v1-g1", 10_000),), (("v1-g1", 10_000),))]
    assert decide(rollout, Acknowledged(20)) == (rollout, ())
    rollout, events = tell(rollout, Acknowledged(21))
    assert rollout.state is State.REVERTED
    assert any(isinstance(event, Reverted) for event in events)


def test_a_revert_ends_although_a_gateway_never_acknowledges() -> None:
    rollout, _ = tell(at(State.COMPLETING), Acknowledged(99), Revert("no", 20), Deadline())
    assert rollout.state is State.REVERTED


def test_after_its_window_a_rollout_cannot_be_reverted() -> None:
    rollout, _ = tell(at(State.COMPLETING), Acknowledged(99))
    rollout, events = tell(rollout, Deadline())
    assert WatchEnded() in events
    with pytest.raises(CommandRefused, match="its rollback window is over"):
        decide(rollout, Revert("too late", 20))


def test_a_refused_revert_says_why() -> None:
    first, _ = tell(fresh(), Begin(None, 0), Loaded(), Warmed(), Acknowledged(1))
    with pytest.raises(CommandRefused, match="first version, and there is none before it"):
        decide(first, Revert("x", 2))
    with pytest.raises(CommandRefused, match="only a completed rollout can be reverted; this one is stepping"):
        decide(at(State.STEPPING), Revert("x", 2))


def test_completing_holds_at_its_deadline_and_still_completes() -> None:
    rollout, _ = tell(at(State.COMPLETING), Deadline(), Deadline())
    assert (rollout.state, rollout.hold) == (State.COMPLETING, Hold.DEADLINE)
    assert "not every gateway" in rollout.reason
    rollout, _ = tell(rollout, Acknowledged(rollout.revision))
    assert rollout.state is State.COMPLETED


@pytest.mark.parametrize("command", [Pause("x"), Resume("x"), Revert("x", 1)])
def test_a_command_that_can_have_no_effect_is_refused(command: Command) -> None:
    with pytest.raises(CommandRefused):
        decide(fresh(), command)


def test_a_completed_rollout_is_not_aborted() -> None:
    rollout, _ = tell(at(State.COMPLETING), Acknowledged(99))
    with pytest.raises(CommandRefused, match="reverted, not aborted"):
        decide(rollout, Abort("x"))


def test_windows_of_another_revision_are_no_evidence() -> None:
    rollout = at(State.STEPPING)
    assert decide(rollout, traffic(rollout, 20, bad=20, revision=rollout.revision - 1)) == (rollout, ())


def test_every_window_is_explained() -> None:
    rollout = at(State.STEPPING)
    _, events = tell(rollout, traffic(rollout, 5, bad=1))
    (judged,) = [event for event in events if isinstance(event, Judged)]
    assert judged.detail["window"]["canary"] == {"units": 5, "bad": {"error": 1}}
    assert judged.detail["guards"]["error"]["harm"] > 1
    assert judged.detail["abort_at"] == pytest.approx(20)
    assert judged.logged


def test_of_a_held_rollout_only_windows_that_change_something_are_logged() -> None:
    rollout, _ = tell(at(State.STEPPING), Pause("lunch"), Deadline())
    for missing in (2, 0):  # two guards are shown to be met, perhaps by the same window
        shown = []
        for _ in range(400):
            rollout, (judged, *_) = decide(rollout, traffic(rollout, 20))
            assert isinstance(judged, Judged)
            shown.append(judged.logged)
        assert sum(shown) <= missing
        assert any(shown) is bool(missing)
    assert rollout.evidence.windows == 801
    logged = []
    while rollout.state is State.STEPPING:
        rollout, (judged, *_) = decide(rollout, traffic(rollout, 20, bad=20))
        assert isinstance(judged, Judged)
        logged.append(judged.logged)
    assert rollout.cause is Cause.HARM
    assert logged == [False] * (len(logged) - 1) + [True]


@pytest.mark.parametrize("late", [Begin("v1-g1", 7), Loaded(), Warmed(), LoadFailed(Cause.RUNTIME, "x"), Acknowledged(1)])
def test_what_comes_late_or_twice_changes_nothing(late: Input) -> None:
    rollout = at(State.STEPPING)
    assert decide(rollout, late) == (rollout, ())


def test_a_verdict_about_a_champion_that_is_no_longer_live_is_not_acted_on() -> None:
    judged = replace(fresh(), champion=1)
    rollout, events = tell(judged, Begin("v3-g3", 9, live=3))
    assert (rollout.state, rollout.cause, rollout.superseded_by, rollout.stale) == (State.SUPERSEDED, Cause.SUPERSEDED, 3, True)
    assert Superseded(3) in events
    assert rollout.reason == "judged against version 1, but version 3 is live now: to be evaluated again"
    assert not routes(events)
    # Its turn comes once.
    assert decide(rollout, Begin("v3-g3", 9, live=3)) == (rollout, ())


def test_a_second_version_that_was_judged_before_there_was_a_champion_is_judged_again() -> None:
    rollout, _ = tell(replace(fresh(), champion=0), Begin("v1-g1", 2, live=1))
    assert rollout.stale
    assert "judged against no champion, but version 1 is live now" in rollout.reason


@pytest.mark.parametrize(
    ("champion", "baseline", "live"),
    [
        (1, "v1-g1", 1),  # as it was judged
        (0, None, 0),  # the first version
        (1, None, 0),  # the champion serves no longer: there is nothing to be judged against
        (0, "v7-g1", 0),  # another model's version, whose numbers say nothing
        (None, "v3-g3", 3),  # an admin passed the gates by
    ],
)
def test_a_verdict_that_stands_is_acted_on(champion: int | None, baseline: str | None, live: int) -> None:
    rollout, _ = tell(replace(fresh(), champion=champion), Begin(baseline, 2, live))
    assert (rollout.state, rollout.stale) == (State.PREPARING, False)


def completed(wanted: Policy | None = None) -> Rollout:
    rollout = at(State.COMPLETING, wanted, step=1)
    rollout, _ = tell(rollout, Acknowledged(rollout.revision))
    assert rollout.state is State.COMPLETED
    return rollout


def alone(rollout: Rollout, units: int, bad: int = 0, guard: str = "error") -> Merged:
    return traffic(rollout, units, bad, baseline=0, guard=guard)


def test_a_completed_version_is_watched_and_an_alarm_is_raised_once() -> None:
    rollout = completed()
    assert (rollout.judged, rollout.watch) == (True, Evidence())
    proven = rollout.evidence
    told: list[Event] = []
    for _ in range(60):
        rollout, events = tell(rollout, alone(rollout, 100, 90))
        told += events
    (alarm,) = told
    assert isinstance(alarm, Alarmed)
    assert "error: bad are 90.0% of" in alarm.reason
    assert "more than 40.0%" in alarm.reason
    assert "it can be reverted" in alarm.reason
    assert alarm.detail["guards"]["error"]["breach"] >= alarm.detail["abort_at"]
    # It stays where it is, and what the rollout had seen stays to be read.
    assert (rollout.state, rollout.weight, rollout.evidence) == (State.COMPLETED, 10_000, proven)
    assert rollout.alarm
    assert not rollout.judged
    rollout, _ = tell(rollout, Revert("bad", rollout.revision))
    assert rollout.state is State.REVERTING


def test_a_completed_version_within_its_bounds_raises_no_alarm() -> None:
    rollout = completed()
    for _ in range(300):
        rollout, events = tell(rollout, alone(rollout, 20, 7))
        assert events == []
    assert rollout.watch.windows == 300
    # A guard without a bound of its own has nothing to break.
    for _ in range(300):
        rollout, events = tell(rollout, alone(rollout, 20, 20, guard="latency_ms>50"))
        assert events == []


def test_the_first_version_is_watched_for_as_long_and_never_taken_away() -> None:
    rollout, events = tell(fresh(), Begin(None, 0), Loaded(), Warmed(), Acknowledged(1))
    assert DeadlineSet(600.0) in events
    assert rollout.judged
    for _ in range(60):
        rollout, _ = tell(rollout, alone(rollout, 20, 20))
    assert "there is no version before it" in rollout.reason
    assert (rollout.state, rollout.weight) == (State.COMPLETED, 10_000)
    with pytest.raises(CommandRefused):
        decide(rollout, Revert("x", 1))


def test_a_watch_ends_with_the_rollback_window() -> None:
    rollout, events = tell(completed(), Deadline())
    assert events == [WatchEnded(), DeadlineSet(None)]
    assert (rollout.watched, rollout.revertible, rollout.judged) == (False, False, False)
    assert decide(rollout, alone(rollout, 20, 20)) == (rollout, ())
    assert decide(rollout, Deadline()) == (rollout, ())


def test_without_a_bound_there_is_nothing_to_watch() -> None:
    unbounded = policy(guards=[{"bad": "error", "margin": "20%"}, {"bad": "shadow_difference", "at_most": "30%"}])
    assert not completed(unbounded).judged
    first, events = tell(fresh(unbounded), Begin(None, 0), Loaded(), Warmed(), Acknowledged(1))
    assert DeadlineSet(None) in events
    assert not first.judged
    # The version before is kept all the same.
    assert completed(unbounded).revertible
