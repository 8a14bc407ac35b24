"""Errors of the domain. They know no transport; handlers turn each into the kind that every service shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class DomainError(Exception):
    """Base: what was asked for is refused, and asking again changes nothing."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a delivery file: the field by its path from the top (`serve.rollout.steps[1].weight`), a sentence, the line."""

    field: str
    message: str
    line: int


class DeliveryInvalid(DomainError):
    """The delivery file cannot be used. `problems` lists everything that was found, by line, not the first thing only."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("; ".join(f"line {p.line}, {p.field}: {p.message}" for p in self.problems))


class TooLarge(DomainError):
    """The input is larger than the limit."""


class Missing(DomainError):
    """What was named does not exist."""


class Taken(DomainError):
    """The name belongs to something else."""


class Refused(DomainError):
    """The state of the thing does not allow it; the message says what would."""


class NotAllowed(DomainError):
    """This person may not do it."""


class Malformed(DomainError):
    """An input that is not what it should be."""
