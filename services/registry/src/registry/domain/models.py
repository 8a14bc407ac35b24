"""A model with its versions: the life of a version from a passed evaluation to production and out of it again.

Every method is called with the model's row locked. It changes the versions held here and collects what it did: events for other services
and rows for the audit log, which the unit of work stores in the same transaction. Nothing here knows a clock, a store or a transport.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from registry.domain.approvals import Approval, ApprovalStatus, Vote
from registry.domain.audit import Audit
from registry.domain.catalogued import CataloguedModel
from registry.domain.errors import Missing, Refused
from registry.domain.events import ModelApprovalRequested, ModelPromoted, ModelReevaluationRequested, ModelRegistered
from registry.domain.held import MAX_REASON, By
from registry.domain.names import CHAMPION
from registry.domain.versions import Deliverable, Judgement, Origin, Stage, Version

__all__ = ["CHAMPION", "MAX_REASON", "By", "Model", "Policy"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the delivery asks of a version at the revision its journey began with.

    `obstacle` says why nothing may be promoted by this delivery at all (it was deleted, say); empty: nothing is in the way.
    """

    endpoint: str
    needed: int
    obstacle: str = ""


class Model(CataloguedModel):
    """A model under lock, and all that can happen to it."""

    # What evaluations say

    def passed(self, judgement: Judgement, policy: Policy, by: By, new_id: Callable[[], UUID], traceparent: str) -> Version:
        """A candidate passed its evaluation: a version in Staging, which goes on as far as the gates let it.

        The same file of the same run is never a second version: a later evaluation renews its evidence, and one that a client has
        registered from this run, and that no evaluation has looked at, becomes the version of this evaluation. The same evaluation again
        changes nothing; a version that was deleted stays so.
        """
        known = self._find(judgement.journey.run_id, judgement.candidate.sha256)
        if known is None:
            awaited = self._awaited(judgement.journey.run_id, judgement.candidate)
            if awaited is None:
                version = self._register(judgement, by, traceparent)
            else:
                version = self._stand_on(awaited, judgement)
                origin = replace(version.origin, logged_model=version.origin.logged_model or judgement.candidate.logged_model)
                version = replace(
                    version, origin=origin, deliverable=judgement.candidate, author=judgement.author, traceparent=traceparent,
                    stage=Stage.STAGING, reason="passed its evaluation",
                )  # fmt: skip
                self._put(version, "version.evaluated", by)
        else:
            evaluation = judgement.evidence.evaluation_id
            if known.evidence == judgement.evidence or known.last_evaluation == evaluation:
                return known
            if known.deleted or known.stage is not Stage.STAGING or known.rolling_out:
                state = "was deleted" if known.deleted else "is rolling out" if known.rolling_out else f"stands in {known.stage}"
                self._audit(known, "version.evaluated", {}, {"evaluation": evaluation}, by, f"passed again, but {state}")
                known = self.versions[known.number] = replace(known, last_evaluation=evaluation)
                return known
            version = self._stand_on(known, judgement)
            self._withdraw(version.number, by, "evaluated again")
            self._put(version, "version.evaluated", by)
        return self._proceed(version, policy, by, new_id)

    def failed(self, run_id: str, candidate: Deliverable | None, evaluation: str, why: str, by: By) -> None:
        """A version that exists was evaluated again and did not pass, or could not be. A candidate that never passed is not known here,
        unless a client registered it: then it says why it stays where it is.

        No candidate: every version of the run; `evaluation` empty: none was made. Wherever it stands, the version goes through the
        gates no more on what it passed before: it is evaluated again first.
        """
        for version in list(self.versions.values()):
            if version.deleted:
                continue
            if not version.evaluated:
                concerned = version.is_of(run_id, candidate) if candidate else version.journey.run_id == run_id
                if concerned and version.stage is not Stage.ARCHIVED:
                    self._put(replace(version, reason=why), "version.evaluated", by, evaluation=evaluation)
                continue
            if version.journey.run_id != run_id or (candidate and version.deliverable.sha256 != candidate.sha256):
                continue
            judged = replace(version, last_evaluation=evaluation or version.last_evaluation, judged_unfit=True)
            if version.stage is Stage.STAGING and not version.rolling_out:
                self._withdraw(version.number, by, why)
                judged = replace(judged, reason=why)
            self._put(judged, "version.evaluated", by, evaluation=evaluation)

    # What people do

    def promote(self, number: int, policy: Policy, by: By, new_id: Callable[[], UUID], override: bool = False) -> Version:
        """Puts a version on its way to production through the same gates as a passed evaluation; `override` passes them by.

        Raises Refused when it is there already, was rejected, or has passed no evaluation: without one there is no file that could be
        served, so that nothing overrides it.
        """
        version = self.version(number)
        if not version.evaluated:
            raise Refused(f"version {number} of {self.name} cannot be promoted: {policy.obstacle or self._missing_evidence(version)}")
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

    def set_stage(self, number: int, stage: Stage, by: By, *, archive_others: bool = False) -> Version:
        """Moves a version by hand between Development, Staging and Archived; with `archive_others` those that stand there go to Archived,
        all that were loaded. Repeatable.

        Raises Refused for the champion and for a version that is rolling out.
        """
        if archive_others:
            for other in [one for one in self.versions.values() if one.number != number and one.stage is stage and not one.deleted]:
                self.set_stage(other.number, Stage.ARCHIVED, replace(by, reason=f"version {number} was moved to {stage} in its place"))
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
        self.previous = self.champion
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
        if not successor.evaluated:
            raise Refused(f"version {to} of {self.name} has no file that could have been served")
        self._dethrone(f"reverted to version {to}: {why}" if why else f"reverted to version {to}", by)
        self.previous = 0
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
            origin=_origin(judgement),
        )
        self._put(version, "version.register", by)
        self._emit(ModelRegistered(self._ref(version), version.journey, version.deliverable, version.evidence.evaluation_id), version, by)
        return version

    def _stand_on(self, version: Version, judgement: Judgement) -> Version:
        return replace(
            version,
            journey=judgement.journey,
            evidence=judgement.evidence,
            provenance=judgement.provenance,
            last_evaluation="",
            judged_unfit=False,
        )

    def _awaited(self, run_id: str, candidate: Deliverable) -> Version | None:
        """The newest version that a client registered of this model of this run, and that stands where an evaluation is awaited."""
        waiting = (Stage.DEVELOPMENT, Stage.STAGING)
        found = [one for one in self.versions.values() if one.is_of(run_id, candidate) and one.stage in waiting]
        return max((one for one in found if not one.evaluated and not one.deleted), key=lambda one: one.number, default=None)

    def _missing_evidence(self, version: Version) -> str:
        run_id = version.journey.run_id
        judged = [one.number for one in self.versions.values() if one.evaluated and one.journey.run_id == run_id and not one.deleted]
        if run_id and judged:
            return f"what its run was evaluated for is version {judged[0]}"
        said = "" if version.reason in ("registered", "") else f" ({version.reason})"
        return f"it has passed no evaluation{said}"

    def _find(self, run_id: str, sha256: str) -> Version | None:
        same = (v for v in self.versions.values() if v.journey.run_id == run_id and v.deliverable.sha256 == sha256)
        return next(same, None)

    def _decided(self, version: Version, status: ApprovalStatus) -> Approval | None:
        """The request for exactly this version, evaluation and revision that ended so."""
        bound = (version.number, version.evidence.evaluation_id, version.journey.delivery, version.journey.delivery_revision)
        for approval in self.approvals.values():
            binds = (approval.version, approval.evaluation_id, approval.delivery, approval.delivery_revision)
            if approval.status is status and binds == bound:
                return approval
        return None


def _waits(missing: int) -> str:
    return f"waits for {missing} approval{'s' if missing != 1 else ''}"


def _named(champion: int) -> str:
    return f"version {champion}" if champion else "no champion"


def _origin(judgement: Judgement) -> Origin:
    """A version that came by its evaluation, in the words of those who register by hand."""
    candidate, run_id = judgement.candidate, judgement.journey.run_id
    source = f"models:/{candidate.logged_model}" if candidate.logged_model else f"runs:/{run_id}/{candidate.name}"
    return Origin(source=source, path=candidate.name, logged_model=candidate.logged_model, storage=source)
