"""Whatever happens to an endpoint, in whatever order: weights sum to 10,000, one rollout runs, and every state has a way out."""

from __future__ import annotations

import itertools
from dataclasses import replace

from deployer.domain import endpoint as endpoints
from deployer.domain.decisions import decide
from deployer.domain.endpoint import Endpoint
from deployer.domain.errors import CommandRefused
from deployer.domain.events import CanaryStarted, Completed, RouteSet, RouteWithdrawn
from deployer.domain.grammar import FULL
from deployer.domain.inputs import (
    Abort,
    Acknowledged,
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
from deployer.domain.policy import parse
from deployer.domain.rollout import ENDED, LIVE, Cause, Rollout, State
from deployer.domain.windows import Counts, Merged, ShadowCounts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

POLICIES = [
    parse(
        {
            "endpoint": "e",
            "rollout": {
                "shadow": shadow,
                "steps": [{"weight": "5%", "requests": 4}, {"weight": "50%", "requests": 8}],
                "guards": [{"bad": "error", "margin": "50%", "at_most": "60%"}],
                "on_deadline": on_deadline,
            },
        }
    )
    for shadow in (None, {"share": "100%", "requests": 4})
    for on_deadline in ("hold", "abort")
]


HAPPENINGS: list[Input] = [
    Loaded(),
    Warmed(),
    Deadline(),
    RuntimeRestarted("x"),
    LoadFailed(Cause.RUNTIME, "x"),
    Acknowledged(0),
    Pause("x"),
    Resume("x"),
    Abort("x"),
    Supersede(99),
]


class EndpointMachine(RuleBasedStateMachine):
    """One endpoint with all rollouts it ever had, told anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.endpoint = Endpoint("e")
        self.rollouts: dict[str, Rollout] = {}
        self.ids = itertools.count(1)
        self.route: RouteSet | None = None
        self.canary_requests: dict[str, int] = {}

    def tell(self, rollout_id: str, given: Input) -> None:
        before = self.rollouts[rollout_id]
        after, events = decide(before, given)
        assert decide(before, given) == (after, events)
        self.rollouts[rollout_id] = after
        for event in events:
            match event:
                case RouteSet():
                    assert event.revision == self.endpoint.revision + 1
                    assert sum(weight for _, weight in event.weights) == FULL
                    assert sum(weight for _, weight in event.fallback) == FULL
                    assert all(0 <= weight <= FULL for _, weight in event.weights)
                    assert {arm for arm, _ in event.weights} <= {after.canary, after.baseline}
                    self.route = event
                case RouteWithdrawn():
                    assert before.baseline is None
                    self.route = None
                case CanaryStarted():
                    assert before.baseline is not None
                case Completed():
                    assert event.first == (before.baseline is None)
                    assert isinstance(given, Acknowledged)
                    # No traffic is never success.
                    assert event.first or self.canary_requests.get(rollout_id, 0) >= 12
            self.endpoint = endpoints.apply(self.endpoint, after, (event,))

    def live(self) -> int:
        return 0 if self.endpoint.serving is None else int(self.endpoint.serving.split("-g")[1])

    def running(self) -> Rollout | None:
        return self.rollouts[self.endpoint.live] if self.endpoint.live else None

    @initialize()
    def begin_with_a_version(self) -> None:
        self.promote(0)
        self.begin()

    @rule(policy=st.integers(0, len(POLICIES) - 1), bound=st.booleans())
    def promote(self, policy: int, bound: bool = True) -> None:
        number = next(self.ids)
        champion = self.live() if bound else None
        rollout = Rollout(id=f"r{number}", endpoint="e", canary=f"v{number}-g{number}", policy=POLICIES[policy], champion=champion)
        self.rollouts[rollout.id] = rollout
        self.endpoint, displaced = endpoints.enqueue(self.endpoint, rollout.id)
        if displaced is not None:
            self.tell(displaced, Supersede(number))
            assert self.rollouts[displaced].state is State.SUPERSEDED

    @rule()
    def begin(self) -> None:
        started = endpoints.begin(self.endpoint, live=self.live())
        if started is not None:
            self.endpoint, turn = started
            assert self.endpoint.live is not None
            begun = self.rollouts[self.endpoint.live]
            self.tell(begun.id, turn)
            begun = self.rollouts[begun.id]
            # A verdict about another version than the live one starts nothing, and one about the live one is never called out of date.
            assert begun.stale is (begun.champion not in (None, turn.live) and turn.live != 0)
            assert begun.state is (State.SUPERSEDED if begun.stale else State.PREPARING)

    @precondition(lambda self: self.running() is not None)
    @rule(given=st.sampled_from(HAPPENINGS))
    def happens(self, given: Input) -> None:
        running = self.running()
        assert running is not None
        try:
            self.tell(running.id, given)
        except CommandRefused:
            assert isinstance(given, Pause | Resume | Abort | Supersede)

    @precondition(lambda self: self.running() is not None)
    @rule()
    def go_on(self) -> None:
        """What happens when nothing goes wrong, so that the machine also gets far."""
        running = self.running()
        assert running is not None
        match running.state:
            case State.PREPARING:
                self.tell(running.id, Loaded())
            case State.WARMING:
                self.tell(running.id, Warmed())
            case State.SHADOWING | State.STEPPING:
                for _ in range(30):
                    self.window(20, 0, 0, old=False)
            case _:
                self.tell(running.id, Acknowledged(self.endpoint.revision))

    @precondition(lambda self: self.running() is not None)
    @rule(canary=st.integers(0, 20), bad=st.integers(0, 20), baseline_bad=st.integers(0, 20), old=st.booleans())
    def window(self, canary: int, bad: int, baseline_bad: int, old: bool) -> None:
        running = self.running()
        assert running is not None
        revision = running.revision - 1 if old else running.revision
        if running.state is State.SHADOWING:
            merged = Merged(revision, 1.0, Counts(), Counts(40), ShadowCounts(canary, min(bad, canary)), 1, False)
        else:
            merged = Merged(revision, 1.0, Counts(canary, {"error": bad}), Counts(40, {"error": baseline_bad}), ShadowCounts(), 1, False)
            if running.state is State.STEPPING and not old:
                self.canary_requests[running.id] = self.canary_requests.get(running.id, 0) + canary
        self.tell(running.id, merged)

    @precondition(lambda self: self.endpoint.live is None and any(r.revertible for r in self.rollouts.values()))
    @rule()
    def revert(self) -> None:
        newest = [r for r in self.rollouts.values() if r.revertible and r.canary == self.endpoint.serving]
        if newest:
            self.tell(newest[-1].id, Revert("x", self.endpoint.revision))

    @precondition(lambda self: self.endpoint.watching is not None)
    @rule(bad=st.integers(0, 40))
    def watched_traffic(self, bad: int) -> None:
        watching = self.rollouts[self.endpoint.watching or ""]
        for _ in range(20):
            self.tell(watching.id, Merged(watching.revision, 1.0, Counts(40, {"error": bad}), Counts(), ShadowCounts(), 1, False))
        assert self.rollouts[watching.id].state is State.COMPLETED

    @precondition(lambda self: self.endpoint.live is None)
    @rule()
    def rollback_window_ends(self) -> None:
        for rollout in list(self.rollouts.values()):
            if rollout.revertible or rollout.watched:
                self.tell(rollout.id, Deadline())
        assert self.endpoint.watching is None
        assert self.endpoint.previous is None

    @invariant()
    def one_rollout_runs_and_one_waits(self) -> None:
        live = [r.id for r in self.rollouts.values() if r.state in LIVE]
        assert live == ([self.endpoint.live] if self.endpoint.live else [])
        waiting = [r.id for r in self.rollouts.values() if r.state is State.WAITING]
        assert waiting == ([self.endpoint.waiting] if self.endpoint.waiting else [])

    @invariant()
    def who_is_watched_serves_by_its_own_route(self) -> None:
        if self.endpoint.watching is not None:
            watching = self.rollouts[self.endpoint.watching]
            assert (watching.state, watching.watched, watching.canary) == (State.COMPLETED, True, self.endpoint.serving)
            assert watching.revision == self.endpoint.revision

    @invariant()
    def the_route_is_the_endpoints(self) -> None:
        if self.endpoint.live is None and self.endpoint.serving is not None:
            assert self.route is not None
            assert self.route.weights == ((self.endpoint.serving, FULL),)

    @invariant()
    def every_state_has_a_way_out(self) -> None:
        """Nobody need do anything but wait for a deadline, or give up: then it ends."""
        for rollout in self.rollouts.values():
            if rollout.state in ENDED:
                continue
            if rollout.state is State.REVERTING:
                after, _ = decide(rollout, Deadline())
            else:
                after, _ = decide(rollout, Abort("give up"))
                after, _ = decide(after, Deadline())
            assert after.state in ENDED

    @invariant()
    def holds_are_only_where_there_is_something_to_hold(self) -> None:
        for rollout in self.rollouts.values():
            assert rollout.hold is None or rollout.state in (State.SHADOWING, State.STEPPING, State.COMPLETING)

    @invariant()
    def shares_never_exceed_the_policy(self) -> None:
        for rollout in self.rollouts.values():
            if rollout.state is State.STEPPING:
                assert self.route is not None
                assert dict(self.route.weights)[rollout.canary] == rollout.policy.steps[rollout.step].weight
                assert replace(rollout, step=0).weight <= FULL // 2


TestEndpointMachine = EndpointMachine.TestCase
TestEndpointMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
