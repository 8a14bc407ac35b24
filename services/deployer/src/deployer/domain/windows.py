"""What gateways counted, and how the windows of all of them become one stream of merged windows that bets can be placed on."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from deployer.domain.statistics import LEAST_UNITS, Rate


@dataclass(frozen=True)
class Counts:
    """Units that one arm was assigned, and how many of them were bad for each guard."""

    units: int = 0
    bad: Mapping[str, int] = field(default_factory=dict)

    def rate(self, guard: str) -> Rate:
        """Units and bad units for one guard."""
        return Rate(self.units, self.bad.get(guard, 0))

    def __add__(self, other: Counts) -> Counts:
        bad = dict(self.bad)
        for guard, count in other.bad.items():
            bad[guard] = bad.get(guard, 0) + count
        return Counts(self.units + other.units, bad)


@dataclass(frozen=True)
class ShadowCounts:
    """Copies of requests: compared answers, different ones, copies without an answer (errors), copies not sent (shed)."""

    compared: int = 0
    different: int = 0
    errors: int = 0
    shed: int = 0

    def difference(self) -> Rate:
        """How often the copy's answer was not the baseline's: an answer that never came is a difference."""
        return Rate(self.compared + self.errors, self.different + self.errors)

    def __add__(self, other: ShadowCounts) -> ShadowCounts:
        return ShadowCounts(
            self.compared + other.compared, self.different + other.different, self.errors + other.errors, self.shed + other.shed
        )


@dataclass(frozen=True)
class Window:
    """One gateway process's counts for one endpoint in one window, served under one revision of its route.

    `seconds` is by that process's monotonic clock.
    """

    instance: str
    revision: int
    seconds: float
    canary: Counts = Counts()
    baseline: Counts = Counts()
    shadow: ShadowCounts = ShadowCounts()


@dataclass(frozen=True)
class Merged:
    """Windows of all gateways under one revision, merged until each arm has enough units for one bet."""

    revision: int
    seconds: float
    canary: Counts
    baseline: Counts
    shadow: ShadowCounts
    windows: int
    gap: bool


class Merger:
    """Merges the windows of one rollout. Knows no clock, and looks at counts of units only, never at bad ones.

    A merged window is closed as soon as every member has reported and both arms have LEAST_UNITS units (or, while only copies are
    sent, that many comparisons). It takes both arms, not the canary alone, so that the rule is the same for either: with few requests
    at equal shares, a rule about the canary would leave the baseline the fewer units, and the cap would count that against the canary.
    `alone`: the canary has all traffic and is only watched, so its own units are enough.
    """

    def __init__(self, revision: int = 0, alone: bool = False) -> None:
        self.revision = revision
        self.alone = alone
        # Whoever makes a merger has not seen what came before.
        self._gap = True
        self._clear()

    def _clear(self) -> None:
        self._canary = Counts()
        self._baseline = Counts()
        self._shadow = ShadowCounts()
        self._seconds: dict[str, float] = {}
        self._windows = 0

    def interrupted(self) -> None:
        """What follows does not join what came before: the next merged window says so."""
        self._gap = True

    def add(self, window: Window, members: AbstractSet[str]) -> list[Merged]:
        """Take one window in; return the merged windows that it completes, none to two. `members` are the gateways alive.

        A window of an older revision is dropped; one of a newer revision drops what was not merged: bets never span a change of weights.
        """
        if window.revision < self.revision:
            return []
        if window.revision > self.revision:
            self.revision = window.revision
            self._clear()
        merged: list[Merged] = []
        if window.instance in self._seconds and self._enough():
            # The others are late: what is there stands for itself.
            merged.append(self._close())
        self._canary += window.canary
        self._baseline += window.baseline
        self._shadow += window.shadow
        self._seconds[window.instance] = self._seconds.get(window.instance, 0.0) + window.seconds
        self._windows += 1
        if self._enough() and members <= self._seconds.keys():
            merged.append(self._close())
        return merged

    def _enough(self) -> bool:
        if self.alone:
            return self._canary.units >= LEAST_UNITS
        served = min(self._canary.units, self._baseline.units)
        return served >= LEAST_UNITS or (self._canary.units == 0 and self._shadow.difference().units >= LEAST_UNITS)

    def _close(self) -> Merged:
        merged = Merged(self.revision, max(self._seconds.values()), self._canary, self._baseline, self._shadow, self._windows, self._gap)
        self._gap = False
        self._clear()
        return merged
