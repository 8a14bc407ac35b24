"""Traffic windows: what each arm was assigned in each window and how much of it was bad, by arrival and as assigned.

A request belongs to the window in which it was assigned, whoever answers it in the end. A window is reported when all its
requests are decided, at the latest when the longest latency limit has passed for the last of them: those still unanswered
are bad for the latency guards at that moment, so a hanging arm is seen at once. What the error guard learns of them later
(it may take the upstream's whole time-out) is carried into the next windows of the same revision, at most as much as those
windows have requests, so that no window reports more bad requests than requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.routes import GuardKind, GuardSpec, Route

BUCKETS = 18
"""Latency buckets: upper bounds 0.25 ms, 0.5 ms and so on to 16,384 ms, and one without a bound."""

DEFAULT_WINDOW_S = 1.0
POLL_S = 0.02
"""How soon to look again at a window that has ended and waits for undecided requests."""

CALLER_HORIZON_S = 60.0
"""Where callers are assigned, a caller is bad if any of its requests within this time of its first one is; so windows wait for it."""

_MARGIN_S = 1.0


class ArmCounts:
    """What one arm was assigned in one window. Several of its methods are on the path of every request."""

    __slots__ = (
        "bad",
        "buckets",
        "errors",
        "fallbacks",
        "heir",
        "open",
        "pending",
        "requests",
        "shadow_compared",
        "shadow_different",
        "shadow_errors",
        "shadow_sent",
        "shadow_shed",
    )

    def __init__(self, guards: int) -> None:
        self.requests = 0
        self.pending = 0
        self.open = True
        self.heir: ArmCounts | None = None
        """Where what becomes known after the report is counted: the window that was open then."""
        self.bad = [0] * guards
        self.errors = 0
        self.fallbacks = 0
        self.buckets = [0] * BUCKETS
        self.shadow_sent = 0
        self.shadow_compared = 0
        self.shadow_different = 0
        self.shadow_shed = 0
        self.shadow_errors = 0

    def assigned(self) -> None:
        """A request arrived for this arm."""
        self.requests += 1
        self.pending += 1

    def answered(self, route: Route, elapsed: float) -> None:
        """The request was answered after `elapsed` seconds, and not with an error."""
        bucket = min(int(elapsed * 4000.0).bit_length(), BUCKETS - 1)
        if self.open:
            self.buckets[bucket] += 1
            self.pending -= 1
            for index, limit in route.latency_limits:
                if elapsed > limit:
                    self.bad[index] += 1
        else:
            self.successor().buckets[bucket] += 1

    def failed(self, route: Route, arm: str, elapsed: float, *, fallback: bool) -> None:
        """The arm's first attempt failed. `elapsed`: until the caller was answered, by whichever arm."""
        self.answered(route, elapsed)
        counts = self.successor()
        counts.errors += 1
        counts.fallbacks += fallback
        if self.open:
            for index in route.recorder.error_guards:
                self.bad[index] += 1
        else:
            route.recorder.late(arm)

    def successor(self) -> ArmCounts:
        """These counts while they are open, else those that are open in their place (or, when the route is gone, nobody's)."""
        counts = self
        while not counts.open and counts.heir is not None:
            counts = counts.heir
        return counts

    def not_counted(self) -> None:
        """The request itself was at fault (or an operator chose the arm): it says nothing about the arm."""
        if self.open:
            self.requests -= 1
            self.pending -= 1

    def left(self, route: Route, elapsed: float) -> None:
        """The caller went away after `elapsed` seconds: bad for the latency guards whose limit had passed, else neutral."""
        if not self.open:
            return
        self.pending -= 1
        passed = [index for index, limit in route.latency_limits if elapsed > limit]
        for index in passed:
            self.bad[index] += 1
        if not passed:
            self.requests -= 1


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm in one finished window; `bad` by guard id."""

    arm: str
    requests: int = 0
    bad: Mapping[str, int] = field(default_factory=dict)
    errors: int = 0
    fallbacks: int = 0
    buckets: Sequence[int] = ()
    shadow_sent: int = 0
    shadow_compared: int = 0
    shadow_different: int = 0
    shadow_shed: int = 0
    shadow_errors: int = 0


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint's window under one revision. Without arms it only says which revision is being served."""

    endpoint: str
    revision: int
    rollout_id: str
    unjudged: bool
    arms: tuple[ArmReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Windows that had the same length."""

    duration_s: float
    endpoints: tuple[EndpointReport, ...]


@dataclass(slots=True)
class _Window:
    started: float
    ends: float
    due: float
    counts: dict[str, ArmCounts]
    cut: bool = False


class Recorder:
    """The windows of one endpoint under one compiled route."""

    def __init__(self, route: Route, now: float) -> None:
        spec = route.spec
        self._route = route
        self.guards: tuple[GuardSpec, ...] = tuple(guard for guard in spec.guards if guard.kind is not GuardKind.SHADOW_DIFFERENCE)
        # A guard's place in `bad` is its place in the route, as `Route.latency_limits` has it.
        self._places = len(spec.guards)
        self.error_guards = tuple(index for index, guard in enumerate(spec.guards) if guard.kind is GuardKind.ERROR)
        self.length = spec.window_s if spec.in_rollout else max(DEFAULT_WINDOW_S, spec.window_s)
        limits = [limit for _, limit in route.latency_limits]
        # Without a latency guard a request is undecided until it is answered or timed out, on its own arm and on the stand-in.
        self._settle = max(limits) if limits else 2 * spec.timeout_s + _MARGIN_S
        if route.counts_callers:
            self._settle += CALLER_HORIZON_S
        self._late: dict[str, int] = dict.fromkeys(route.arms, 0)
        self._closing: deque[_Window] = deque()
        self._retired = False
        route.recorder = self
        self._current = self._open(now)

    def _open(self, now: float) -> _Window:
        counts = {}
        for name, arm in self._route.arms.items():
            counts[name] = arm.counts = ArmCounts(self._places)
        # Boundaries are multiples of the length, so that endpoints of one length are reported together.
        ends = (math.floor(now / self.length) + 1) * self.length
        return _Window(now, ends, math.inf, counts)

    def late(self, arm: str) -> None:
        """A request of `arm` failed after its window had been reported."""
        self._late[arm] += 1

    def retire(self, now: float) -> None:
        """The route was replaced: the window that is open ends now, and no other follows."""
        self._close(now)
        self._retired = True

    def cut(self, now: float) -> None:
        """Waits for nothing any more: what has ended is reported by the next tick, as it stands."""
        for window in self._closing:
            window.cut = now < window.due
            window.due = min(window.due, now)

    @property
    def done(self) -> bool:
        """Retired, and everything reported."""
        return self._retired and not self._closing

    def _close(self, now: float) -> None:
        window = self._current
        window.ends = now
        window.due = now + self._settle
        self._closing.append(window)

    def tick(self, now: float) -> list[tuple[float, EndpointReport]]:
        """Ends the window whose time has come, and gives (duration, report) of those that are decided, oldest first."""
        if not self._retired and now >= self._current.ends:
            self._close(now)
            self._current = self._open(now)
        ready = []
        while self._closing:
            window = self._closing[0]
            if now < window.due and (self._route.counts_callers or any(counts.pending for counts in window.counts.values())):
                break
            self._closing.popleft()
            ready.append((window.ends - window.started, self._report(window)))
        return ready

    def next_due(self, now: float) -> float:
        """When `tick` has something to do again."""
        due = math.inf if self._retired else self._current.ends
        if self._closing:
            due = min(due, self._closing[0].due, math.inf if self._route.counts_callers else now + POLL_S)
        return due

    def heading(self, arms: tuple[ArmReport, ...] = ()) -> EndpointReport:
        spec = self._route.spec
        return EndpointReport(spec.endpoint, spec.revision, spec.rollout_id, self._route.unjudged, arms)

    def _report(self, window: _Window) -> EndpointReport:
        for name, counts in window.counts.items():
            self._settle_counts(name, counts, limits_passed=not window.cut)
        return self.heading(tuple(self._arm_report(name, counts) for name, counts in window.counts.items()))

    def _settle_counts(self, name: str, counts: ArmCounts, *, limits_passed: bool) -> None:
        counts.open = False
        counts.heir = None if self._retired else self._route.arms[name].counts
        if counts.pending and limits_passed:
            for index, _ in self._route.latency_limits:
                counts.bad[index] += counts.pending
        if self._late[name] and self.error_guards:
            room = min(counts.requests - counts.bad[index] for index in self.error_guards)
            taken = min(max(room, 0), self._late[name])
            self._late[name] -= taken
            for index in self.error_guards:
                counts.bad[index] += taken

    def _arm_report(self, name: str, counts: ArmCounts) -> ArmReport:
        guards = self._route.spec.guards
        bad = {guard.id: count for guard, count in zip(guards, counts.bad, strict=True) if guard.kind is not GuardKind.SHADOW_DIFFERENCE}
        if self._route.arms[name].role == "shadow":
            bad = {}
        return ArmReport(
            name,
            counts.requests,
            bad,
            counts.errors,
            counts.fallbacks,
            tuple(counts.buckets),
            counts.shadow_sent,
            counts.shadow_compared,
            counts.shadow_different,
            counts.shadow_shed,
            counts.shadow_errors,
        )


class WindowBook:
    """The windows of all endpoints of this process, and what the next messages about them say."""

    def __init__(self) -> None:
        self._recorders: dict[str, Recorder] = {}
        self._leaving: list[Recorder] = []
        self._announce = False

    def switch(self, endpoint: str, new: Route | None, now: float) -> None:
        """A route takes another's place (None: the endpoint is gone)."""
        old = self._recorders.pop(endpoint, None)
        if old is not None:
            old.retire(now)
            self._leaving.append(old)
        if new is not None:
            self._recorders[endpoint] = Recorder(new, now)
            self._announce = True

    def finish(self, now: float) -> list[Report]:
        """The last reports, of windows that are cut off here: the process is leaving."""
        for endpoint in list(self._recorders):
            self.switch(endpoint, None, now)
        for recorder in self._leaving:
            recorder.cut(now)
        return self.tick(now)

    def next_due(self, now: float) -> float:
        """When `tick` has something to do again (math.inf: never, as things are)."""
        return min((recorder.next_due(now) for recorder in self._all()), default=math.inf)

    def tick(self, now: float, *, membership: bool = False) -> list[Report]:
        """The reports that are due. `membership`: at least one, though nothing has happened.

        Every report names all endpoints. The last entry of an endpoint names the revision being served, also when an
        earlier entry of the same report is a window of the revision before.
        """
        by_length: dict[int, list[EndpointReport]] = {}
        lengths: dict[int, float] = {}
        for recorder in self._all():
            for duration, report in recorder.tick(now):
                key = round(duration * 1000)
                lengths.setdefault(key, duration)
                by_length.setdefault(key, []).append(report)
        self._leaving = [recorder for recorder in self._leaving if not recorder.done]
        if not by_length and (self._announce or membership):
            by_length[0], lengths[0] = [], 0.0
        self._announce = False
        return [Report(lengths[key], self._with_headings(reports)) for key, reports in by_length.items()]

    def _with_headings(self, reports: list[EndpointReport]) -> tuple[EndpointReport, ...]:
        latest = {report.endpoint: (report.revision, report.unjudged) for report in reports}
        headings = (recorder.heading() for recorder in self._recorders.values())
        return (*reports, *(heading for heading in headings if latest.get(heading.endpoint) != (heading.revision, heading.unjudged)))

    def _all(self) -> Iterable[Recorder]:
        yield from self._leaving
        yield from self._recorders.values()
