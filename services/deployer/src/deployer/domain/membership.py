"""Which gateways there are, which revision of each route they serve, and whether any of their windows was lost.

Time is the monotonic time of whoever asks, in seconds; nothing is compared with a gateway's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALIVE_S = 10.0
"""A gateway that was heard within this time is a member."""

SETTLE_S = 2.0
"""Who begins to listen knows all members after this time: each reports every second."""

VANISHED_S = 3_600.0
"""A gateway that fell silent without leaving may come back with its old routes for this long."""


@dataclass
class _Member:
    boot: str
    sequence: int
    heard_at: float
    revisions: dict[str, int] = field(default_factory=dict)


class Membership:
    """What was heard from gateways since `now`, when listening began."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._members: dict[str, _Member] = {}

    def heard(self, instance: str, boot: str, sequence: int, revisions: Mapping[str, int], leaving: bool, now: float) -> bool | None:
        """Take a message in. True: windows before it are missing; False: none are; None: it was heard before and says nothing new."""
        known = self._members.get(instance)
        if known is not None and known.boot == boot and sequence <= known.sequence:
            return None
        if leaving:
            self._members.pop(instance, None)
        else:
            self._members[instance] = _Member(boot, sequence, now, dict(revisions))
        if known is None:
            return False
        return known.boot != boot or sequence != known.sequence + 1

    def alive(self, now: float) -> frozenset[str]:
        """The members."""
        return frozenset(name for name, member in self._members.items() if now - member.heard_at <= ALIVE_S)

    def reporting(self, endpoint: str, now: float) -> frozenset[str]:
        """The members that know an endpoint."""
        return frozenset(name for name in self.alive(now) if endpoint in self._members[name].revisions)

    def vanished(self, now: float) -> frozenset[str]:
        """Gateways that fell silent without a word, and could still serve by what they knew."""
        silent = (name for name, member in self._members.items() if ALIVE_S < now - member.heard_at <= VANISHED_S)
        return frozenset(silent)

    def acknowledged(self, endpoint: str, revision: int, now: float, anyone: bool = True) -> bool:
        """Whether every member serves an endpoint by a revision or a later one.

        With no member at all: not when `anyone` must be there, and not when those that were there vanished.
        """
        if now - self._since < SETTLE_S:
            return False
        alive = self.alive(now)
        if not alive:
            return not anyone and not self.vanished(now)
        return all(self._members[name].revisions.get(endpoint, 0) >= revision for name in alive)
