"""Between the events' protobuf messages and what the gateway works with: the only file that knows both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.gateway.v1 import events_pb2 as gateway_pb
from contracts.registry.v1 import events_pb2 as registry_pb
from google.protobuf.message import DecodeError, Message
from servicekit.errors import Invalid

from gateway.access import KeySpec
from gateway.routes import ArmSpec, Assign, GuardKind, GuardSpec, Role, RouteSpec, ShadowSpec
from gateway.windows import ArmReport, EndpointReport, Report

DEFAULT_TIMEOUT_S = 5.0
DEFAULT_WINDOW_S = 1.0
DEFAULT_SHADOW_DEADLINE_S = 5.0

_ROLES: dict[int, Role] = {
    deployer_pb.ARM_ROLE_BASELINE: Role.BASELINE,
    deployer_pb.ARM_ROLE_CANARY: Role.CANARY,
    deployer_pb.ARM_ROLE_SHADOW: Role.SHADOW,
}
_ASSIGN: dict[int, Assign] = {deployer_pb.ASSIGN_REQUEST: Assign.REQUEST, deployer_pb.ASSIGN_CALLER: Assign.CALLER}
_GUARDS: dict[int, GuardKind] = {
    deployer_pb.GUARD_KIND_ERROR: GuardKind.ERROR,
    deployer_pb.GUARD_KIND_LATENCY: GuardKind.LATENCY,
    deployer_pb.GUARD_KIND_SHADOW_DIFFERENCE: GuardKind.SHADOW_DIFFERENCE,
}

_MessageT = TypeVar("_MessageT", bound=Message)
_ValueT = TypeVar("_ValueT")


def route(payload: bytes) -> RouteSpec:
    """A route.changed. Raises Invalid when it is broken, or holds a value that this release does not know."""
    message = _parse(deployer_pb.RouteChanged, payload)
    arms = tuple(
        ArmSpec(
            name=arm.arm,
            role=_known(_ROLES, arm.role, "role"),
            runtime=arm.runtime,
            upstream=arm.upstream,
            runtime_model=arm.runtime_model,
            model=arm.model,
            version=arm.version,
            weight=arm.weight_bps,
            fallback_weight=arm.fallback_weight_bps,
        )
        for arm in message.arms
    )
    shadow = None
    if message.HasField("shadow"):
        shadow = ShadowSpec(
            arm=message.shadow.arm,
            share=message.shadow.share_bps,
            tolerance=message.shadow.tolerance,
            deadline_s=message.shadow.deadline_ms / 1000 or DEFAULT_SHADOW_DEADLINE_S,
            only_input=message.shadow.only_input,
            only_values=frozenset(message.shadow.only_values),
        )
    return RouteSpec(
        endpoint=message.endpoint,
        revision=message.revision,
        publication=message.publication,
        deleted=message.deleted,
        arms=arms,
        shadow=shadow,
        assign=Assign.REQUEST if message.deleted else _known(_ASSIGN, message.assign, "assignment"),
        guards=tuple(GuardSpec(guard.id, _known(_GUARDS, guard.kind, "guard"), guard.limit_ms / 1000) for guard in message.guards),
        rollout_id=message.rollout_id,
        in_rollout=message.in_rollout,
        window_s=message.window_ms / 1000 or DEFAULT_WINDOW_S,
        timeout_s=message.upstream_timeout_ms / 1000 or DEFAULT_TIMEOUT_S,
    )


def key(payload: bytes) -> KeySpec:
    """An access.changed. Raises Invalid when it is broken."""
    message = _parse(registry_pb.AccessChanged, payload)
    expires = message.expires_at.seconds + message.expires_at.nanos / 1e9 if message.HasField("expires_at") else math.inf
    return KeySpec(
        key_id=message.key_id,
        revision=message.revision,
        hash=message.hash.lower(),
        subject=message.subject,
        roles=frozenset(message.roles),
        endpoints=frozenset(message.inference_endpoints),
        expires_at=expires,
        revoked=message.revoked,
    )


def traffic(report: Report, instance: str, boot_id: str, sequence: int, *, leaving: bool = False) -> bytes:
    """A traffic.window, serialised."""
    return gateway_pb.TrafficWindow(
        instance=instance,
        boot_id=boot_id,
        sequence=sequence,
        duration_ms=report.duration_s * 1000,
        endpoints=[_endpoint(endpoint) for endpoint in report.endpoints],
        leaving=leaving,
    ).SerializeToString()


def _endpoint(report: EndpointReport) -> gateway_pb.EndpointWindow:
    return gateway_pb.EndpointWindow(
        endpoint=report.endpoint,
        route_revision=report.revision,
        rollout_id=report.rollout_id,
        arms=[_arm(arm) for arm in report.arms],
        unjudged=report.unjudged,
    )


def _arm(report: ArmReport) -> gateway_pb.ArmWindow:
    return gateway_pb.ArmWindow(
        arm=report.arm,
        requests=report.requests,
        bad=dict(report.bad),
        errors=report.errors,
        fallbacks=report.fallbacks,
        latency_buckets=report.buckets,
        shadow_sent=report.shadow_sent,
        shadow_compared=report.shadow_compared,
        shadow_different=report.shadow_different,
        shadow_shed=report.shadow_shed,
        shadow_errors=report.shadow_errors,
    )


def _parse(cls: type[_MessageT], payload: bytes) -> _MessageT:
    try:
        return cls.FromString(payload)
    except DecodeError as error:
        raise Invalid(f"not a {cls.DESCRIPTOR.full_name}") from error


def _known(table: Mapping[int, _ValueT], value: int, what: str) -> _ValueT:
    try:
        return table[value]
    except KeyError:
        raise Invalid(f"{what} {value} is not known to this release") from None
