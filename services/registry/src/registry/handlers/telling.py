"""The one table that says which of the shared errors each error of the domain becomes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from servicekit import errors as shared

from registry.domain import errors as domain

KINDS: dict[type[domain.DomainError], type[shared.HeadraceError]] = {
    domain.DeliveryInvalid: shared.Invalid,
    domain.TooLarge: shared.TooLarge,
    domain.Missing: shared.NotFound,
    domain.Taken: shared.AlreadyExists,
    domain.Refused: shared.Conflict,
    domain.NotAllowed: shared.Forbidden,
    domain.Malformed: shared.Invalid,
}


@contextmanager
def told() -> Iterator[None]:
    """Runs the block; an error of the domain leaves it as one of the shared errors."""
    try:
        yield
    except domain.DeliveryInvalid as error:
        violations = [shared.Violation(problem.field, problem.message, problem.line) for problem in error.problems]
        raise shared.Invalid("the delivery file is not valid", violations) from error
    except domain.DomainError as error:
        raise KINDS[type(error)](str(error)) from error
