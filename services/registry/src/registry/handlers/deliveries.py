"""Use cases of delivery files: apply, read, delete. Nothing is stored when anything is wrong with a file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from servicekit.access import Caller
from servicekit.clock import Clock
from servicekit.errors import Conflict, Forbidden, NotFound

from registry import metrics
from registry.domain import deliveries as domain
from registry.domain.audit import Audit
from registry.domain.deliveries import DeliveryFile, Revision
from registry.domain.errors import DeliveryInvalid, Problem
from registry.domain.models import By
from registry.handlers.telling import told
from registry.ports import SectionValidator, Session, Store

LOOSENING_ROLES = frozenset({"approver", "admin"})
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Applied:
    """How applying a file ended, or with a dry run would end: `outcome` is created, changed or unchanged."""

    revision: Revision
    outcome: str
    diff: str
    loosened: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Before:
    """What is known when a file comes: the delivery's newest revision, those its gates are held against, and the claims others hold."""

    current: Revision | None
    gates: tuple[Revision, ...]
    taken: tuple[Problem, ...]


class Deliveries:
    """The use cases; `validators` by section."""

    def __init__(self, store: Store, validators: Mapping[str, SectionValidator], clock: Clock) -> None:
        self._store = store
        self._validators = validators
        self._clock = clock

    async def apply(self, caller: Caller, text: str, dry_run: bool = False) -> Applied:
        """Stores the file as a new revision, unless it says what the newest one says. With `dry_run` nothing is changed.

        Asks the services whose sections are in it. Raises Invalid with every problem by field and line; Forbidden when it makes a gate
        looser and the caller is no approver; Transient when a service that must be asked does not answer. Repeatable.
        """
        with told():
            file, problems = domain.read(text)
            for _ in range(_ATTEMPTS):
                async with self._store.transaction() as session:
                    before = await _before(session, file)
                loosened = await self._validate(file, before, [*problems, *before.taken])
                current = before.current
                if current is not None and domain.same(file, current):
                    metrics.deliveries.add(0 if dry_run else 1, {"outcome": "unchanged"})
                    return Applied(current, "unchanged", "", ())
                revision = domain.revise(file, current, caller.name, self._clock.now())
                outcome = "created" if current is None or current.deleted else "changed"
                applied = Applied(revision, outcome, domain.difference(file, current), tuple(loosened))
                if dry_run:
                    return applied
                if loosened and not caller.roles & LOOSENING_ROLES:
                    raise Forbidden(f"looser than before: {', '.join(loosened)}; this needs the role approver")
                if await self._store_if_still(file, before, applied, caller):
                    metrics.deliveries.add(1, {"outcome": outcome})
                    return applied
            raise Conflict(f"the delivery {file.name} is being changed by somebody else; apply again")

    async def delete(self, caller: Caller, name: str) -> None:
        """Deletes a delivery: its claims are free, nothing is promoted by it any more. Repeatable. Raises NotFound for an unknown name."""
        now = self._clock.now()
        async with self._store.transaction() as session:
            await session.deliveries.exclusively()
            current = await session.deliveries.current(name, lock="update")
            if current is None:
                raise NotFound(f"there is no delivery {name}")
            if current.deleted:
                return
            revision = domain.delete(current, caller.name, now)
            await session.deliveries.store(revision)
            entry = Audit(now, caller.name, "delivery.delete", f"delivery/{name}", _shown(current), _shown(revision))
            await session.audit.add([entry])
            by = By(caller.name, now, person=True)
            for model_id in await session.models.awaiting(name):
                model = await session.models.lock(model_id)
                if model is not None:
                    model.delivery_changed(name, f"the delivery {name} was deleted", by)
                    await session.models.save(model)
        metrics.deliveries.add(1, {"outcome": "deleted"})

    async def get(self, name: str, number: int = 0) -> Revision:
        """A revision by number, or the newest. Raises NotFound, also for the newest of a delivery that is deleted."""
        async with self._store.transaction() as session:
            if number:
                found = await session.deliveries.revision(name, number)
            else:
                found = await session.deliveries.current(name)
        if found is None or (found.deleted and not number):
            raise NotFound(f"there is no delivery {name}" + (f" with revision {number}" if number else ""))
        return found

    async def all(self) -> Sequence[Revision]:
        """The newest revision of every delivery, by name."""
        async with self._store.transaction() as session:
            return await session.deliveries.standing()

    async def _validate(self, file: DeliveryFile, before: _Before, problems: list[Problem]) -> list[str]:
        """Asks each section's service, once for each section that it comes after. Returns the fields that loosen a gate; raises
        DeliveryInvalid when there is any problem."""
        asked = [
            (section, previous)
            for section in domain.FOREIGN_SECTIONS
            if section in file.sections
            for previous in dict.fromkeys(one.sections[section] for one in before.gates if section in one.sections) or [""]
        ]
        answers = await asyncio.gather(
            *(self._validators[name].validate(file.name, name, file.sections[name], previous) for name, previous in asked),
            return_exceptions=True,
        )
        loosened: list[str] = []
        failures: list[BaseException] = []
        said = {problem.field for problem in problems}
        for (section, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, BaseException):
                failures.append(answer)
                continue
            found = [_located(file, section, field, message) for field, message in answer.problems]
            # Ours come first, and what a section's service says again is told once.
            problems += [problem for problem in found if problem.field not in said and problem not in problems]
            loosened += [_within(section, field) for field in answer.loosened]
        if problems:  # worth telling even when a service that would find more is away
            raise DeliveryInvalid(problems)
        if failures:
            raise failures[0]
        return list(dict.fromkeys([*loosened, *domain.loosened(file, before.gates)]))

    async def _store_if_still(self, file: DeliveryFile, before: _Before, applied: Applied, caller: Caller) -> bool:
        """Stores the revision if nobody changed what it was judged by; False: look again."""
        async with self._store.transaction() as session:
            await session.deliveries.exclusively()
            if await _before(session, file) != before:
                return False
            await session.deliveries.store(applied.revision)
            was = _shown(before.current) if before.current else {}
            after = _shown(applied.revision) | ({"loosened": list(applied.loosened)} if applied.loosened else {})
            entry = Audit(applied.revision.applied_at, caller.name, "delivery.apply", f"delivery/{file.name}", was, after)
            await session.audit.add([entry])
        return True


async def _before(session: Session, file: DeliveryFile) -> _Before:
    current = await session.deliveries.current(file.name)
    # Held against whoever had the model, the endpoint or the experiment last, and not against its own past alone: else a delivery that
    # was deleted, renamed or applied in parts would be a way around the gates.
    gates = await session.deliveries.predecessors(file.name, file.claims)
    held = await session.deliveries.holders(file.claims, other_than=file.name)
    return _Before(current, gates, tuple(domain.taken(file.document, held)))


def _located(file: DeliveryFile, section: str, field: str, message: str) -> Problem:
    path = _within(section, field)
    return Problem(path, message, file.document.line_of(path))


def _within(section: str, field: str) -> str:
    """A field's path from the top of the file, also when the service counted from its section."""
    if field == section or field.startswith((f"{section}.", f"{section}[")):
        return field
    return f"{section}.{field}" if field else section


def _shown(revision: Revision) -> dict[str, object]:
    return {
        "revision": revision.revision,
        "experiment": revision.experiment,
        "model": revision.model,
        "endpoint": revision.endpoint,
        "approvals": revision.approvals,
        "deleted": revision.deleted,
    }
