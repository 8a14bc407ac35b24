"""Traffic windows: by arrival, as assigned, decided at the latest when the limits have passed, and never with more bad than requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from contracts.gateway.v1 import events_pb2 as gateway_pb
from eventing.besteffort import BestEffortProducer
from gateway.callers import CallerBook
from gateway.metrics import Metrics
from gateway.plane import DataPlane
from gateway.routes import WHOLE, ArmSpec, Assign, GuardKind, GuardSpec, Role, Route, RouteSpec
from gateway.traffic import TrafficPublisher
from gateway.windows import BUCKETS, CALLER_HORIZON_S, ArmReport, EndpointReport, Report, WindowBook
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from opentelemetry.metrics import NoOpMeterProvider
from servicekit.clock import FakeClock

from tests.unit.gateway.conftest import until

ERROR = GuardSpec("error", GuardKind.ERROR)
SLOW = GuardSpec("slow", GuardKind.LATENCY, 0.05)
DIFFERENT = GuardSpec("different", GuardKind.SHADOW_DIFFERENCE)


def route(revision: int = 1, *, guards: Sequence[GuardSpec] = (ERROR, SLOW), endpoint: str = "flights", **more: Any) -> Route:
    arms = tuple(
        ArmSpec(name, role, "triton", "h:1", f"m-{name}", "m", number, weight, 0)
        for number, (name, role, weight) in enumerate((("v1", Role.BASELINE, WHOLE - 500), ("v2", Role.CANARY, 500)), start=1)
    )
    values: dict[str, Any] = {"rollout_id": "r1", "in_rollout": True, "window_s": 0.25} | more
    spec = RouteSpec(endpoint, revision, revision, arms=arms, guards=tuple(guards), **values)
    return Route(spec, lambda arm: None, unjudged=False)  # type: ignore[arg-type, return-value]  # no state is needed here


def arms(reports: Sequence[Report], name: str) -> list[ArmReport]:
    return [arm for report in reports for endpoint in report.endpoints for arm in endpoint.arms if arm.arm == name]


def test_a_window_is_reported_when_its_last_request_is_decided() -> None:
    book, one = WindowBook(), route()
    book.switch("flights", one, 100.0)
    counts = one.arms["v1"].counts
    counts.assigned()
    assert book.tick(100.1) != []  # the revision is announced
    assert book.tick(100.26) == []
    assert one.arms["v1"].counts is not counts
    counts.answered(one, 0.02)
    (report,) = book.tick(100.27)
    assert report.duration_s == pytest.approx(0.26)
    (first,) = arms([report], "v1")
    assert (first.requests, first.bad, sum(first.buckets)) == (1, {"error": 0, "slow": 0}, 1)


def test_what_is_unanswered_when_the_limit_has_passed_is_bad_and_not_counted_again() -> None:
    book, one = WindowBook(), route()
    book.switch("flights", one, 100.0)
    late = one.arms["v2"].counts
    for _ in range(3):
        late.assigned()
    assert arms(book.tick(100.25), "v2") == []
    (reported,) = arms(book.tick(100.31), "v2")
    assert (reported.requests, reported.bad) == (3, {"error": 0, "slow": 3})
    late.answered(one, 3.0)
    late.failed(one, "v2", 5.0, fallback=True)
    late.left(one, 5.0)
    one.arms["v2"].counts.assigned()
    one.arms["v2"].counts.answered(one, 0.001)
    (following,) = arms(book.tick(100.5), "v2")
    # The error that became known late is told with the next window that has room for it.
    assert (following.requests, following.bad, following.errors, following.fallbacks) == (1, {"error": 1, "slow": 0}, 1, 1)
    assert sum(following.buckets) == 3


def test_without_a_latency_guard_a_window_waits_for_its_time_outs() -> None:
    book, one = WindowBook(), route(guards=(ERROR,), timeout_s=5.0)
    book.switch("flights", one, 100.0)
    counts = one.arms["v2"].counts
    counts.assigned()
    assert arms(book.tick(104.9), "v2") == []
    counts.failed(one, "v2", 5.0, fallback=True)
    first, *_ = arms(book.tick(105.1), "v2")
    assert (first.requests, first.bad) == (1, {"error": 1})


def test_windows_are_reported_in_order() -> None:
    book, one = WindowBook(), route(guards=(ERROR,), timeout_s=5.0)
    book.switch("flights", one, 100.0)
    stuck = one.arms["v2"].counts
    stuck.assigned()
    book.tick(100.25)
    one.arms["v2"].counts.assigned()
    one.arms["v2"].counts.answered(one, 0.001)
    one.arms["v2"].counts.assigned()
    one.arms["v2"].counts.answered(one, 0.001)
    assert arms(book.tick(100.5), "v2") == []
    stuck.answered(one, 0.4)
    assert [arm.requests for arm in arms(book.tick(100.6), "v2")] == [1, 2]


def test_requests_at_fault_and_clients_that_left_early_are_not_counted() -> None:
    book, one = WindowBook(), route()
    book.switch("flights", one, 100.0)
    counts = one.arms["v1"].counts
    for _ in range(4):
        counts.assigned()
    counts.not_counted()
    counts.left(one, 0.01)
    counts.left(one, 0.06)
    counts.answered(one, 0.01)
    (reported,) = arms(book.tick(100.25), "v1")
    assert (reported.requests, reported.bad) == (2, {"error": 0, "slow": 1})


def test_zero_traffic_is_reported_too() -> None:
    book, one = WindowBook(), route()
    book.switch("flights", one, 100.0)
    (reported,) = arms(book.tick(100.25), "v1")
    assert (reported.requests, reported.bad) == (0, {"error": 0, "slow": 0})


def test_a_new_revision_ends_the_window_and_is_named_last() -> None:
    book, old = WindowBook(), route(1)
    book.switch("flights", old, 100.0)
    old.arms["v1"].counts.assigned()
    book.switch("other", route(9, endpoint="other"), 100.0)
    book.switch("flights", route(2), 100.1)
    (announcement,) = book.tick(100.1)
    assert [(one.endpoint, one.revision, one.arms) for one in announcement.endpoints] == [("other", 9, ()), ("flights", 2, ())]
    reports = book.tick(100.16)
    ((flights_then, other, flights_now),) = [report.endpoints for report in reports]
    assert (flights_then.revision, len(flights_then.arms)) == (1, 2)
    assert (flights_now.revision, flights_now.arms) == (2, ())
    assert (other.endpoint, other.arms) == ("other", ())
    assert reports[0].duration_s == pytest.approx(0.1)
    # Nothing of the old revision comes any more.
    later = [one for report in book.tick(100.3) for one in report.endpoints if one.endpoint == "flights"]
    assert {one.revision for one in later} == {2}


def test_outside_a_rollout_windows_are_a_second_and_membership_is_told_without_any() -> None:
    book = WindowBook()
    assert [report.endpoints for report in book.tick(1.0, membership=True)] == [()]
    book.switch("flights", route(in_rollout=False), 100.0)
    book.tick(100.0)
    assert book.next_due(100.0) == pytest.approx(101.0)
    assert book.tick(100.5) == []
    assert len(arms(book.tick(101.0), "v1")) == 1
    book.switch("flights", None, 101.5)
    book.tick(101.5)
    assert [report.endpoints for report in book.tick(102.0, membership=True)] == [()]


def test_leaving_tells_what_is_there_and_counts_no_limit_that_has_not_passed() -> None:
    book, one = WindowBook(), route()
    book.switch("flights", one, 100.0)
    one.arms["v1"].counts.assigned()
    (last,) = arms(book.finish(100.01), "v1")
    assert (last.requests, last.bad["slow"]) == (1, 0)


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0002, 0), (0.00025, 1), (0.0007, 2), (0.001, 3), (0.1, 9), (16.384, 17), (1e6, 17)])
def test_latencies_fall_into_their_buckets(seconds: float, bucket: int) -> None:
    one = route()
    WindowBook().switch("flights", one, 0.0)
    counts = one.arms["v1"].counts
    book = WindowBook()
    book.switch("flights", one, 0.0)
    counts = one.arms["v1"].counts
    counts.assigned()
    counts.answered(one, seconds)
    assert counts.buckets == [int(index == bucket) for index in range(BUCKETS)]


class Requests(RuleBasedStateMachine):
    """Any order of arrivals, answers, failures and ticks: every request and every failure is told once, and bad never exceeds requests."""

    open_requests = Bundle("open_requests")

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.book = WindowBook()
        self.route = route()
        self.book.switch("flights", self.route, self.now)
        self.reported: list[ArmReport] = []
        self.assigned = self.failures = self.uncounted = 0

    @rule(target=open_requests)
    def arrive(self) -> tuple[Any, float]:
        counts = self.route.arms["v2"].counts
        counts.assigned()
        self.assigned += 1
        return counts, self.now

    @rule(one=consumes(open_requests), fails=st.booleans())
    def end(self, one: tuple[Any, float], fails: bool) -> None:
        counts, arrived = one
        if fails:
            counts.failed(self.route, "v2", self.now - arrived, fallback=False)
            self.failures += 1
        else:
            counts.answered(self.route, self.now - arrived)

    @rule(one=consumes(open_requests))
    def blame(self, one: tuple[Any, float]) -> None:
        self.uncounted += one[0].open
        one[0].not_counted()

    @rule(seconds=st.sampled_from([0.001, 0.03, 0.06, 0.25, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.reported += arms(self.book.tick(self.now), "v2")

    @invariant()
    def never_more_bad_than_requests(self) -> None:
        assert all(0 <= count <= arm.requests for arm in self.reported for count in arm.bad.values())

    def teardown(self) -> None:
        # Enough windows with room for what became known late.
        for _ in range(self.failures + 2):
            counts = self.route.arms["v2"].counts
            counts.assigned()
            counts.answered(self.route, 0.0)
            self.assigned += 1
            self.now += 0.4
            self.reported += arms(self.book.tick(self.now), "v2")
        self.reported += arms(self.book.finish(self.now + 1), "v2")
        assert sum(arm.requests for arm in self.reported) == self.assigned - self.uncounted
        assert sum(arm.bad["error"] for arm in self.reported) == self.failures
        assert sum(arm.errors for arm in self.reported) == self.failures


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Callers


def caller_route(revision: int = 1, **more: Any) -> Route:
    return route(revision, assign=Assign.CALLER, **more)


def test_a_caller_counts_once_in_the_window_of_its_first_request() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    for number in range(3):
        callers.account(one, arm, b"alice", b"", 100.0 + number / 100, may_name=False).answered(one, 0.01)
    callers.account(one, arm, b"bob", b"", 100.1, may_name=False).answered(one, 0.06)
    book.tick(100.3)
    # A later window: alice is bad now, which belongs to her first window; carol is new.
    callers.account(one, arm, b"alice", b"", 100.4, may_name=False).failed(one, "v2", 0.01, fallback=True)
    callers.account(one, arm, b"alice", b"", 100.4, may_name=False).failed(one, "v2", 0.01, fallback=True)
    callers.account(one, arm, b"carol", b"", 100.4, may_name=False).answered(one, 0.01)
    assert arms(book.tick(100.6), "v2") == []
    first, second, *_ = arms(book.tick(101 + CALLER_HORIZON_S), "v2")
    assert (first.requests, first.bad) == (2, {"error": 1, "slow": 1})
    assert (second.requests, second.bad, second.errors, second.fallbacks) == (1, {"error": 0, "slow": 0}, 2, 2)


def test_beyond_the_horizon_a_caller_is_judged_no_more() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    callers.account(one, arm, b"alice", b"", 100.0, may_name=False).answered(one, 0.01)
    book.tick(100.3)
    callers.account(one, arm, b"alice", b"", 100.1 + CALLER_HORIZON_S, may_name=False).failed(one, "v2", 0.01, fallback=False)
    first, *_ = arms(book.tick(101 + CALLER_HORIZON_S), "v2")
    assert (first.requests, first.bad["error"]) == (1, 0)


def test_callers_are_known_over_the_steps_of_a_rollout_and_anew_in_the_next() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route(1)
    book.switch("flights", one, 100.0)
    callers.account(one, one.arms["v2"], b"alice", b"", 100.0, may_name=False).answered(one, 0.01)
    two = caller_route(2)
    book.switch("flights", two, 100.2)
    callers.account(two, two.arms["v2"], b"alice", b"", 100.2, may_name=False).answered(two, 0.01)
    callers.account(two, two.arms["v1"], b"alice", b"", 100.2, may_name=False).answered(two, 0.01)
    assert (two.arms["v2"].counts.requests, two.arms["v1"].counts.requests) == (0, 1)
    three = caller_route(3, rollout_id="r2")
    book.switch("flights", three, 100.4)
    callers.account(three, three.arms["v2"], b"alice", b"", 100.4, may_name=False).answered(three, 0.01)
    assert three.arms["v2"].counts.requests == 1


def test_a_caller_whose_only_request_was_at_fault_is_counted_when_it_sends_a_good_one() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    callers.account(one, arm, b"alice", b"", 100.0, may_name=False).not_counted()
    assert arm.counts.requests == 0
    callers.account(one, arm, b"alice", b"", 100.1, may_name=False).left(one, 0.2)
    assert (arm.counts.requests, arm.counts.bad[1]) == (1, 1)


def test_made_up_names_are_no_evidence() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    for number in range(100):
        callers.account(one, arm, b"genuine-%d" % number, b"", 100.0, may_name=False).failed(one, "v2", 0.01, fallback=True)
    for number in range(10_000):
        callers.account(one, arm, b"mallory", b"made-up-%d" % number, 100.1, may_name=False).answered(one, 0.01)
    assert (arm.counts.requests, arm.counts.bad[0]) == (100, 100)
    # Without a name mallory is one caller, as everybody is.
    for _ in range(10):
        callers.account(one, arm, b"mallory", b"", 100.1, may_name=False).answered(one, 0.01)
    assert arm.counts.requests == 101


def test_a_granted_key_names_callers() -> None:
    book, callers, one = WindowBook(), CallerBook(), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    for number in range(6):
        callers.account(one, arm, b"shop", b"customer-%d" % (number % 3), 100.0, may_name=True).answered(one, 0.01)
    assert arm.counts.requests == 3


@pytest.mark.parametrize("may_name", [True, False])
def test_nobody_pushes_the_callers_of_others_out_of_the_book(caplog: pytest.LogCaptureFixture, may_name: bool) -> None:
    book, callers, one = WindowBook(), CallerBook(max_callers=10), caller_route()
    book.switch("flights", one, 100.0)
    arm = one.arms["v2"]
    for number in range(100):
        callers.account(one, arm, b"mallory", b"made-up-%d" % number, 100.0, may_name=may_name).answered(one, 0.01)
    own = arm.counts.requests
    assert own == (10 if may_name else 0)
    for number in range(1000):
        callers.account(one, arm, b"genuine-%d" % number, b"", 100.1, may_name=False).failed(one, "v2", 0.01, fallback=True)
    for number in range(10):
        callers.account(one, arm, b"shop", b"customer-%d" % number, 100.1, may_name=True).failed(one, "v2", 0.01, fallback=True)
    assert (arm.counts.requests - own, arm.counts.bad[0], arm.counts.errors) == (1010, 1010, 1010)
    assert caplog.text.count("names more callers") == may_name


# Publishing


class Sent(BestEffortProducer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[gateway_pb.TrafficWindow] = []

    async def start(self) -> None:
        """Nothing runs."""

    async def stop(self) -> None:
        """Nothing runs."""

    def send(self, topic: str, key: str, type: str, payload: bytes, **more: Any) -> bool:
        assert (topic, key, type) == ("headrace.traffic", "here-0", "traffic.window")
        self.messages.append(gateway_pb.TrafficWindow.FromString(payload))
        return True


async def test_messages_are_numbered_and_the_last_says_that_it_leaves() -> None:
    plane, sent, clock = DataPlane(["h:1"]), Sent(), FakeClock()
    publisher = TrafficPublisher(plane, sent, clock, "here-0", "boot", Metrics(plane, NoOpMeterProvider().get_meter("test")))
    clock.advance(1.0)
    await publisher.start()
    arm = ArmSpec("v1", Role.BASELINE, "triton", "h:1", "m", "m", 1, WHOLE, WHOLE)
    assert plane.routes.apply(RouteSpec("flights", 5, 1, arms=(arm,), in_rollout=True, window_s=0.25, guards=(DIFFERENT,)), 0.0)
    await until(lambda: sent.messages)
    await until(lambda: any(endpoint.endpoint == "flights" for endpoint in sent.messages[-1].endpoints))
    await publisher.stop()
    assert [message.sequence for message in sent.messages] == list(range(1, len(sent.messages) + 1))
    assert {(message.instance, message.boot_id) for message in sent.messages} == {("here-0", "boot")}
    assert [message.leaving for message in sent.messages] == [False] * (len(sent.messages) - 1) + [True]
    acknowledged = [endpoint for message in sent.messages for endpoint in message.endpoints]
    assert acknowledged[0].route_revision == 5
    assert all(not dict(arm.bad) for endpoint in acknowledged for arm in endpoint.arms)


def test_metrics_add_what_the_reports_say() -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics = Metrics(DataPlane(["h:1"]), provider.get_meter("test"))
    arm = ArmReport("v1", 10, {"error": 1}, 1, 1, (0, 4, *[0] * 15, 6), shadow_sent=3, shadow_shed=2)
    metrics.take(Report(0.25, (EndpointReport("flights", 1, "r", False, (arm,)),)))
    data = reader.get_metrics_data()
    assert data is not None
    found = {
        (metric.name, point.attributes.get("le") or point.attributes.get("outcome") or point.attributes.get("side")): point.value  # type: ignore[union-attr]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    provider.shutdown()
    assert found == {
        ("headrace.gateway.requests", None): 10,
        ("headrace.gateway.errors", None): 1,
        ("headrace.gateway.fallbacks", None): 1,
        ("headrace.gateway.duration.bucket", "0.5"): 4,
        ("headrace.gateway.duration.bucket", "inf"): 6,
        ("headrace.gateway.shadow_copies", "sent"): 3,
        ("headrace.gateway.shadow_copies", "shed"): 2,
        ("headrace.gateway.connections", "client"): 0,
        ("headrace.gateway.connections", "runtime"): 0,
    }
