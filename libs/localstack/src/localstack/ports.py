"""Which port each server listens on: the wanted one, else a free one, remembered so that addresses survive a restart."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from pathlib import Path

from localstack.errors import StackError

LOOPBACK = "127.0.0.1"
# Below the range from which the kernel takes ports for outgoing connections (32768 up), low enough that SeaweedFS can add 10,000,
# and below the ports that a stack wants first, so that test runs keep out of its way.
_LOWEST, _HIGHEST = 10_240, 14_300


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


class Ports:
    """The ports of one stack, kept in a file. Not safe for two processes at once: its owner holds the stack's lock."""

    def __init__(self, file: Path, *, random_only: bool = False, in_use: bool = False) -> None:
        """`random_only`: ignore the wanted ports, as tests do that must not meet each other.

        `in_use`: the stack runs, and what it remembers is what it uses.
        """
        self._file = file
        self._random_only = random_only
        self._in_use = in_use
        # First port and number of ports, by name.
        self._taken: dict[str, tuple[int, int]] = json.loads(file.read_text()) if file.exists() else {}

    def claim(self, name: str, wanted: int, width: int = 1, usable: Callable[[int], bool] = is_free) -> int:
        """The first of `width` consecutive ports for the server `name`: the remembered, the wanted, or another; the choice is remembered.

        Raises StackError when no port is free.
        """
        if self._in_use and name in self._taken:
            return self._taken[name][0]
        candidates = [port for port in (self.get(name), None if self._random_only else wanted) if port]
        candidates += [random.randrange(_LOWEST, _HIGHEST - width) for _ in range(400)]  # noqa: S311 - no secret
        for port in candidates:
            span = range(port, port + width)
            others = (range(first, first + count) for other, (first, count) in self._taken.items() if other != name)
            if not any(port < other.stop and other.start < span.stop for other in others) and all(usable(each) for each in span):
                self._taken[name] = (port, width)
                self._save()
                return port
        raise StackError(f"no free port between {_LOWEST} and {_HIGHEST} for {name}: stop what listens there")

    def get(self, name: str) -> int | None:
        """The port remembered for `name`, taken or not."""
        return self._taken[name][0] if name in self._taken else None

    def of(self, part: str) -> list[int]:
        """Every port of a part: that of its own name and those whose name begins with it and a dash."""
        named = [span for name, span in self._taken.items() if name == part or name.startswith(f"{part}-")]
        return [port for first, count in named for port in range(first, first + count)]

    def spans(self) -> list[range]:
        """All that is remembered: the ports of each name."""
        return [range(first, first + count) for first, count in self._taken.values()]

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps(self._taken, indent=1, sort_keys=True) + "\n")
        draft.replace(self._file)
