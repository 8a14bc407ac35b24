"""The route table: what the deployer published (`RouteSpec`), and what the data path reads of it (`Endpoint`, `Route`, `Arm`).

A snapshot is checked and compiled once, when it arrives, into bytes and thresholds, so that a request costs look-ups alone.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gateway.kv2 import Op, model_paths

if TYPE_CHECKING:
    from gateway.arms import ArmState
    from gateway.windows import ArmCounts, Recorder

_log = logging.getLogger(__name__)

WHOLE = 10_000
"""All traffic, in basis points."""

UNJUDGED_AFTER_S = 30.0
"""A route in rollout that nobody published again for this long gives the canary's share back."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Endpoints, arms and runtime models: they become parts of paths, headers and JSON without escaping."""


class Role(StrEnum):
    BASELINE = "baseline"
    CANARY = "canary"
    SHADOW = "shadow"


class Assign(StrEnum):
    REQUEST = "request"
    CALLER = "caller"


class GuardKind(StrEnum):
    ERROR = "error"
    LATENCY = "latency"
    SHADOW_DIFFERENCE = "shadow_difference"


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One model version on one runtime. Weights in basis points; a shadow's are 0."""

    name: str
    role: Role
    runtime: str
    upstream: str
    runtime_model: str
    model: str
    version: int
    weight: int
    fallback_weight: int = 0


@dataclass(frozen=True, slots=True)
class ShadowSpec:
    """Copies to the arm `arm`: of `share` basis points of the requests that the rule lets through (no `only_input`: all)."""

    arm: str
    share: int
    tolerance: float
    deadline_s: float
    only_input: str = ""
    only_values: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GuardSpec:
    """What makes a request bad. `limit_s` is for latency guards."""

    id: str
    kind: GuardKind
    limit_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """A snapshot of one endpoint's route. `publication` grows with every publication, also of the same revision."""

    endpoint: str
    revision: int
    publication: int = 0
    deleted: bool = False
    arms: tuple[ArmSpec, ...] = ()
    shadow: ShadowSpec | None = None
    assign: Assign = Assign.REQUEST
    guards: tuple[GuardSpec, ...] = ()
    rollout_id: str = ""
    in_rollout: bool = False
    window_s: float = 1.0
    timeout_s: float = 5.0


def violations(spec: RouteSpec, upstreams: Iterable[str]) -> list[str]:
    """Why a snapshot must not be served; empty when it may. `upstreams` are the runtimes that this gateway is configured with."""
    if not NAME.fullmatch(spec.endpoint):
        return [f"the endpoint's name {spec.endpoint!r} cannot stand in a path"]
    if spec.deleted:
        return []
    allowed = frozenset(upstreams)
    wrong = []
    names = [arm.name for arm in spec.arms]
    for arm in spec.arms:
        wrong += [f"the name {name!r} is not one" for name in (arm.name, arm.runtime_model) if not NAME.fullmatch(name)]
        if arm.runtime != "triton":
            wrong.append(f"arm {arm.name}: the runtime {arm.runtime!r} is not known here")
        if arm.upstream not in allowed:
            wrong.append(f"arm {arm.name}: {arm.upstream!r} is not a configured runtime")
        if arm.weight < 0 or arm.fallback_weight < 0 or (arm.role is Role.SHADOW and (arm.weight or arm.fallback_weight)):
            wrong.append(f"arm {arm.name}: impossible weight")
    if len(set(names)) != len(names):
        wrong.append("two arms have one name")
    if sum(arm.weight for arm in spec.arms) != WHOLE:
        wrong.append("the weights do not sum to 10,000")
    if sum(arm.fallback_weight for arm in spec.arms) not in (0, WHOLE):
        wrong.append("the fallback weights do not sum to 10,000")
    if spec.shadow is not None and spec.shadow.arm not in names:
        wrong.append(f"the shadow arm {spec.shadow.arm!r} does not exist")
    if len({guard.id for guard in spec.guards}) != len(spec.guards):
        wrong.append("two guards have one id")
    if spec.window_s <= 0 or spec.timeout_s <= 0:
        wrong.append("a window or time-out is not positive")
    return wrong


class Arm:
    """An arm under one revision of a route, ready to be used: request heads and answer heads are made here, once."""

    __slots__ = (
        "answer_head",
        "counts",
        "infer_head",
        "model_head",
        "name",
        "named_headers",
        "ready_head",
        "role",
        "runtime_model",
        "served_headers",
        "spec",
        "state",
        "version",
        "weight",
    )

    counts: ArmCounts
    """Of the window that is open now; put here by the recorder."""

    def __init__(self, spec: ArmSpec, weight: int, state: ArmState) -> None:
        self.spec = spec
        self.name = spec.name
        self.role = spec.role
        self.version = str(spec.version)
        self.weight = weight
        self.state = state
        self.runtime_model = spec.runtime_model.encode("ascii")
        host = spec.upstream.encode("ascii")
        base = b"/v2/models/" + self.runtime_model
        common = b" HTTP/1.1\r\nhost: " + host + b"\r\naccept: application/json\r\n"
        self.infer_head = b"POST " + base + b"/infer" + common + b"content-type: application/json\r\ncontent-length: "
        self.model_head = b"GET " + base + common
        self.ready_head = b"GET " + base + b"/ready" + common
        self.served_headers = b"x-headrace-model-version: " + self.version.encode() + b"\r\nx-headrace-arm: " + self.name.encode() + b"\r\n"
        self.named_headers = self.served_headers + b"x-request-id: "
        self.answer_head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + self.named_headers


class Route:
    """One revision of one endpoint's route, compiled. Immutable, but for the counts that its arms carry."""

    __slots__ = (
        "arms",
        "baseline",
        "by_caller",
        "counts_callers",
        "hash_seed",
        "latency_limits",
        "recorder",
        "shadow",
        "shadow_arm",
        "single",
        "spec",
        "thresholds",
        "timeout_s",
        "unjudged",
    )

    recorder: Recorder

    def __init__(self, spec: RouteSpec, state_of: Callable[[ArmSpec], ArmState], *, unjudged: bool) -> None:
        """`unjudged`: the fallback weights are in force."""
        self.spec = spec
        self.unjudged = unjudged
        self.arms = {arm.name: Arm(arm, arm.fallback_weight if unjudged else arm.weight, state_of(arm)) for arm in spec.arms}
        # The canary comes first, so that raising its share only ever adds callers to it.
        ordered = sorted(self.arms.values(), key=lambda arm: arm.role is not Role.CANARY)
        self.thresholds: list[tuple[int, Arm]] = []
        below = 0
        for arm in ordered:
            if arm.weight:
                below += arm.weight
                self.thresholds.append((below, arm))
        self.single = self.thresholds[0][1] if len(self.thresholds) == 1 else None
        self.baseline = self._baseline()
        self.by_caller = spec.assign is Assign.CALLER
        # Evidence for a rollout is counted in what was randomised; outside of one there is none, and requests are of more use.
        self.counts_callers = self.by_caller and spec.in_rollout
        self.hash_seed = zlib.crc32(f"{spec.endpoint}\0{spec.rollout_id}\0".encode())
        self.latency_limits = tuple((index, guard.limit_s) for index, guard in enumerate(spec.guards) if guard.kind is GuardKind.LATENCY)
        self.timeout_s = spec.timeout_s
        self.shadow = spec.shadow if spec.shadow is not None and spec.shadow.share > 0 else None
        self.shadow_arm = self.arms[self.shadow.arm] if self.shadow is not None else None

    def _baseline(self) -> Arm:
        for arm in self.arms.values():
            if arm.role is Role.BASELINE:
                return arm
        return max(self.arms.values(), key=lambda arm: arm.weight)

    def stand_in(self, arm: Arm) -> Arm | None:
        """The arm that answers when `arm` cannot: the baseline for every other, and for the baseline whichever else has traffic."""
        if arm is not self.baseline:
            return self.baseline
        return next((other for _, other in self.thresholds if other is not arm), None)

    def named(self, text: str) -> Arm | None:
        """The arm that X-Headrace-Arm means: by its name, or by its role."""
        return self.arms.get(text) or next((arm for arm in self.arms.values() if arm.role == text), None)


class Endpoint:
    """A name that callers use. It outlives its routes, so that a request finds the newest one when its turn comes."""

    __slots__ = ("heard_at", "name", "name_bytes", "publication", "revision", "route", "spec")

    def __init__(self, name: str) -> None:
        self.name = name
        self.name_bytes = name.encode("ascii")
        self.route: Route | None = None
        self.spec: RouteSpec | None = None
        self.revision = -1
        self.publication = -1
        self.heard_at = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """What one public path means."""

    op: Op
    endpoint: Endpoint | None


class RouteTable:
    """All endpoints. The highest revision of each wins, never the last arrival."""

    def __init__(
        self,
        upstreams: Iterable[str],
        state_of: Callable[[str, ArmSpec], ArmState],
        fixed: Mapping[bytes, Op],
        on_change: Callable[[Endpoint, Route | None, Route | None], None],
    ) -> None:
        """`on_change(endpoint, old, new)` is called when a route takes another's place, before any request sees the new one."""
        self._upstreams = frozenset(upstreams)
        self._state_of = state_of
        self._on_change = on_change
        self.endpoints: dict[str, Endpoint] = {}
        self.targets: dict[bytes, Target] = {path: Target(op, None) for path, op in fixed.items()}

    def apply(self, spec: RouteSpec, now: float) -> bool:
        """Takes a snapshot in; `now` is monotonic. True when it is new, so that it should be kept.

        Refuses, loudly, what must not be served.
        """
        endpoint = self.endpoints.get(spec.endpoint)
        if endpoint is not None and spec.revision < endpoint.revision:
            return False
        if endpoint is not None and spec.revision == endpoint.revision:
            return self._heard_again(endpoint, spec, now)
        wrong = violations(spec, self._upstreams)
        if wrong:
            _log.error("route of %s, revision %s, is refused: %s", spec.endpoint, spec.revision, "; ".join(wrong))
            return False
        if endpoint is None:
            endpoint = self.endpoints[spec.endpoint] = Endpoint(spec.endpoint)
            for path, op in model_paths(spec.endpoint).items():
                self.targets[path] = Target(op, endpoint)
        endpoint.revision, endpoint.publication, endpoint.heard_at = spec.revision, spec.publication, now
        endpoint.spec = spec
        self._switch(endpoint, unjudged=False)
        return True

    def _heard_again(self, endpoint: Endpoint, spec: RouteSpec, now: float) -> bool:
        if spec.publication <= endpoint.publication:
            return False
        endpoint.publication, endpoint.heard_at = spec.publication, now
        if endpoint.route is not None and endpoint.route.unjudged:
            _log.warning("route of %s is published again: its weights are back in force", endpoint.name)
            self._switch(endpoint, unjudged=False)
        return False

    def expire(self, now: float) -> None:
        """Takes the canary's share back where nobody is judging any more. Call it every second or so."""
        for endpoint in self.endpoints.values():
            spec, route = endpoint.spec, endpoint.route
            if spec is None or route is None or not spec.in_rollout or route.unjudged:
                continue
            if now - endpoint.heard_at > UNJUDGED_AFTER_S and any(arm.fallback_weight for arm in spec.arms):
                _log.warning(
                    "route of %s was not published again for %.0f s: the fallback weights are in force", endpoint.name, UNJUDGED_AFTER_S
                )
                self._switch(endpoint, unjudged=True)

    def _switch(self, endpoint: Endpoint, *, unjudged: bool) -> None:
        spec, old = endpoint.spec, endpoint.route
        assert spec is not None  # noqa: S101
        new = None if spec.deleted else Route(spec, lambda arm: self._state_of(endpoint.name, arm), unjudged=unjudged)
        self._on_change(endpoint, old, new)
        endpoint.route = new
