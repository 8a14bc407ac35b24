"""Counting callers in place of requests, for routes that assign by caller: what was randomised is what is evidence.

A caller counts once per rollout and arm, in the window of its first request there, and is bad for a guard if any of its
requests within the horizon is. A caller is the subject of an API key. What X-Headrace-Key says is free text, and whoever could
make callers of it could make evidence: it names callers only with a key that was granted that. Other requests with a name keep
their arm and are not counted, for a subject that spread itself over both arms was not randomised. Each gateway process counts
the callers that it sees.
"""

from __future__ import annotations

import logging
from typing import Protocol

from gateway.routes import Arm, Route
from gateway.windows import BUCKETS, CALLER_HORIZON_S, ArmCounts

_log = logging.getLogger(__name__)

MAX_CALLERS = 100_000
"""Names that one subject may give its callers per endpoint, each arm counted apart; those beyond are served as ever, and not counted.
Nobody uses up another's. Subjects themselves are as many as there are keys, and always counted."""


class Account(Protocol):
    """What a request is booked on: the arm's window itself, or its caller's unit in it."""

    def answered(self, route: Route, elapsed: float) -> None: ...

    def failed(self, route: Route, arm: str, elapsed: float, *, fallback: bool) -> None: ...

    def not_counted(self) -> None: ...

    def left(self, route: Route, elapsed: float) -> None: ...


class _Unit:
    """One caller on one arm."""

    __slots__ = ("bad", "first_at", "window")

    def __init__(self, first_at: float, window: ArmCounts) -> None:
        self.first_at = first_at
        self.window = window
        self.bad = 0


class CallerAccount:
    """Books one request of a caller."""

    __slots__ = ("_arrived", "_first", "_unit", "_window")

    def __init__(self, unit: _Unit | None, window: ArmCounts, arrived: float, *, first: bool) -> None:
        self._unit = unit
        self._window = window
        self._arrived = arrived
        self._first = first

    def answered(self, route: Route, elapsed: float) -> None:
        self._window.buckets[min(int(elapsed * 4000.0).bit_length(), BUCKETS - 1)] += 1
        self._bad([index for index, limit in route.latency_limits if elapsed > limit])

    def failed(self, route: Route, arm: str, elapsed: float, *, fallback: bool) -> None:
        self.answered(route, elapsed)
        self._window.errors += 1
        self._window.fallbacks += fallback
        self._bad(route.recorder.error_guards)

    def not_counted(self) -> None:
        # The unit goes only when nothing else is known of it: a later request of the caller would have found it.
        unit = self._unit
        if self._first and unit is not None and unit.window.open and not unit.bad:
            unit.window.requests -= 1
            unit.first_at = float("-inf")

    def left(self, route: Route, elapsed: float) -> None:
        self._bad([index for index, limit in route.latency_limits if elapsed > limit])

    def _bad(self, guards: list[int] | tuple[int, ...]) -> None:
        unit = self._unit
        if unit is None or not unit.window.open or self._arrived - unit.first_at > CALLER_HORIZON_S:
            return
        for index in guards:
            if not unit.bad >> index & 1:
                unit.bad |= 1 << index
                unit.window.bad[index] += 1


class CallerBook:
    """The callers of the rollouts that are running, by endpoint; forgotten with their rollout."""

    def __init__(self, max_callers: int = MAX_CALLERS) -> None:
        self._max_callers = max_callers
        # By the hash of subject and key, which are the caller's own text and may be long.
        self._units: dict[str, tuple[str, dict[tuple[str, int], _Unit]]] = {}
        self._named: dict[tuple[str, bytes], int] = {}

    def account(self, route: Route, arm: Arm, subject: bytes, key: bytes, now: float, *, may_name: bool) -> CallerAccount:
        """The account for a request that has just been assigned `arm`. `may_name`: its API key was granted to name callers by `key`."""
        spec = route.spec
        window = arm.counts
        if key and not may_name:
            return CallerAccount(None, window, now, first=False)
        rollout, units = self._units.get(spec.endpoint, ("", {}))
        if rollout != spec.rollout_id or spec.endpoint not in self._units:
            self.forget(spec.endpoint)
            units = {}
            self._units[spec.endpoint] = (spec.rollout_id, units)
        place = (arm.name, hash((subject, key)))
        unit = units.get(place)
        if unit is not None and unit.first_at > float("-inf"):
            return CallerAccount(unit, window, now, first=False)
        if unit is None and key:
            named = self._named.get((spec.endpoint, subject), 0)
            if named <= self._max_callers:
                self._named[spec.endpoint, subject] = named + 1
            if named == self._max_callers:
                _log.warning("endpoint %s: a subject names more callers than are counted (%s)", spec.endpoint, self._max_callers)
            if named >= self._max_callers:
                return CallerAccount(None, window, now, first=False)
        unit = units[place] = _Unit(now, window)
        window.requests += 1
        return CallerAccount(unit, window, now, first=True)

    def forget(self, endpoint: str) -> None:
        """Nothing is counted on this endpoint any more."""
        self._units.pop(endpoint, None)
        for place in [place for place in self._named if place[0] == endpoint]:
            del self._named[place]
