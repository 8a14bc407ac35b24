"""What an arm keeps over the revisions of its route: its connections, its breaker, and how much it may have in flight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.routes import ArmSpec
from gateway.upstream import Failure, Pool


@dataclass(frozen=True, slots=True)
class ArmLimits:
    """`breaker_failures` attempts in a row without an answer open the breaker for `breaker_open_s`; then one request tries."""

    in_flight: int = 256
    breaker_failures: int = 10
    breaker_open_s: float = 1.0


class ArmState:
    """The state of one arm of one endpoint.

    The breaker counts attempts that brought no answer at all (refused, reset, timed out). An answer with status 500 closes it
    again: the model may fail on one caller's rows, and that must not cut off the others.
    """

    __slots__ = ("_failures", "_limits", "_trying", "in_flight", "open_until", "pool", "refused", "shadow_pool")

    def __init__(self, pool: Pool, shadow_pool: Pool, limits: ArmLimits) -> None:
        self.pool = pool
        self.shadow_pool = shadow_pool
        self.in_flight = 0
        self.open_until = 0.0
        self.refused = 0
        self._limits = limits
        self._failures = 0
        self._trying = False

    def admit(self, now: float) -> bool:
        """Whether a request may go to the arm now; if so it is in flight until `succeeded`, `failed` or `gave_up`."""
        if self.in_flight >= self._limits.in_flight or (self.open_until and not self._may_try(now)):
            self.refused += 1
            return False
        self.in_flight += 1
        return True

    def _may_try(self, now: float) -> bool:
        if now < self.open_until or self._trying:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """The arm answered (with whatever status)."""
        self.in_flight -= 1
        if self._failures:
            self._failures = 0
            self.open_until = 0.0
            self._trying = False

    def failed(self, failure: Failure, now: float) -> None:
        """The attempt brought no answer."""
        self.in_flight -= 1
        self._trying = False
        if failure is Failure.SATURATED:
            return
        self._failures += 1
        if self._failures >= self._limits.breaker_failures:
            self.open_until = now + self._limits.breaker_open_s

    def gave_up(self) -> None:
        """The caller left before there was an answer: no evidence about the arm."""
        self.in_flight -= 1
        self._trying = False


class ArmStates:
    """The states of all arms. Arms that share a runtime share its connections: one pool per runtime and use."""

    def __init__(self, make_pool: Callable[[str, bool], Pool], limits: ArmLimits) -> None:
        """`make_pool(upstream, shadow)` makes a pool of connections to `host:port`."""
        self._make_pool = make_pool
        self._limits = limits
        self._pools: dict[tuple[str, bool], Pool] = {}
        self._states: dict[tuple[str, str, str], ArmState] = {}

    def of(self, endpoint: str, arm: ArmSpec) -> ArmState:
        key = (endpoint, arm.upstream, arm.runtime_model)
        state = self._states.get(key)
        if state is None:
            state = ArmState(self._pool(arm.upstream, shadow=False), self._pool(arm.upstream, shadow=True), self._limits)
            self._states[key] = state
        return state

    def keep(self, endpoint: str, arms: list[ArmSpec]) -> None:
        """Forgets the arms of an endpoint that its newest route does not name; requests in flight keep their own reference."""
        kept = {(endpoint, arm.upstream, arm.runtime_model) for arm in arms}
        for key in [key for key in self._states if key[0] == endpoint and key not in kept]:
            del self._states[key]

    def pools(self) -> list[Pool]:
        return list(self._pools.values())

    def _pool(self, upstream: str, *, shadow: bool) -> Pool:
        key = (upstream, shadow)
        if key not in self._pools:
            self._pools[key] = self._make_pool(upstream, shadow)
        return self._pools[key]
