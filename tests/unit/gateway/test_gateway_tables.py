"""The tables of the data path: routes and keys by revision, assignment to arms, the state file, and the events they come from."""

from __future__ import annotations

import hashlib
import math
import random
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import uvicorn
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.gateway.v1 import events_pb2 as gateway_pb
from contracts.registry.v1 import events_pb2 as registry_pb
from eventing.envelope import Received
from gateway import server, translate
from gateway.access import CACHED_CREDENTIALS, AccessTable, KeySpec
from gateway.assign import caller_point, pick
from gateway.feed import Feed
from gateway.plane import DataPlane
from gateway.routes import WHOLE, ArmSpec, Assign, GuardKind, GuardSpec, Role, Route, RouteSpec, RouteTable, ShadowSpec, violations
from gateway.settings import GatewaySettings
from gateway.state import StateFile
from gateway.windows import ArmReport, EndpointReport, Report
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from servicekit.clock import FakeClock
from servicekit.errors import Invalid
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

UPSTREAM = "127.0.0.1:8000"


def arm(name: str, role: Role, weight: int, fallback: int = 0, **more: Any) -> ArmSpec:
    return replace(ArmSpec(name, role, "triton", UPSTREAM, f"m-{name}", "m", int(name[1]), weight, fallback), **more)


def spec(canary: int = 500, **more: Any) -> RouteSpec:
    arms = (arm("v1-g1", Role.BASELINE, WHOLE - canary, WHOLE), arm("v2-g1", Role.CANARY, canary))
    return replace(RouteSpec("flights", 1, 1, arms=arms, rollout_id="r1", in_rollout=True), **more)


def compiled(route: RouteSpec) -> Route:
    return Route(route, lambda arm: None, unjudged=False)  # type: ignore[arg-type, return-value]  # no state is needed here


# Assignment


@given(st.integers(0, WHOLE), st.integers(0, WHOLE), st.binary(max_size=20), st.binary(max_size=20))
def test_raising_the_canarys_share_only_ever_adds_callers(one: int, other: int, subject: bytes, key: bytes) -> None:
    low, high = sorted((one, other))
    arms = [pick(compiled(spec(share, assign=Assign.CALLER)), subject, key).name for share in (low, high)]
    assert arms != ["v2-g1", "v1-g1"]


def test_callers_are_spread_evenly_and_anew_in_each_rollout() -> None:
    callers = [f"user-{number}".encode() for number in range(20_000)]
    first, second = compiled(spec(rollout_id="r1")), compiled(spec(rollout_id="r2"))
    places = [(caller_point(first.hash_seed, one, b""), caller_point(second.hash_seed, one, b"")) for one in callers]
    for which in (0, 1):
        tenths = [sum(place[which] * 10 // WHOLE == tenth for place in places) for tenth in range(10)]
        assert all(1_800 < count < 2_200 for count in tenths)
    # Who was among the first 5 % is so again no more often than anybody else: 5 % of them, that is about 50.
    again = sum(a < 500 and b < 500 for a, b in places)
    assert 25 < again < 80


def test_a_key_never_stands_for_another_subject() -> None:
    seed = compiled(spec()).hash_seed
    assert caller_point(seed, b"ab", b"c") != caller_point(seed, b"a", b"bc")


def test_an_even_random_choice_follows_the_weights() -> None:
    random.seed(3)
    route = compiled(spec(2_500))
    chosen = sum(pick(route, b"", b"").name == "v2-g1" for _ in range(20_000))
    assert 4_800 < chosen < 5_200


# Routes


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (spec(endpoint="a/b"), "name"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, 9_999),)), "sum to 10,000"),
        (spec(arms=()), "sum to 10,000"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE, 1),)), "fallback"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE + 1), arm("v2-g1", Role.CANARY, -1))), "impossible weight"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE, upstream="169.254.169.254:80"),)), "not a configured runtime"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE, runtime_model="x/../y"),)), "name"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE, runtime_model='x"\r\n'),)), "name"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE, runtime="unknown"),)), "runtime"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, WHOLE), arm("v1-g1", Role.SHADOW, 0))), "one name"),
        (spec(arms=(arm("v1-g1", Role.BASELINE, 5_000), arm("v2-g1", Role.SHADOW, 5_000))), "impossible weight"),
        (spec(shadow=ShadowSpec("v9", 1, 0.1, 1)), "shadow"),
        (spec(guards=(GuardSpec("a", GuardKind.ERROR), GuardSpec("a", GuardKind.ERROR))), "one id"),
        (spec(window_s=0), "not positive"),
    ],
)
def test_a_route_that_must_not_be_served_is_refused(broken: RouteSpec, says: str) -> None:
    assert any(says in one for one in violations(broken, [UPSTREAM]))
    plane = DataPlane([UPSTREAM])
    good = spec(revision=1)
    assert plane.routes.apply(good, 0.0)
    assert not plane.routes.apply(replace(broken, revision=2), 1.0)
    assert plane.routes.endpoints["flights"].revision == 1


def test_the_highest_revision_wins_and_not_the_last_arrival() -> None:
    plane = DataPlane([UPSTREAM])
    assert plane.routes.apply(spec(revision=5, canary=1), 0.0)
    assert not plane.routes.apply(spec(revision=4, canary=9_000), 1.0)
    route = plane.routes.endpoints["flights"].route
    assert route is not None
    assert route.arms["v2-g1"].weight == 1


def test_an_arm_keeps_its_state_over_revisions() -> None:
    plane = DataPlane([UPSTREAM])
    plane.routes.apply(spec(revision=1), 0.0)
    endpoint = plane.routes.endpoints["flights"]
    assert endpoint.route is not None
    before = endpoint.route.arms["v1-g1"].state
    plane.routes.apply(spec(revision=2), 0.0)
    assert endpoint.route.arms["v1-g1"].state is before


def test_paths_of_other_names_are_not_made() -> None:
    table = RouteTable([UPSTREAM], lambda name, arm: None, {}, lambda *arguments: None)  # type: ignore[arg-type, return-value]
    assert not table.apply(spec(endpoint="../x"), 0.0)
    assert table.targets == {}


# Keys


def key(text: str, **more: Any) -> KeySpec:
    return replace(
        KeySpec("k1", 1, hashlib.sha256(text.encode()).hexdigest(), "alice", frozenset({"viewer"}), frozenset({"flights"})), **more
    )


def test_a_key_is_known_until_it_is_revoked_or_replaced() -> None:
    table = AccessTable()
    assert table.identify(b"Bearer hr_k1_secret", None) is None
    assert table.apply(key("hr_k1_secret"))
    grant = table.identify(b"Bearer hr_k1_secret", None)
    assert grant is not None
    assert (grant.subject, grant.may_infer("flights"), grant.may_infer("other"), grant.may_choose_arm) == ("alice", True, False, False)
    assert table.apply(key("hr_k1_new", revision=2, endpoints=frozenset({"*"}), roles=frozenset({"editor"})))
    assert table.identify(b"Bearer hr_k1_secret", None) is None
    grant = table.identify(None, b"hr_k1_new")
    assert grant is not None
    assert (grant.may_infer("other"), grant.may_choose_arm) == (True, True)
    assert not table.apply(key("hr_k1_secret"))
    assert table.apply(key("hr_k1_new", revision=3, revoked=True))
    assert table.identify(None, b"hr_k1_new") is None
    assert not table.apply(key("hr_k1_new", revision=2))
    assert table.identify(None, b"hr_k1_new") is None


def test_a_key_expires_while_it_is_cached() -> None:
    now = 1_000.0
    table = AccessTable(lambda: now)
    table.apply(key("hr_k1_secret", expires_at=1_010.0))
    assert table.identify(None, b"hr_k1_secret") is not None
    now = 1_010.0
    assert table.identify(None, b"hr_k1_secret") is None


def test_the_cache_of_keys_is_bounded_and_holds_no_unknown_ones() -> None:
    table = AccessTable()
    table.apply(key("hr_k1_secret"))
    for number in range(3 * CACHED_CREDENTIALS):
        assert table.identify(None, b"hr_unknown_%d" % number) is None
        # The same key, written differently every time.
        assert table.identify(b"Bearer hr_k1_secret" + b" " * (number % 7), None) is not None
    assert len(table._cache) <= CACHED_CREDENTIALS


# Events


def test_a_route_event_is_read() -> None:
    message = deployer_pb.RouteChanged(
        endpoint="flights",
        revision=7,
        publication=9,
        arms=[
            deployer_pb.Arm(
                arm="v1-g1", role=deployer_pb.ARM_ROLE_BASELINE, runtime="triton", upstream=UPSTREAM, runtime_model="m-v1-g1", model="m",
                version=1, weight_bps=9_500, fallback_weight_bps=WHOLE,
            ),
            deployer_pb.Arm(
                arm="v2-g1", role=deployer_pb.ARM_ROLE_CANARY, runtime="triton", upstream=UPSTREAM, runtime_model="m-v2-g1", model="m",
                version=2, weight_bps=500,
            ),
        ],
        shadow=deployer_pb.Shadow(arm="v2-g1", share_bps=100, only_input="carrier", only_values=["UA"], tolerance=0.2, deadline_ms=700),
        assign=deployer_pb.ASSIGN_CALLER,
        guards=[deployer_pb.Guard(id="latency_ms>50", kind=deployer_pb.GUARD_KIND_LATENCY, limit_ms=50)],
        rollout_id="r1",
        in_rollout=True,
        window_ms=250,
    )  # fmt: skip
    read = translate.route(message.SerializeToString())
    assert read == RouteSpec(
        "flights",
        7,
        9,
        arms=(arm("v1-g1", Role.BASELINE, 9_500, WHOLE), arm("v2-g1", Role.CANARY, 500)),
        shadow=ShadowSpec("v2-g1", 100, 0.2, 0.7, "carrier", frozenset({"UA"})),
        assign=Assign.CALLER,
        guards=(GuardSpec("latency_ms>50", GuardKind.LATENCY, 0.05),),
        rollout_id="r1",
        in_rollout=True,
        window_s=0.25,
        timeout_s=5.0,
    )
    assert violations(read, [UPSTREAM]) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xff\xff",
        deployer_pb.RouteChanged(endpoint="x", assign=9).SerializeToString(),  # type: ignore[arg-type]
        deployer_pb.RouteChanged(endpoint="x").SerializeToString(),
        deployer_pb.RouteChanged(endpoint="x", assign=1, arms=[deployer_pb.Arm(arm="a", role=77)]).SerializeToString(),  # type: ignore[arg-type]
        deployer_pb.RouteChanged(endpoint="x", assign=1, guards=[deployer_pb.Guard(id="a", kind=99)]).SerializeToString(),  # type: ignore[arg-type]
    ],
)
def test_a_route_with_values_of_a_later_release_is_invalid_and_never_a_default(payload: bytes) -> None:
    with pytest.raises(Invalid):
        translate.route(payload)


def test_a_key_event_is_read() -> None:
    message = registry_pb.AccessChanged(key_id="k", revision=3, hash="AB", subject="s", roles=["admin"], inference_endpoints=["*"])
    assert translate.key(message.SerializeToString()) == KeySpec("k", 3, "ab", "s", frozenset({"admin"}), frozenset({"*"}), math.inf)
    message.expires_at.FromDatetime(datetime(2030, 1, 1))
    assert translate.key(message.SerializeToString()).expires_at == datetime(2030, 1, 1, tzinfo=UTC).timestamp()


def test_a_report_is_written() -> None:
    arms = (ArmReport("v1-g1", 10, {"error": 2}, 2, 1, (0, 3, 7), 1, 2, 3, 4, 5),)
    payload = translate.traffic(Report(0.25, (EndpointReport("flights", 7, "r1", True, arms),)), "here", "boot", 42)
    message = gateway_pb.TrafficWindow.FromString(payload)
    assert (message.instance, message.boot_id, message.sequence, message.duration_ms, message.leaving) == ("here", "boot", 42, 250.0, False)
    (endpoint,) = message.endpoints
    assert (endpoint.endpoint, endpoint.route_revision, endpoint.rollout_id, endpoint.unjudged) == ("flights", 7, "r1", True)
    (written,) = endpoint.arms
    assert (written.arm, written.requests, dict(written.bad), written.errors, written.fallbacks) == ("v1-g1", 10, {"error": 2}, 2, 1)
    assert list(written.latency_buckets) == [0, 3, 7]
    shadow = [written.shadow_sent, written.shadow_compared, written.shadow_different, written.shadow_shed, written.shadow_errors]
    assert shadow == [1, 2, 3, 4, 5]


def received(type: str, key: str, payload: bytes) -> Received:
    return Received(
        type, "headrace.routes", key, 1, payload, UUID(int=1), datetime(2026, 1, 1, tzinfo=UTC), "", "", False, "/x", 0, 0, (), "cluster"
    )


def route_event(revision: int) -> Received:
    message = deployer_pb.RouteChanged(
        endpoint="flights",
        revision=revision,
        publication=revision,
        assign=deployer_pb.ASSIGN_REQUEST,
        arms=[
            deployer_pb.Arm(
                arm="v1-g1", role=deployer_pb.ARM_ROLE_BASELINE, runtime="triton", upstream=UPSTREAM, runtime_model="m", weight_bps=WHOLE
            )
        ],
    )
    return received("route.changed", "flights", message.SerializeToString())


async def test_the_tables_outlive_the_process(tmp_path: Path) -> None:
    clock = FakeClock()
    digest = hashlib.sha256(b"hr_k_secret").hexdigest()
    access = registry_pb.AccessChanged(key_id="k", revision=1, hash=digest, subject="s", inference_endpoints=["*"]).SerializeToString()
    for process, revision in (("0", 3), ("1", 4)):
        plane = DataPlane([UPSTREAM])
        feed = Feed(plane, StateFile(tmp_path, process), clock)
        await feed.start()
        feed.on_route("flights", route_event(revision))
        feed.on_key("k", received("access.changed", "k", access))
        feed.on_route("flights", None)
        feed.on_route("flights", received("route.forgotten", "flights", b"\xff"))
        await feed.stop()
    files = sorted(tmp_path.iterdir())  # noqa: ASYNC240 - a temporary folder
    assert [file.name for file in files] == ["tables-0.json", "tables-1.json"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    (tmp_path / "tables-2.json").write_text("{broken")
    plane = DataPlane([UPSTREAM])
    feed = Feed(plane, StateFile(tmp_path, "0"), clock)
    await feed.start()
    assert plane.routes.endpoints["flights"].revision == 4
    assert plane.access.identify(None, b"hr_k_secret") is not None
    await feed.stop()


async def test_a_broken_event_is_invalid_and_changes_nothing(tmp_path: Path) -> None:
    plane = DataPlane([UPSTREAM])
    feed = Feed(plane, StateFile(tmp_path, "0"), FakeClock())
    feed.on_route("flights", route_event(1))
    with pytest.raises(Invalid):
        feed.on_route("flights", received("route.changed", "flights", b"\xff\xff"))
    assert plane.routes.endpoints["flights"].revision == 1


# Start


def test_another_uvicorn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server.check_uvicorn()
    monkeypatch.setattr(uvicorn, "__version__", "0.55.0")
    with pytest.raises(RuntimeError, match=r"0\.55\.0"):
        server.check_uvicorn()
    monkeypatch.undo()
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    with pytest.raises(RuntimeError, match="_start_asgi_task"):
        server.check_uvicorn()


def test_addresses_in_the_settings_are_checked() -> None:
    assert GatewaySettings(triton_http="a:1, b:2").upstreams == {"a:1", "b:2"}
    for wrong in ({"triton_http": "nowhere"}, {"gateway_address": "x"}, {"gateway_processes": 0}):
        with pytest.raises(ValidationError):
            GatewaySettings(**wrong)
