"""Use cases of versions: what evaluations and rollouts say of them, and what people do with them.

What an event says is applied in the transaction of the consumer, which is handed in as a session; what a person does has one of its own.
Rows are locked in one order everywhere: the delivery, then the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from servicekit.access import Caller
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, Violation
from servicekit.paging import page_size

from registry.domain.approvals import Approval, Vote
from registry.domain.deliveries import Claim
from registry.domain.errors import Malformed
from registry.domain.models import CHAMPION, MAX_REASON, By, Model, Policy
from registry.domain.versions import Deliverable, Journey, Judgement, Stage
from registry.handlers.telling import told
from registry.ports import ModelSummary, Session, Store, VersionView


class VersionEvents:
    """What other services' events do to versions."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    async def passed(self, session: Session, judgement: Judgement, by: By, traceparent: str) -> None:
        """eval.passed: a version in Staging, which goes on as far as the gates let it."""
        with told():
            policy = await _policy(session, judgement.journey, judgement.model)
            await session.models.create(self._ids.uuid7(), judgement.model, by.at)
            run_id, logged_model = judgement.journey.run_id, judgement.candidate.logged_model
            model = await _model(session, judgement.model, run_id=run_id, logged_model=logged_model)
            model.passed(judgement, policy, by, self._ids.uuid7, traceparent)
            await session.models.save(model)

    async def failed(
        self, session: Session, model_name: str, run_id: str, candidate: Deliverable | None, evaluation: str, why: str, by: By
    ) -> None:
        """eval.failed or eval.skipped (no candidate): matters only to versions that exist."""
        with told():
            model = await session.models.lock(model_name, run_id=run_id, logged_model=candidate.logged_model if candidate else "")
            if model is not None:
                model.failed(run_id, candidate, evaluation, why[:MAX_REASON], by)
                await session.models.save(model)

    async def progressed(self, session: Session, model_id: UUID, version: int, how: str, by: By) -> None:
        """deploy.canary, deploy.advanced"""
        with told():
            model = await _model(session, model_id, version)
            model.progressed(version, how, by)
            await session.models.save(model)

    async def completed(self, session: Session, model_id: UUID, version: int, how: str, by: By) -> None:
        """deploy.completed: champion; the one before it archived."""
        with told():
            model = await _model(session, model_id, version)
            model.completed(version, how, by)
            await session.models.save(model)

    async def rolled_back(self, session: Session, model_id: UUID, version: int, harm: bool, why: str, by: By) -> None:
        """deploy.rolled_back"""
        with told():
            model = await _model(session, model_id, version)
            model.rolled_back(version, harm, why[:MAX_REASON], by)
            await session.models.save(model)

    async def superseded(self, session: Session, model_id: UUID, version: int, by_version: int, by: By) -> None:
        """deploy.superseded"""
        with told():
            model = await _model(session, model_id, version)
            model.superseded(version, by_version, by)
            await session.models.save(model)

    async def alarmed(self, session: Session, model_id: UUID, version: int, why: str, by: By) -> None:
        """deploy.alarmed"""
        with told():
            model = await _model(session, model_id, version)
            model.alarmed(version, why, by)
            await session.models.save(model)

    async def reverted(self, session: Session, model_id: UUID, version: int, to_version: int, why: str, by: By) -> None:
        """deploy.reverted: the earlier version has its stage and alias back."""
        with told():
            model = await _model(session, model_id, version, to_version)
            model.reverted(version, to_version, why[:MAX_REASON], by)
            await session.models.save(model)


class Versions:
    """What people do with models, versions, aliases and approvals."""

    def __init__(self, store: Store, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids

    async def promote(
        self, caller: Caller, name: str, number: int, reason: str = "", override: bool = False, *, repeatable: bool = False
    ) -> VersionView:
        """Starts a version on its way to production, as a passed evaluation does, and answers how far it got: `reason` says it.

        `override` passes the gates by; admins only, recorded. Raises NotFound, Forbidden, and Conflict, also for the champion itself
        unless it is `repeatable`.
        """
        if override and "admin" not in caller.roles:
            raise Forbidden("only an admin passes the gates by")
        by = self._by(caller, reason)
        with told():
            async with self._store.transaction() as session:
                policy, model = await self._locked(session, name, number)
                if repeatable and number == model.champion:
                    return _view(model, number)
                model.promote(number, policy, by, self._ids.uuid7, override)
                await session.models.save(model)
                return _view(model, number)

    async def set_stage(
        self, caller: Caller, name: str, number: int, stage: str, reason: str = "", *, archive_others: bool = False
    ) -> VersionView:
        """Moves a version to a stage; to Production it is `promote`. Repeatable.

        `archive_others` sends those that stand there to Archived, which a promotion does by itself once its rollout has completed.
        """
        if stage not in list(Stage):
            raise Invalid("not a stage", [Violation("stage", f"must be one of {', '.join(Stage)}")])
        if stage == Stage.PRODUCTION:
            return await self.promote(caller, name, number, reason, repeatable=True)
        by = self._by(caller, reason)
        with told():
            async with self._store.transaction() as session:
                model = await _model(session, name, number, stage=stage if archive_others else "")
                model.set_stage(number, Stage(stage), by, archive_others=archive_others)
                await session.models.save(model)
                return _view(model, number)

    async def set_alias(self, caller: Caller, name: str, alias: str, number: int) -> VersionView:
        """Points an alias at a version; `champion` is `promote`. Repeatable."""
        if alias == CHAMPION:
            return await self.promote(caller, name, number, f"alias {CHAMPION} asked for", repeatable=True)
        by = self._by(caller, "")
        with told():
            async with self._store.transaction() as session:
                model = await _model(session, name, number)
                model.set_alias(alias, number, by)
                await session.models.save(model)
                return _view(model, number)

    async def delete_alias(self, caller: Caller, name: str, alias: str) -> None:
        """Takes an alias away. Repeatable."""
        by = self._by(caller, "")
        with told():
            async with self._store.transaction() as session:
                model = await _model(session, name)
                model.delete_alias(alias, by)
                await session.models.save(model)

    async def decide(self, caller: Caller, approval_id: UUID, approve: bool, comment: str) -> Approval:
        """Votes on a request for approval; the vote that decides sends the version on, or leaves it where it is.

        The same vote again changes nothing. Raises NotFound, Conflict, and Forbidden for the version's author.
        """
        by = self._by(caller, "")
        with told():
            async with self._store.transaction() as session:
                approval = await session.models.approval(approval_id)
                if approval is None:
                    raise NotFound(f"there is no approval {approval_id}")
                policy, model = await self._locked(session, approval.model, approval.version)
                decided = model.vote(approval_id, Vote(caller.name, approve, comment, by.at), policy, by, self._ids.uuid7)
                await session.models.save(model)
                return decided

    async def approvals(self, status: str = "", model: str = "") -> Sequence[Approval]:
        """Requests for approval, newest first."""
        async with self._store.snapshot() as session:
            return await session.models.approvals(status, model)

    async def models(self) -> Sequence[ModelSummary]:
        """All models, by name."""
        async with self._store.snapshot() as session:
            return await session.models.summaries()

    async def get(self, name: str, number: int = 0, alias: str = "") -> VersionView:
        """A version by number or alias. Raises NotFound."""
        async with self._store.snapshot() as session:
            found = await session.models.view(name, number, alias)
        if found is None:
            raise NotFound(f"{name or 'a model without name'} has no version {number or alias or '(neither number nor alias given)'}")
        return found

    async def page(self, name: str, below: int = 0, limit: int = 0) -> Sequence[VersionView]:
        """Versions below a number, newest first. Raises NotFound when there is no such model."""
        async with self._store.snapshot() as session:
            found = await session.models.views(name, below, page_size(limit))
        if found is None:
            raise NotFound(f"there is no model {name}")
        return found

    def _by(self, caller: Caller, reason: str) -> By:
        if len(reason) > MAX_REASON:
            raise Invalid(f"a reason may have {MAX_REASON} characters at most")
        return By(caller.name, self._clock.now(), reason, person=True)

    async def _locked(self, session: Session, name: str, number: int) -> tuple[Policy, Model]:
        """Locks the delivery of a version, then its model."""
        journey = await session.models.journey(name, number)
        if journey is None:
            raise NotFound(f"there is no version {number} of {name}")
        if journey.delivery:
            policy = await _policy(session, journey, name, promoting=True)
        else:
            policy = Policy("", 0, await _untravelled(session, journey, name))
        model = await _model(session, name, number, run_id=journey.run_id)
        if model.version(number).journey != journey:
            raise Conflict(f"version {number} of {name} has been evaluated this moment: try again")
        return policy, model


async def _model(session: Session, model: str | UUID, *versions: int, run_id: str = "", logged_model: str = "", stage: str = "") -> Model:
    found = await session.models.lock(model, versions=versions, run_id=run_id, logged_model=logged_model, stage=stage)
    if found is None:
        raise NotFound(f"there is no model {model}")
    return found


async def _untravelled(session: Session, journey: Journey, model: str) -> str:
    """What a version without a journey lacks before all else; empty when only its evaluation has not passed."""
    claim = Claim("model", model)
    if claim not in await session.deliveries.holders([claim], other_than=""):
        return f"no delivery brings {model} to production: apply one that names it under promote.model"
    return "" if journey.run_id else "it names no run whose evaluation could have passed"


async def _policy(session: Session, journey: Journey, model: str, promoting: bool = False) -> Policy:
    """What the delivery asks at the revision the journey began with; the delivery stays as it is until the transaction ends.

    A model that has another name now is no delivery's: an obstacle when `promoting`, else the journey was never one of it.
    """
    current = await session.deliveries.current(journey.delivery, lock="share")
    revision = await session.deliveries.revision(journey.delivery, journey.delivery_revision)
    if current is None or revision is None:
        raise Malformed(f"there is no delivery {journey.delivery!r} with revision {journey.delivery_revision}")
    if revision.model != model and not promoting:
        raise Malformed(f"revision {revision.revision} of {revision.name} delivers {revision.model}, not {model}")
    obstacle = ""
    if current.deleted:
        obstacle = f"the delivery {current.name} was deleted"
    elif revision.model != model:
        obstacle = f"the delivery {current.name} brings {revision.model} to production, not {model}"
    elif (current.model, current.endpoint) != (revision.model, revision.endpoint):
        obstacle = f"the delivery {current.name} no longer brings {revision.model} to {revision.endpoint or 'no endpoint'}"
    return Policy(revision.endpoint, revision.approvals, obstacle)


def _view(model: Model, number: int) -> VersionView:
    return VersionView(model.model_id, model.name, model.version(number), model.aliases_of(number))
