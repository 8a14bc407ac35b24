"""An endpoint's route as gateways get it: a full snapshot with a revision, of which the highest wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from deployer.domain.events import RouteSet
from deployer.domain.grammar import FULL
from deployer.domain.policy import Assign, Guard
from deployer.domain.rollout import Rollout
from deployer.domain.signature import Signature
from deployer.domain.version import Arm


class Role(StrEnum):
    """What an arm is to its endpoint."""

    BASELINE = "baseline"
    CANARY = "canary"
    SHADOW = "shadow"


@dataclass(frozen=True)
class RoutedArm:
    """One arm with its weights in basis points; `fallback` is taken by a gateway for which nobody judges any more."""

    arm: str
    role: Role
    runtime: str
    upstream: str
    runtime_model: str
    model: str
    version: int
    weight: int
    fallback: int


@dataclass(frozen=True)
class ShadowRoute:
    """Which requests are copied, and how their answers are compared."""

    arm: str
    share: int
    only_input: str
    only_values: tuple[str, ...]
    tolerance: float
    deadline_ms: int


@dataclass(frozen=True)
class Route:
    """A snapshot. `watched`: gateways report windows of it and expect it to be published again every 10 s."""

    endpoint: str
    revision: int
    arms: tuple[RoutedArm, ...] = ()
    shadow: ShadowRoute | None = None
    assign: Assign = Assign.REQUEST
    guards: tuple[Guard, ...] = ()
    rollout_id: str = ""
    watched: bool = False
    window_ms: int = 1000
    timeout_ms: int = 5000
    signature: Signature | None = None
    delivery: str = ""
    deleted: bool = False


def of_rollout(route: RouteSet, rollout: Rollout, arms: Mapping[str, Arm], upstreams: Mapping[str, str]) -> Route:
    """The snapshot for weights that a rollout decided. `arms` and `upstreams` are by the arm's id and the runtime's name."""
    fallback = dict(route.fallback)
    routed = tuple(
        _routed(arms[arm], _role(arm, weight, rollout, route), weight, fallback.get(arm, 0), upstreams) for arm, weight in route.weights
    )
    policy, canary = rollout.policy, arms[rollout.canary]
    shadow = None
    if route.shadow is not None and policy.shadow is not None:
        rule = policy.shadow
        shadow = ShadowRoute(route.shadow, rule.share, rule.only_input, rule.only_values, policy.tolerance, policy.timeout_ms)
    largest, _ = max(route.weights, key=lambda pair: pair[1])
    return Route(
        endpoint=rollout.endpoint,
        revision=route.revision,
        arms=routed,
        shadow=shadow,
        assign=policy.assign,
        guards=policy.guards,
        rollout_id=rollout.id,
        watched=True,
        window_ms=policy.window_ms,
        timeout_ms=policy.timeout_ms,
        # The one that most callers were written for.
        signature=arms[largest].version.signature,
        delivery=canary.version.journey.delivery,
    )


def _role(arm: str, weight: int, rollout: Rollout, route: RouteSet) -> Role:
    if arm == route.shadow:
        return Role.SHADOW
    return Role.CANARY if arm == rollout.canary and weight < FULL else Role.BASELINE


def _routed(arm: Arm, role: Role, weight: int, fallback: int, upstreams: Mapping[str, str]) -> RoutedArm:
    version = arm.version
    return RoutedArm(arm.id, role, arm.runtime, upstreams[arm.runtime], arm.runtime_model, version.model, version.version, weight, fallback)


def readdressed(route: Route, upstreams: Mapping[str, str]) -> Route | None:
    """The next revision of a route when a runtime is reached at another address than it says; None when all are as it says."""
    arms = tuple(replace(arm, upstream=upstreams.get(arm.runtime, arm.upstream)) for arm in route.arms)
    return None if arms == route.arms else replace(route, revision=route.revision + 1, arms=arms)


def quiet(route: Route) -> Route:
    """The same route, no longer watched: everybody serves it."""
    return replace(route, revision=route.revision + 1, watched=False, rollout_id="")


def withdrawn(endpoint: str, revision: int) -> Route:
    """The snapshot that says that an endpoint is gone."""
    return Route(endpoint, revision, deleted=True)
