"""Errors of the domain. They know no transport; handlers turn them into the kinds that every service shares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a delivery's serve section: `field` is a path relative to the section, such as `rollout.steps[1].weight`."""

    field: str
    message: str


class PolicyInvalid(Exception):
    """The serve section of a delivery cannot be used; `problems` lists everything that is wrong with it, not the first thing only."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{p.field}: {p.message}" for p in problems))


class CommandRefused(Exception):
    """An operator's command does not fit the state of the rollout; the message says what would."""


class SignatureInvalid(Exception):
    """A model version's signature cannot be turned into a runtime configuration."""
