"""A model under lock: what is held of it while it changes, and how each change is kept for the audit log and for other services."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from registry.domain.approvals import Approval, ApprovalStatus
from registry.domain.audit import Audit
from registry.domain.errors import Missing
from registry.domain.events import ModelArchived, ModelEvent, VersionRef
from registry.domain.names import CHAMPION
from registry.domain.versions import Stage, Version

MAX_REASON = 2_000


@dataclass(frozen=True, slots=True)
class By:
    """Who or which event does it, when and with which words of theirs."""

    actor: str
    at: datetime
    reason: str = ""
    person: bool = False
    """A person's command begins a trace of its own, so what it causes is told in the trace of the version's journey instead."""


class HeldModel:
    """One model under lock, with the versions and requests for approval that a change may concern."""

    def __init__(
        self,
        model_id: UUID,
        name: str,
        created_at: datetime,
        *,
        latest: int = 0,
        champion: int = 0,
        previous: int = 0,
        sequence: int = 0,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        updated_at: datetime | None = None,
        deleted: bool = False,
        aliases: Mapping[str, int] | None = None,
        versions: Iterable[Version] = (),
        approvals: Iterable[Approval] = (),
    ) -> None:
        self.model_id = model_id
        self.name = name
        self.created_at = created_at
        self.latest = latest
        self.champion = champion
        self.previous = previous
        """The champion before, to which a rollout may be reverted; 0: none."""
        self.sequence = sequence
        self.description = description
        self.tags = dict(tags or {})
        self.updated_at = updated_at or created_at
        self.deleted = deleted
        self.aliases = dict(aliases or {})
        self.versions = {version.number: version for version in versions}
        self.approvals = {approval.approval_id: approval for approval in approvals}
        self.events: list[tuple[int, ModelEvent, str]] = []
        """Sequence, event and traceparent (empty: the current one) of everything that happened here."""
        self.audits: list[Audit] = []
        self.requested: list[Approval] = []
        """Requests for approval made here: people are to be told."""

    def version(self, number: int) -> Version:
        """A version that was loaded and is not deleted. Raises Missing."""
        version = self.versions.get(number)
        if version is None or version.deleted:
            raise Missing(f"{self.name} has no version {number}")
        return version

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """All aliases of a version, `champion` first."""
        own = sorted(alias for alias, version in self.aliases.items() if version == number)
        return (CHAMPION, *own) if number == self.champion else tuple(own)

    def _crown(self, version: Version, why: str, by: By) -> None:
        before = self.champion
        self.champion = version.number
        self._audit(None, "alias.set", {"version": before}, {"version": self.champion}, by, alias=CHAMPION)
        self._put(replace(version, stage=Stage.PRODUCTION, rolling_out=False, reason=why[:MAX_REASON]), "version.stage", by)

    def _dethrone(self, why: str, by: By) -> None:
        if self.champion:
            self._move(self.version(self.champion), Stage.ARCHIVED, why, by)

    def _move(self, version: Version, stage: Stage, why: str, by: By) -> Version:
        entered = stage is Stage.ARCHIVED and self.version(version.number).stage is not Stage.ARCHIVED
        moved = self._put(replace(version, stage=stage, reason=why[:MAX_REASON]), "version.stage", by)
        if entered:
            self._emit(ModelArchived(self._ref(moved), moved.journey, moved.reason), moved, by)
        return moved

    def _put(self, version: Version, action: str, by: By, **more: object) -> Version:
        """Holds the changed version and writes one row of the audit log, or nothing when nothing changed."""
        before = self.versions.get(version.number)
        if before is None or replace(before, updated_at=version.updated_at) != version:
            version = self._hold(version, by)
            self._audit(version, action, _shown(before), _shown(version) | more, by)
        elif more.get("override"):
            self._audit(version, action, _shown(before), _shown(version) | more, by)
        return version

    def _hold(self, version: Version, by: By) -> Version:
        changed = self.versions[version.number] = replace(version, updated_at=by.at)
        self.updated_at = by.at
        return changed

    def _audit(
        self,
        version: Version | None,
        action: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        by: By,
        why: str = "",
        alias: str = "",
    ) -> None:
        target = f"model/{self.name}" + (f"/{version.number}" if version else "") + (f"@{alias}" if alias else "")
        self.audits.append(Audit(by.at, by.actor, action, target, before, after, why or by.reason or (version.reason if version else "")))

    def _emit(self, event: ModelEvent, version: Version, by: By) -> None:
        self.sequence += 1
        self.events.append((self.sequence, event, version.traceparent if by.person else ""))

    def _ref(self, version: Version) -> VersionRef:
        return VersionRef(self.model_id, self.name, version.number)

    def _pending(self) -> list[Approval]:
        pending = [approval for approval in self.approvals.values() if approval.status is ApprovalStatus.PENDING]
        return sorted(pending, key=lambda approval: approval.version, reverse=True)

    def _withdraw(self, number: int, by: By, why: str) -> None:
        for approval in self._pending():
            if approval.version == number:
                self._decide(approval, approval.withdraw(), "approval.withdraw", replace(by, reason=why))

    def _decide(self, before: Approval, after: Approval, action: str, by: By) -> None:
        self.approvals[after.approval_id] = after
        self.audits.append(Audit(by.at, by.actor, action, f"approval/{after.approval_id}", _votes(before), _votes(after), by.reason))


def _shown(version: Version | None) -> dict[str, Any]:
    if version is None:
        return {}
    shown = {
        "stage": str(version.stage),
        "reason": version.reason,
        "rolling_out": version.rolling_out,
        "evaluation": version.evidence.evaluation_id,
        "run": version.journey.run_id,
        "sha256": version.deliverable.sha256,
    }
    if version.origin.registered_by:
        shown |= {"source": version.origin.source, "registered_by": version.origin.registered_by}
    return shown | ({"deleted": True} if version.deleted else {})


def _votes(approval: Approval) -> dict[str, Any]:
    return {
        "status": str(approval.status),
        "votes": [{"subject": v.subject, "approve": v.approve, "comment": v.comment} for v in approval.votes],
    }
