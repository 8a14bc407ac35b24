"""Errors of the trainer's domain. They know no transport; handlers turn them into the kinds that every service shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: the field by its path (`train.command[0]`) and a sentence."""

    field: str
    message: str


class Rejected(Exception):
    """The input can never be accepted; `problems` lists all that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{problem.field}: {problem.message}" for problem in self.problems))


class Refused(Exception):
    """The state of the training does not allow it; the message says why."""
