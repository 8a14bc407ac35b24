"""A model with its versions: the life of a version from a passed evaluation to production and out of it again.

Every method is called with the model's row locked. It changes the versions held here and collects what it did: events for other services
and rows for the audit log, which the unit of work stores in the same transaction. Nothing here knows a clock, a store or a transport.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from registry.domain.approvals import Approval, ApprovalStatus, Vote
from registry.domain.audit import Audit
from registry.domain.errors import Malformed, Missing, Refused
from registry.domain.events import (
    ModelApprovalRequested,
    ModelArchived,
    ModelEvent,
    ModelPromoted,
    ModelReevaluationRequested,
    ModelRegistered,
    VersionRef,
)
from registry.domain.versions import Judgement, Stage, Version

CHAMPION = "champion"
"""The alias of the version in production; nobody sets it but a rollout that completed."""

MAX_REASON = 2_000
_ALIAS = re.compile(r"[A-Za-z][-_A-Za-z0-9]{0,62}")
_RESERVED_ALIAS = re.compile(r"latest|v[0-9]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the delivery asks of a version at the revision its journey began with.

    `obstacle` says why nothing may be promoted by this delivery at all (it was deleted, say); empty: nothing is in the way.
    """

    endpoint: str
    needed: int
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class By:
    """Who or which event does it, when and with which words of theirs."""

    actor: str
    at: datetime
    reason: str = ""
    person: bool = False
    """A person's command begins a trace of its own, so what it causes is told in the trace of the version's journey instead."""


class Model:
    """One model under lock, with the versions and requests for approval that a change may concern."""

    def __init__(
        self,
        model_id: UUID,
        name: str,
        created_at: datetime,
        *,
        latest: int = 0,
        champion: int = 0,
        sequence: int = 0,
        aliases: Mapping[str, int] | None = None,
        versions: Iterable[Version] = (),
        approvals: Iterable[Approval] = (),
    ) -> None:
        self.model_id = model_id
        self.name = name
        self.created_at = created_at
        self.latest = latest
        self.champion = champion
        self.sequence = sequence
        self.aliases = dict(aliases or {})
        self.versions = {version.number: version for version in versions}
        self.approvals = {approval.approval_id: approval for approval in approvals}
        self.events: list[tuple[int, ModelEvent, str]] = []
        """Sequence, event and traceparent (empty: the current one) of everything that happened here."""
        self.audits: list[Audit] = []
        self.requested: list[Approval] = []
        """Requests for approval made here: people are to be told."""

    # What evaluations say

    def passed(self, judgement: Judgement, policy: Policy, by: By, new_id: Callable[[], UUID], traceparent: str) -> Version:
        """A candidate passed its evaluation: a new version in Staging, which goes on as far as the gates let it.

        The same file of the same run is never a second version: a later evaluation renews its evidence. The same evaluation again changes
        nothing.
        """
        known = self._find(judgement.journey.run_id, judgement.candidate.sha256)
        if known is None:
            version = self._register(judgement, by, traceparent)
        else:
            evaluation = judgement.evidence.evaluation_id
            if known.evidence == judgement.evidence or known.last_evaluation == evaluation:
                return known
            if known.stage is not Stage.STAGING or known.rolling_out:
                state = "is rolling out" if known.rolling_out else f"stands in {known.stage}"
                self._audit(known, "version.evaluated", {}, {"evaluation": evaluation}, by, f"passed again, but {state}")
                known = self.versions[known.number] = replace(known, last_evaluation=evaluation)
                return known
            version = replace(
                known,
                journey=judgement.journey,
                evidence=judgement.evidence,
                provenance=judgement.provenance,
                last_evaluation="",
                judged_unfit=False,
            )
            self._withdraw(version.number, by, "evaluated again")
            self._put(version, "version.evaluated", by)
        return self._proceed(version, policy, by, new_id)

    def failed(self, run_id: str, sha256: str, evaluation: str, why: str, by: By) -> None:
        """A version that exists was evaluated again and did not pass, or could not be. A candidate that never passed is not known here.

        `sha256` empty: every version of the run; `evaluation` empty: none was made. Wherever it stands, the version goes through the
        gates no more on what it passed before: it is evaluated again first.
        """
        for version in list(self.versions.values()):
            if version.journey.run_id != run_id or (sha256 and version.deliverable.sha256 != sha256):
                continue
            judged = replace(version, last_evaluation=evaluation or version.last_evaluation, judged_unfit=True)
            if version.stage is Stage.STAGING and not version.rolling_out:
                self._withdraw(version.number, by, why)
                judged = replace(judged, reason=why)
            self._put(judged, "version.evaluated", by, evaluation=evaluation)

    # What people do

    def promote(self, number: int, policy: Policy, by: By, new_id: Callable[[], UUID], override: bool = False) -> Version:
        """Puts a version on its way to production through the same gates as a passed evaluation; `override` passes them by.

        Raises Refused when it is there already, on its way, or was rejected.
        """
        version = self.version(number)
        if version.rolling_out:
            return version
        if number == self.champion:
            raise Refused(f"version {number} of {self.name} is the champion already")
        if version.stage is not Stage.STAGING:
            if not override:
                raise Refused(f"version {number} of {self.name} stands in {version.stage}: only a version in Staging can be promoted")
            version = self._put(replace(version, stage=Stage.STAGING), "version.stage", by)
        if not override:
            rejected = self._decided(version, ApprovalStatus.REJECTED)
            if rejected is not None:
                raise Refused(f"version {number} of {self.name} was rejected by {rejected.votes[-1].subject}")
            return self._proceed(version, policy, by, new_id)
        if not policy.endpoint or policy.obstacle:
            raise Refused(policy.obstacle or "there is no endpoint to serve it at")
        return self._promote(version, policy, by, override=True)

    def vote(self, approval_id: UUID, vote: Vote, policy: Policy, by: By, new_id: Callable[[], UUID]) -> Approval:
        """Records a vote. When it decides, the version goes on, or stays in Staging with the reason."""
        approval = self.approvals.get(approval_id)
        if approval is None:
            raise Missing(f"there is no approval {approval_id}")
        voted = approval.vote(vote)
        if voted is approval:
            return approval
        version = self.version(approval.version)
        self._decide(approval, voted, "approval.vote", by)
        if voted.status is ApprovalStatus.REJECTED:
            why = f"rejected by {vote.subject}" + (f": {vote.comment}" if vote.comment else "")
            self._put(replace(version, reason=why), "version.reason", by)
        elif voted.status is ApprovalStatus.APPROVED:
            self._proceed(version, policy, by, new_id)
        else:
            missing = voted.needed - sum(given.approve for given in voted.votes)
            self._put(replace(version, reason=_waits(missing)), "version.reason", by)
        return self.approvals[approval_id]

    def set_stage(self, number: int, stage: Stage, by: By) -> Version:
        """Moves a version by hand between Development, Staging and Archived. Repeatable.

        Raises Refused for the champion and for a version that is rolling out.
        """
        version = self.version(number)
        if stage is Stage.PRODUCTION:
            raise Refused("Production is reached by promotion")
        if version.stage is stage:
            return version
        if number == self.champion:
            raise Refused(f"version {number} of {self.name} is the champion: promote another version, or revert its rollout")
        if version.rolling_out:
            raise Refused(f"version {number} of {self.name} is rolling out: abort the rollout first")
        self._withdraw(number, by, f"moved to {stage}")
        why = by.reason or f"moved to {stage} by {by.actor}"
        return self._move(version, stage, why, by)

    def set_alias(self, alias: str, number: int, by: By) -> Version:
        """Points an alias at a version. Repeatable. Raises Malformed for a name that cannot be, Refused for `champion`."""
        if alias == CHAMPION:
            raise Refused("champion is set by promotion")
        if not _ALIAS.fullmatch(alias) or _RESERVED_ALIAS.fullmatch(alias):
            raise Malformed("an alias has 1 to 63 letters, digits, - and _, begins with a letter, and is not latest or like v3")
        version = self.version(number)
        before = self.aliases.get(alias, 0)
        if before != number:
            self.aliases[alias] = number
            self._audit(None, "alias.set", {"version": before}, {"version": number}, by, alias=alias)
        return version

    def delete_alias(self, alias: str, by: By) -> None:
        """Takes an alias away. Repeatable. Raises Refused for `champion`."""
        if alias == CHAMPION:
            raise Refused("champion goes with the version in production")
        if alias in self.aliases:
            self._audit(None, "alias.delete", {"version": self.aliases.pop(alias)}, {}, by, alias=alias)

    def delivery_changed(self, delivery: str, why: str, by: By) -> None:
        """Withdraws the pending requests of a delivery that was deleted."""
        for approval in list(self.approvals.values()):
            if approval.delivery == delivery and approval.status is ApprovalStatus.PENDING:
                self._withdraw(approval.version, by, why)
                self._put(replace(self.version(approval.version), reason=why), "version.reason", by)

    # What rollouts say

    def progressed(self, number: int, how: str, by: By) -> None:
        """A rollout of the version went a step on."""
        version = self.version(number)
        if number != self.champion:
            self._put(replace(version, rolling_out=True, reason=f"rolling out: {how}"), "version.rollout", by)

    def completed(self, number: int, how: str, by: By) -> None:
        """The version has all traffic: it is the champion, and the one before is archived."""
        version = self.version(number)
        if number == self.champion:
            return
        self._dethrone(f"replaced by version {number}", by)
        self._crown(version, how, by)
        self._champion_changed(by)

    def rolled_back(self, number: int, harm: bool, why: str, by: By) -> None:
        """The rollout ended without completing: for harm the version is archived, else it is in Staging again with the cause."""
        version = self.version(number)
        if number == self.champion:
            raise Refused(f"version {number} of {self.name} is the champion: a rollout that completed is reverted, not rolled back")
        self._withdraw(number, by, why)
        self._move(replace(version, rolling_out=False), Stage.ARCHIVED if harm else Stage.STAGING, why, by)

    def superseded(self, number: int, by_version: int, by: By) -> None:
        """Another version took its place: Staging again. If that one became champion meanwhile, it has to be judged against it."""
        version = self.version(number)
        if number == self.champion:
            raise Refused(f"version {number} of {self.name} is the champion: nothing can supersede its rollout")
        version = self._move(replace(version, rolling_out=False), Stage.STAGING, f"superseded by version {by_version}", by)
        if by_version == self.champion != version.evidence.champion_version:
            self._reevaluate(version, by)

    def alarmed(self, number: int, why: str, by: By) -> None:
        """A version that had completed turned out to be bad; it stays where it is, and says so."""
        version = self.version(number)
        if number == self.champion:
            self._put(replace(version, reason=f"in production, with an alarm: {why}"[:MAX_REASON]), "version.alarm", by)

    def reverted(self, number: int, to: int, why: str, by: By) -> None:
        """A completed rollout was taken back: the earlier version is champion again, this one is archived."""
        if self.champion == to:
            return
        if self.champion != number:
            raise Refused(f"version {number} of {self.name} is not the champion: its rollout cannot be reverted")
        successor = self.version(to)
        self._dethrone(f"reverted to version {to}: {why}" if why else f"reverted to version {to}", by)
        self._crown(successor, f"back in production: the rollout of version {number} was reverted", by)
        self._champion_changed(by)

    # The gates

    def _proceed(self, version: Version, policy: Policy, by: By, new_id: Callable[[], UUID]) -> Version:
        """Takes a version in Staging as far as the gates let it: promoted, waiting for people, to be judged again, or standing."""
        number = version.number
        if policy.obstacle or not policy.endpoint:
            self._withdraw(number, by, policy.obstacle)
            return self._put(replace(version, reason=policy.obstacle or "the delivery serves no endpoint"), "version.reason", by)
        if version.judged_unfit:
            self._withdraw(number, by, "its last evaluation did not pass")
            return self._reevaluate(version, by)
        if not self._judged_by_champion(version):
            self._withdraw(number, by, "the champion changed")
            return self._reevaluate(version, by)
        newer = [other for other in self._pending() if other.version > number]
        if newer:
            return self._put(replace(version, reason=f"version {newer[0].version} is newer and waits for approval"), "version.reason", by)
        for older in self._pending():
            if older.version < number:
                self._withdraw(older.version, by, f"version {number} is newer")
                self._put(replace(self.version(older.version), reason=f"version {number} is newer"), "version.reason", by)
        if policy.needed and self._decided(version, ApprovalStatus.APPROVED) is None:
            return self._request(version, policy, by, new_id)
        return self._promote(version, policy, by)

    def _request(self, version: Version, policy: Policy, by: By, new_id: Callable[[], UUID]) -> Version:
        if any(pending.version == version.number for pending in self._pending()):
            return version
        approval = Approval(
            approval_id=new_id(),
            model_id=self.model_id,
            model=self.name,
            version=version.number,
            evaluation_id=version.evidence.evaluation_id,
            delivery=version.journey.delivery,
            delivery_revision=version.journey.delivery_revision,
            author=version.author,
            needed=policy.needed,
            requested_at=by.at,
        )
        self.approvals[approval.approval_id] = approval
        self.requested.append(approval)
        after = {"status": str(approval.status), "needed": approval.needed, "version": version.number, "evaluation": approval.evaluation_id}
        self.audits.append(Audit(by.at, by.actor, "approval.request", f"approval/{approval.approval_id}", {}, after))
        event = ModelApprovalRequested(self._ref(version), version.journey, approval.approval_id, approval.evaluation_id, approval.needed)
        self._emit(event, version, by)
        return self._put(replace(version, reason=_waits(policy.needed)), "version.reason", by)

    def _promote(self, version: Version, policy: Policy, by: By, override: bool = False) -> Version:
        self._withdraw(version.number, by, f"{by.actor} passed the gates by" if override else "promoted")
        event = ModelPromoted(
            version=self._ref(version),
            journey=version.journey,
            endpoint=policy.endpoint,
            deliverable=version.deliverable,
            evaluation_id=version.evidence.evaluation_id,
            promoted_by=by.actor,
            champion_version=self.champion,
            override=override,
        )
        self._emit(event, version, by)
        why = "rolling out" if not override else "rolling out: the gates were passed by"
        return self._put(replace(version, rolling_out=True, reason=why), "version.promote", by, override=override)

    def _reevaluate(self, version: Version, by: By) -> Version:
        """Asks for another evaluation in place of the newest one: an older one has been replaced already, and is not judged twice."""
        if version.judged_unfit:
            why = "its last evaluation did not pass: evaluated again"
        else:
            why = (
                f"judged against {_named(version.evidence.champion_version)}, but the champion is {_named(self.champion)}: evaluated again"
            )
        newest = version.last_evaluation or version.evidence.evaluation_id
        event = ModelReevaluationRequested(self.model_id, version.journey, newest, self.champion, why)
        self._emit(event, version, by)
        return self._put(replace(version, reason=why), "version.reason", by)

    def _judged_by_champion(self, version: Version) -> bool:
        if version.evidence.champion_version != self.champion:
            return False
        if not self.champion:
            return True
        return version.evidence.champion_sha256 in ("", self.version(self.champion).deliverable.sha256)

    def _champion_changed(self, by: By) -> None:
        """Requests that people would decide on evidence that is out of date are withdrawn, and the versions judged again."""
        for approval in self._pending():
            version = self.version(approval.version)
            self._withdraw(version.number, by, "the champion changed")
            if version.number != self.champion:
                self._reevaluate(version, by)

    # The pieces

    def version(self, number: int) -> Version:
        """A version that was loaded. Raises Missing."""
        try:
            return self.versions[number]
        except KeyError:
            raise Missing(f"{self.name} has no version {number}") from None

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """All aliases of a version, `champion` first."""
        own = sorted(alias for alias, version in self.aliases.items() if version == number)
        return (CHAMPION, *own) if number == self.champion else tuple(own)

    def _register(self, judgement: Judgement, by: By, traceparent: str) -> Version:
        self.latest += 1
        version = Version(
            number=self.latest,
            journey=judgement.journey,
            deliverable=judgement.candidate,
            evidence=judgement.evidence,
            author=judgement.author,
            provenance=judgement.provenance,
            created_at=by.at,
            traceparent=traceparent,
            reason="registered",
        )
        self._put(version, "version.register", by)
        self._emit(ModelRegistered(self._ref(version), version.journey, version.deliverable, version.evidence.evaluation_id), version, by)
        return version

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
        if before != version:
            self.versions[version.number] = version
            self._audit(version, action, _shown(before), _shown(version) | more, by)
        elif more.get("override"):
            self._audit(version, action, _shown(before), _shown(version) | more, by)
        return version

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

    def _find(self, run_id: str, sha256: str) -> Version | None:
        same = (v for v in self.versions.values() if v.journey.run_id == run_id and v.deliverable.sha256 == sha256)
        return next(same, None)

    def _pending(self) -> list[Approval]:
        pending = [approval for approval in self.approvals.values() if approval.status is ApprovalStatus.PENDING]
        return sorted(pending, key=lambda approval: approval.version, reverse=True)

    def _decided(self, version: Version, status: ApprovalStatus) -> Approval | None:
        """The request for exactly this version, evaluation and revision that ended so."""
        bound = (version.number, version.evidence.evaluation_id, version.journey.delivery, version.journey.delivery_revision)
        for approval in self.approvals.values():
            binds = (approval.version, approval.evaluation_id, approval.delivery, approval.delivery_revision)
            if approval.status is status and binds == bound:
                return approval
        return None

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
    return {
        "stage": str(version.stage),
        "reason": version.reason,
        "rolling_out": version.rolling_out,
        "evaluation": version.evidence.evaluation_id,
        "run": version.journey.run_id,
        "sha256": version.deliverable.sha256,
    }


def _votes(approval: Approval) -> dict[str, Any]:
    return {
        "status": str(approval.status),
        "votes": [{"subject": v.subject, "approve": v.approve, "comment": v.comment} for v in approval.votes],
    }


def _waits(missing: int) -> str:
    return f"waits for {missing} approval{'s' if missing != 1 else ''}"


def _named(champion: int) -> str:
    return f"version {champion}" if champion else "no champion"
