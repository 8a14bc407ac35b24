"""What an endpoint keeps of its rollouts: who serves, what stays loaded, who is watched, whose turn it is."""

from __future__ import annotations

from dataclasses import replace

from deployer.domain import endpoint as endpoints
from deployer.domain.decisions import decide
from deployer.domain.endpoint import Endpoint
from deployer.domain.inputs import Abort, Acknowledged, Begin, Deadline, Input, Loaded, Revert, Warmed
from deployer.domain.policy import parse
from deployer.domain.rollout import Rollout, State
from deployer.domain.windows import Merger, Window

POLICY = parse({"endpoint": "e", "rollout": {"shadow": {"share": 1.0, "requests": 4}}})


def tell(endpoint: Endpoint, rollout: Rollout, *told: Input) -> tuple[Endpoint, Rollout]:
    for given in told:
        rollout, events = decide(rollout, given)
        endpoint = endpoints.apply(endpoint, rollout, events)
    return endpoint, rollout


def turn(endpoint: Endpoint, rollout: Rollout, live: int = 0) -> tuple[Endpoint, Rollout]:
    waiting, displaced = endpoints.enqueue(endpoint, rollout.id)
    assert displaced is None
    started = endpoints.begin(waiting, live)
    assert started is not None
    return tell(started[0], rollout, started[1])


def first() -> tuple[Endpoint, Rollout]:
    endpoint, rollout = turn(Endpoint("e"), Rollout("r1", "e", "v1-g1", POLICY, champion=0))
    return tell(endpoint, rollout, Loaded(), Warmed(), Acknowledged(1))


def second() -> tuple[Endpoint, Rollout]:
    endpoint, _ = first()
    endpoint, rollout = turn(endpoint, Rollout("r2", "e", "v2-g2", POLICY, champion=1), live=1)
    endpoint, rollout = tell(endpoint, rollout, Loaded(), Warmed())
    # As after a walk through its steps.
    rollout = replace(rollout, state=State.COMPLETING)
    return tell(endpoint, rollout, Acknowledged(rollout.revision))


def test_a_completed_version_serves_is_watched_and_keeps_the_one_before() -> None:
    endpoint, _ = first()
    assert (endpoint.serving, endpoint.previous, endpoint.live, endpoint.watching) == ("v1-g1", None, None, "r1")
    endpoint, _ = second()
    assert (endpoint.serving, endpoint.previous, endpoint.live, endpoint.watching) == ("v2-g2", "v1-g1", None, "r2")


def test_the_end_of_the_window_ends_the_watch_and_lets_the_one_before_go() -> None:
    endpoint, rollout = second()
    endpoint, _ = tell(endpoint, rollout, Deadline())
    assert (endpoint.serving, endpoint.previous, endpoint.watching) == ("v2-g2", None, None)


def test_the_window_of_an_earlier_version_says_nothing_about_what_serves_now() -> None:
    _, earlier = first()
    endpoint, _ = second()
    after, _ = tell(endpoint, earlier, Deadline())
    assert after == endpoint


def test_a_revert_runs_ends_the_watch_and_gives_the_endpoint_back() -> None:
    endpoint, rollout = second()
    endpoint, rollout = tell(endpoint, rollout, Revert("worse than thought", endpoint.revision))
    assert (endpoint.live, endpoint.watching, endpoint.serving) == ("r2", None, "v2-g2")
    assert endpoints.begin(replace(endpoint, waiting="r3")) is None
    endpoint, rollout = tell(endpoint, rollout, Acknowledged(endpoint.revision))
    assert rollout.state is State.REVERTED
    assert (endpoint.live, endpoint.serving, endpoint.previous) == (None, "v1-g1", None)


def test_the_next_rollout_ends_the_watch_with_its_first_route_and_not_before() -> None:
    endpoint, _ = first()
    endpoint, rollout = turn(endpoint, Rollout("r2", "e", "v2-g2", POLICY, champion=1), live=1)
    assert endpoint.watching == "r1"
    failed, _ = tell(endpoint, rollout, Abort("never mind"))
    assert (failed.live, failed.watching) == (None, "r1")
    shadowing, _ = tell(endpoint, rollout, Loaded(), Warmed())
    assert (shadowing.live, shadowing.watching) == ("r2", None)


def test_a_verdict_that_is_out_of_date_leaves_everything_as_it_was() -> None:
    before, _ = first()
    endpoint, rollout = turn(before, Rollout("r2", "e", "v2-g2", POLICY, champion=0), live=1)
    assert (rollout.state, rollout.stale) == (State.SUPERSEDED, True)
    assert endpoint == before
    assert endpoints.begin(endpoint) is None
    assert decide(rollout, Begin("v1-g1", 1, 1)) == (rollout, ())


def test_windows_in_which_nobody_was_judged_are_a_gap() -> None:
    merger = Merger(1, alone=True)

    def merged_gap() -> bool:
        (merged,) = merger.add(Window("a", 1, 1.0, canary=replace(Window("a", 1, 1.0).canary, units=4)), {"a"})
        return merged.gap

    assert [merged_gap(), merged_gap()] == [True, False]
    merger.interrupted()
    assert [merged_gap(), merged_gap()] == [True, False]
