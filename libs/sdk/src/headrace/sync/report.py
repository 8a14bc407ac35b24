"""What a transfer did, and what it could not take and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

MOST_TOLD = 1_000
"""Of what was not taken so many are told one by one; all are counted."""


class Report:
    """Counts of what was taken and of what was there already, and a list of what was left."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.taken: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        self.left: list[dict[str, str]] = []
        self.left_count = 0
        self.say = progress

    def missed(self, what: str, why: str) -> None:
        """Something of the source cannot be taken."""
        self.left_count += 1
        if len(self.left) < MOST_TOLD:
            self.left.append({"what": what, "why": why})
        self.say(f"not taken: {what}: {why}")

    def json(self) -> dict[str, Any]:
        return {"taken": dict(self.taken), "already_there": dict(self.there), "not_taken": self.left_count, "reasons": self.left}
