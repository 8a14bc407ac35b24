"""Between protobuf and the domain nothing is lost, nothing has a default by accident, and what is no message is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from contracts.deployer.v1 import events_pb2 as events
from contracts.gateway.v1 import events_pb2 as gateway
from contracts.registry.v1 import events_pb2 as registry
from deployer.adapters.store import _ROLLOUT, _ROUTE, _VERSION
from deployer.domain import events as ev
from deployer.domain import inputs
from deployer.domain import route as routes
from deployer.domain.decisions import decide
from deployer.domain.events import RouteSet
from deployer.domain.policy import Assign, GuardKind, parse
from deployer.domain.rollout import Cause, Hold, Rollout, State
from deployer.domain.route import Role
from deployer.domain.signature import Signature, Tensor
from deployer.domain.version import Arm, Blob, Journey, Version
from deployer.domain.windows import Counts, Merged, ShadowCounts
from deployer.entrypoints import translate
from deployer.entrypoints.grpc import ACCESS
from deployer.handlers import ANNOUNCED
from deployer.ports import Announcement, EndpointRecord, RolloutRecord
from servicekit.clock import FakeClock, SequentialIds
from servicekit.errors import Invalid

SIGNATURE = Signature((Tensor("x", "FP32", (-1, 1)),), (Tensor("y", "FP32", (-1, 1)),))
VERSION = Version(
    "m1", "flights", 2, Journey("j", "d", 4, "r"), "onnx", Blob("ab" * 32, 5, "blobs/x"), SIGNATURE, Blob("cd" * 32, 6, "samples")
)
EXAMPLE = Path(__file__).parents[3] / "examples" / "flights" / "delivery.yaml"


def rollout() -> Rollout:
    policy = parse(yaml.safe_load(EXAMPLE.read_text())["serve"])
    started = Rollout("0190a000-0000-7000-8000-000000000002", "flights", "v2-g2", policy)
    told: list[inputs.Input] = [inputs.Begin("v1-g1", 3), inputs.Loaded(), inputs.Warmed()]
    for given in told:
        started, _ = decide(started, given)
    merged = Merged(started.revision, 1.0, Counts(), Counts(100, {"error": 2}), ShadowCounts(90, 3, 1, 2), 1, False)
    return decide(started, merged)[0]


def record() -> RolloutRecord:
    return RolloutRecord(rollout(), VERSION, 1, "", FakeClock().now(), FakeClock().now())


def test_what_is_stored_comes_back_the_same() -> None:
    state = rollout()
    assert state.evidence.of("error").baseline.units == 100
    stored = json.loads(json.dumps(_ROLLOUT.dump_python(state, mode="json")))
    assert _ROLLOUT.validate_python(stored) == state
    assert _VERSION.validate_python(json.loads(json.dumps(_VERSION.dump_python(VERSION, mode="json")))) == VERSION
    route = a_route()
    assert _ROUTE.validate_python(json.loads(json.dumps(_ROUTE.dump_python(route, mode="json")))) == route


def a_route() -> routes.Route:
    arms = {
        name: Arm(name, "flights", replace(VERSION, version=number), "triton", f"m-{name}") for number, name in ((1, "v1-g1"), (2, "v2-g2"))
    }
    weights = (("v1-g1", 10_000), ("v2-g2", 0))
    return routes.of_rollout(RouteSet(4, weights, weights, shadow="v2-g2"), rollout(), arms, {"triton": "host:8000"})


def test_a_route_says_all_that_a_gateway_needs() -> None:
    message = translate.route_changed(a_route(), publication=9)
    assert (message.endpoint, message.revision, message.publication, message.in_rollout) == ("flights", 4, 9, True)
    baseline, canary = message.arms
    assert (baseline.role, baseline.weight_bps, baseline.fallback_weight_bps) == (events.ARM_ROLE_BASELINE, 10_000, 10_000)
    assert (canary.role, canary.version, canary.runtime_model, canary.upstream) == (events.ARM_ROLE_SHADOW, 2, "m-v2-g2", "host:8000")
    shadow = message.shadow
    assert (shadow.arm, shadow.share_bps, shadow.only_input, list(shadow.only_values)) == ("v2-g2", 10_000, "origin", ["JFK"])
    assert (shadow.tolerance, shadow.deadline_ms) == (0.3, 5000)
    assert [(guard.id, guard.kind, guard.limit_ms) for guard in message.guards] == [
        ("error", events.GUARD_KIND_ERROR, 0.0),
        ("latency_ms>50", events.GUARD_KIND_LATENCY, 50.0),
        ("shadow_difference", events.GUARD_KIND_SHADOW_DIFFERENCE, 0.0),
    ]
    assert (message.window_ms, message.upstream_timeout_ms, message.assign) == (250, 5000, events.ASSIGN_REQUEST)
    assert message.signature.inputs[0].name == "x"


def test_a_route_at_rest_and_a_withdrawn_one() -> None:
    calm = routes.quiet(a_route())
    assert (calm.revision, calm.watched, calm.rollout_id) == (5, False, "")
    gone = translate.route_changed(routes.withdrawn("flights", 6), 1)
    assert (gone.deleted, gone.revision, list(gone.arms)) == (True, 6, [])


def test_every_word_of_the_domain_has_one_on_the_wire() -> None:
    assert set(translate.CAUSES) == set(Cause)
    assert set(translate.ROLES) == set(Role)
    assert set(translate.GUARD_KINDS) == set(GuardKind)
    assert set(translate.ASSIGNS) == set(Assign)
    assert 0 not in {*translate.CAUSES.values(), *translate.ROLES.values(), *translate.GUARD_KINDS.values(), *translate.ASSIGNS.values()}


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (ev.CanaryStarted(500), "deploy.canary"),
        (ev.Advanced(1, 2500, "why"), "deploy.advanced"),
        (ev.Completed(False, "why"), "deploy.completed"),
        (ev.RolledBack(Cause.HARM, "why"), "deploy.rolled_back"),
        (ev.Superseded(3), "deploy.superseded"),
        (ev.Reverted("why"), "deploy.reverted"),
        (ev.Alarmed("why", {}), "deploy.alarmed"),
    ],
)
def test_events_name_rollout_version_and_journey(event: ev.Event, kind: str) -> None:
    assert isinstance(event, ANNOUNCED)
    encoder = translate.EventEncoder(FakeClock(), SequentialIds())
    envelope = encoder.event(Announcement(event, record(), 7, replace(VERSION, version=1)), sequence=3)
    assert (envelope.type, envelope.topic, envelope.key, envelope.sequence) == (kind, "headrace.deploys", "flights", 3)
    kinds: dict[str, Any] = {
        "deploy.canary": events.DeployCanary,
        "deploy.advanced": events.DeployAdvanced,
        "deploy.completed": events.DeployCompleted,
        "deploy.rolled_back": events.DeployRolledBack,
        "deploy.superseded": events.DeploySuperseded,
        "deploy.reverted": events.DeployReverted,
        "deploy.alarmed": events.DeployAlarmed,
    }
    message = kinds[kind].FromString(envelope.payload)
    ref = message.rollout
    assert (ref.version.model_id, ref.version.version, ref.baseline_version, ref.endpoint) == ("m1", 2, 1, "flights")
    assert (ref.journey.journey_id, ref.journey.delivery, ref.journey.delivery_revision, ref.journey.run_id) == ("j", "d", 4, "r")
    if isinstance(message, events.DeployReverted):
        assert (message.to_version, message.to_blob.sha256) == (1, "ab" * 32)


def test_what_concerns_nobody_else_is_not_announced() -> None:
    with pytest.raises(TypeError):
        translate.EventEncoder(FakeClock(), SequentialIds()).event(Announcement(ev.DeadlineSet(1), record(), 7, None), 1)


def test_a_rollout_is_told_with_its_evidence() -> None:
    message = translate.rollout(record())
    assert (message.state, message.weight_bps, message.paused, message.held) == ("shadowing", 0, False, False)
    assert (message.shadow_compared, message.shadow_different) == (90, 3)
    error, _, shadow = message.guards
    assert (error.id, error.baseline_requests, error.harm_wealth) == ("error", 100, 1.0)
    # Of 90 answers that were compared and one that never came, 4 differ.
    assert shadow.canary_bad_rate == pytest.approx(4 / 91)
    held = replace(record(), rollout=replace(rollout(), state=State.STEPPING, hold=Hold.DEADLINE, cause=Cause.DEADLINE))
    message = translate.rollout(held)
    assert (message.held, message.paused, message.cause) == (True, False, events.END_CAUSE_DEADLINE)


def test_a_rollout_that_traffic_decides_says_what_it_waits_for() -> None:
    shadowing = record()
    wanted = shadowing.rollout.policy.shadow
    assert wanted is not None
    assert translate.rollout(shadowing).reason.endswith(f"90 of {wanted.requests} shadow answers compared")
    step = shadowing.rollout.policy.steps[0]
    stepping = replace(shadowing, rollout=replace(shadowing.rollout, state=State.STEPPING, reason="why"))
    assert translate.rollout(stepping).reason.startswith(f"why; 0 of {step.requests} canary requests seen at")
    paused = replace(shadowing, rollout=replace(shadowing.rollout, hold=Hold.PAUSED, reason="lunch"))
    assert translate.rollout(paused).reason == "lunch"


def test_a_watched_completion_and_its_alarm_are_told() -> None:
    completed = replace(record(), rollout=replace(rollout(), state=State.COMPLETED, watched=True, revertible=True))
    assert translate.rollout(completed).watched
    alarmed = replace(completed, rollout=replace(completed.rollout, alarm="error: bad are 9.0% of 400"))
    message = translate.rollout(alarmed)
    assert (message.watched, message.alarm) == (False, "error: bad are 9.0% of 400")
    encoder = translate.EventEncoder(FakeClock(), SequentialIds())
    envelope = encoder.event(Announcement(ev.Alarmed("why", {}), completed, 7, VERSION), sequence=4)
    told = events.DeployAlarmed.FromString(envelope.payload)
    assert (told.reason, told.route_revision, told.revertible) == ("why", 7, True)


def test_a_promotion_tells_which_champion_it_was_judged_against() -> None:
    message = registry.ModelPromoted(endpoint="e", champion_version=3)
    message.version.model_id, message.version.version = "m", 4
    assert translate.promotion(message.SerializeToString()).champion == 3
    message.champion_version = 0
    assert translate.promotion(message.SerializeToString()).champion == 0
    # Whoever passes the gates by passes the verdict by, too.
    message.override = True
    assert translate.promotion(message.SerializeToString()).champion is None


def test_an_endpoint_tells_which_version_is_live() -> None:
    from deployer.domain.endpoint import Endpoint

    endpoint = EndpointRecord(Endpoint("flights", 4, serving="v1-g1", live="r"), "d", a_route())
    message = translate.endpoint(endpoint)
    assert (message.live_version, message.rollout_id, message.route.revision) == (1, "r", 4)
    assert translate.endpoint(EndpointRecord(Endpoint("flights"), "d")).live_version == 0


def test_windows_are_read_arm_by_arm() -> None:
    window = gateway.TrafficWindow(
        instance="g",
        boot_id="b",
        sequence=3,
        duration_ms=250,
        endpoints=[
            gateway.EndpointWindow(
                endpoint="flights",
                route_revision=4,
                rollout_id="r",
                arms=[
                    gateway.ArmWindow(arm="v1-g1", requests=10, bad={"error": 2}),
                    gateway.ArmWindow(arm="v2-g2", shadow_sent=9, shadow_compared=7, shadow_different=1, shadow_shed=5, shadow_errors=2),
                ],
            )
        ],
    )
    report = translate.report(window.SerializeToString())
    assert (report.instance, report.boot, report.sequence, report.seconds, report.leaving) == ("g", "b", 3, 0.25, False)
    (entry,) = report.endpoints
    assert entry.arms["v1-g1"].served == Counts(10, {"error": 2})
    assert entry.arms["v2-g2"].shadow == ShadowCounts(7, 1, 2, 5)


@pytest.mark.parametrize("read", [translate.promotion, translate.delivery, translate.report])
def test_what_is_no_message_is_refused(read: object) -> None:
    assert callable(read)
    with pytest.raises(Invalid):
        read(b"\xff\xff\xff")


def test_a_promotion_without_a_version_is_refused() -> None:
    with pytest.raises(Invalid, match="names no version"):
        translate.promotion(registry.ModelPromoted(endpoint="e").SerializeToString())


@pytest.mark.parametrize("serve_json", ["{", "[1]", '"x"'])
def test_a_delivery_whose_section_has_no_fields_is_refused(serve_json: str) -> None:
    with pytest.raises(Invalid, match="serve section"):
        translate.delivery(registry.DeliveryApplied(name="d", revision=1, serve_json=serve_json).SerializeToString())


def test_a_delivery_without_a_serve_section_is_remembered_as_such() -> None:
    assert translate.delivery(registry.DeliveryApplied(name="d", revision=1).SerializeToString()).section is None


def test_everything_that_is_served_has_a_rule() -> None:
    from contracts.deployer.v1 import service_pb2 as deployer
    from contracts.eventing.v1 import service_pb2 as dead_letters
    from contracts.registry.v1 import service_pb2 as sections

    services = [
        deployer.DESCRIPTOR.services_by_name["DeployerService"],
        dead_letters.DESCRIPTOR.services_by_name["DeadLetterService"],
        sections.DESCRIPTOR.services_by_name["DeliverySectionService"],
    ]
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert set(ACCESS) == served
    assert all("gateway" in rule.services or rule.services == {"registry"} for rule in ACCESS.values())


def test_a_runtime_that_moved_needs_another_revision() -> None:
    route = a_route()
    assert routes.readdressed(route, {"triton": "host:8000"}) is None
    moved = routes.readdressed(route, {"triton": "host:9000"})
    assert moved is not None
    assert (moved.revision, {arm.upstream for arm in moved.arms}) == (route.revision + 1, {"host:9000"})
