"""Connections that have not yet sent a whole request with a valid key: who holds them, and which of them makes room for another.

Opening a connection costs a client nothing, so without a bound one client without a key could hold all that there are.
"""

from __future__ import annotations

import ipaddress
from typing import Generic, TypeVar

T = TypeVar("T")


def origin(host: str) -> str:
    """What stands for one client: an IPv4 address, or the 64-bit network of an IPv6 address, all of which one client may have."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()


class Newcomers(Generic[T]):
    """The connections that wait for their client to prove itself, oldest first, as a whole and by origin. Every operation is O(1)."""

    def __init__(self, per_origin: int) -> None:
        """`per_origin`: how many one origin may have."""
        self._per_origin = per_origin
        self._all: dict[T, str] = {}
        self._by_origin: dict[str, dict[T, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: T, where: str) -> T | None:
        """Takes it in as the newest. Returns the origin's oldest, removed, when the origin has too many now. Repeatable."""
        self._all[connection] = where
        own = self._by_origin.setdefault(where, {})
        own[connection] = None
        if len(own) <= self._per_origin:
            return None
        oldest = next(iter(own))
        self.remove(oldest)
        return oldest

    def oldest(self) -> T | None:
        """The one that has waited longest, removed; None when there is none."""
        oldest = next(iter(self._all), None)
        if oldest is not None:
            self.remove(oldest)
        return oldest

    def remove(self, connection: T) -> None:
        """Forgets it, if it is here."""
        where = self._all.pop(connection, None)
        if where is not None:
            own = self._by_origin[where]
            del own[connection]
            if not own:
                del self._by_origin[where]
