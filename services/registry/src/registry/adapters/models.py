"""Models in PostgreSQL: the model's row is the lock of everything under it, and holds the sequence of its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from registry.adapters.audit import SqlAudit
from registry.adapters.outgoing import Outgoing
from registry.adapters.tables import approval, approval_vote, model, model_alias, model_version
from registry.adapters.webhooks import WebhookQueue
from registry.domain.approvals import Approval, ApprovalStatus, Vote
from registry.domain.errors import Taken
from registry.domain.models import CHAMPION, Model
from registry.domain.versions import Deliverable, Evidence, Journey, Origin, Stage, Version
from registry.ports import ModelSummary, VersionView

MAX_APPROVALS_LISTED = 500
_ORIGIN = ("source", "path", "logged_model", "storage", "run_link", "registered_by")


class SqlModels:
    """Implements ports.ModelRepository within one transaction."""

    def __init__(self, conn: AsyncConnection, outgoing: Outgoing, audit: SqlAudit, webhooks: WebhookQueue) -> None:
        self._conn = conn
        self._outgoing = outgoing
        self._audit = audit
        self._webhooks = webhooks
        self._loaded: dict[UUID, tuple[dict[int, Version], dict[UUID, Approval], dict[str, int]]] = {}

    async def lock(
        self, name: str | UUID, versions: Sequence[int] = (), run_id: str = "", logged_model: str = "", stage: str = ""
    ) -> Model | None:
        which = model.c.id == name if isinstance(name, UUID) else _named(name)
        row = (await self._conn.execute(select(model).where(which).with_for_update())).first()
        if row is None:
            return None
        requests = await self._approvals(approval.c.model_id == row.id, approval.c.status == ApprovalStatus.PENDING)
        numbers = {row.champion, *versions, *(request.version for request in requests)}
        # An empty text names nothing: versions without a run are not of one run.
        alike = (model_version.c.run_id, run_id), (model_version.c.logged_model, logged_model), (model_version.c.stage, stage)
        wanted = or_(
            model_version.c.number.in_(numbers), model_version.c.rolling_out, *(column == value for column, value in alike if value)
        )
        loaded = await self._versions(model_version.c.model_id == row.id, wanted)
        # What was decided on the versions at hand decides whether they go on.
        decided = await self._approvals(
            approval.c.model_id == row.id,
            approval.c.version.in_([version.number for version in loaded]),
            approval.c.status != ApprovalStatus.PENDING,
        )
        aliases = await self._aliases(row.id)
        approvals = [*requests, *decided]
        self._loaded[row.id] = ({v.number: v for v in loaded}, {a.approval_id: a for a in approvals}, dict(aliases))
        return Model(
            row.id,
            row.name,
            row.created_at,
            latest=row.latest,
            champion=row.champion,
            previous=row.previous,
            sequence=row.sequence,
            description=row.description,
            tags=row.tags,
            updated_at=row.updated_at,
            deleted=row.deleted,
            aliases=aliases,
            versions=loaded,
            approvals=approvals,
        )

    async def create(self, model_id: UUID, name: str, at: datetime) -> bool:
        row = {"id": model_id, "name": name, "latest": 0, "champion": 0, "sequence": 0, "created_at": at, "updated_at": at}
        made = upsert(model).values(row).on_conflict_do_nothing(index_elements=["name"], index_where=~model.c.deleted)
        return (await self._conn.execute(made.returning(model.c.id))).first() is not None

    async def save(self, changed: Model) -> None:
        versions, approvals, aliases = self._loaded[changed.model_id]
        # What leaves production goes first: the database allows no second version there, not even in between.
        for number, version in sorted(changed.versions.items(), key=lambda item: item[1].stage is Stage.PRODUCTION):
            if number not in versions:
                await self._conn.execute(insert(model_version).values(_version_row(changed.model_id, version)))
            elif versions[number] != version:
                row = _version_row(changed.model_id, version)
                same = (model_version.c.model_id == changed.model_id) & (model_version.c.number == number)
                await self._conn.execute(update(model_version).where(same).values(row))
        for approval_id, request in changed.approvals.items():
            if approvals.get(approval_id) != request:
                await self._save_approval(approvals.get(approval_id), request)
        if changed.aliases != aliases:
            await self._conn.execute(delete(model_alias).where(model_alias.c.model_id == changed.model_id))
            if changed.aliases:
                rows = [{"model_id": changed.model_id, "alias": alias, "version": v} for alias, v in changed.aliases.items()]
                await self._conn.execute(insert(model_alias), rows)
        for sequence, event, traceparent in changed.events:
            await self._outgoing.add(event, str(changed.model_id), sequence, traceparent)
        await self._audit.add(changed.audits)
        for request in changed.requested:
            await self._webhooks.add(request)
        fields = ("name", "latest", "champion", "previous", "sequence", "description", "tags", "updated_at", "deleted")
        head = {field: getattr(changed, field) for field in fields}
        try:
            await self._conn.execute(update(model).where(model.c.id == changed.model_id).values(head))
        except IntegrityError as error:
            if "model_name" not in str(error.orig):
                raise
            raise Taken(f"Registered Model (name={changed.name}) already exists.") from error
        self._loaded.pop(changed.model_id)

    async def awaiting(self, delivery: str) -> Sequence[UUID]:
        query = select(approval.c.model_id).distinct().where(approval.c.delivery == delivery, approval.c.status == ApprovalStatus.PENDING)
        return list((await self._conn.execute(query.order_by(approval.c.model_id))).scalars())

    async def journey(self, name: str, number: int) -> Journey | None:
        query = select(model_version).join(model, model.c.id == model_version.c.model_id)
        row = (await self._conn.execute(query.where(_named(name), *_numbered(number)))).mappings().first()
        return None if row is None else _journey(row)

    async def approval(self, approval_id: UUID) -> Approval | None:
        found = await self._approvals(approval.c.id == approval_id)
        return found[0] if found else None

    async def approvals(self, status: str, name: str) -> Sequence[Approval]:
        conditions = []
        if status:
            conditions.append(approval.c.status == status)
        if name:
            conditions.append(_named(name))
        return await self._approvals(*conditions)

    async def summaries(self) -> Sequence[ModelSummary]:
        query = select(model).where(~model.c.deleted).order_by(model.c.name)
        return [ModelSummary(row.id, row.name, row.latest, row.champion, row.created_at) for row in await self._conn.execute(query)]

    async def view(self, name: str, number: int, alias: str) -> VersionView | None:
        found = (await self._conn.execute(select(model).where(_named(name)))).first()
        if found is None:
            return None
        aliases = await self._aliases(found.id)
        if not number:
            number = found.champion if alias == CHAMPION else aliases.get(alias, 0)
        versions = await self._versions(model_version.c.model_id == found.id, *_numbered(number))
        return _view(found, versions[0], aliases) if versions else None

    async def views(self, name: str, below: int, limit: int) -> Sequence[VersionView] | None:
        found = (await self._conn.execute(select(model).where(_named(name)))).first()
        if found is None:
            return None
        conditions = [model_version.c.model_id == found.id, ~model_version.c.deleted]
        if below:
            conditions.append(model_version.c.number < below)
        aliases = await self._aliases(found.id)
        return [_view(found, version, aliases) for version in await self._versions(*conditions, limit=limit)]

    async def _versions(self, *conditions: Any, limit: int | None = None) -> list[Version]:
        query = select(model_version).where(*conditions).order_by(model_version.c.number.desc()).limit(limit)
        return [_version(row) for row in (await self._conn.execute(query)).mappings()]

    async def _aliases(self, model_id: UUID) -> dict[str, int]:
        query = select(model_alias.c.alias, model_alias.c.version).where(model_alias.c.model_id == model_id)
        return {row.alias: row.version for row in await self._conn.execute(query)}

    async def _approvals(self, *conditions: Any) -> list[Approval]:
        """Newest first."""
        query = select(approval, model.c.name.label("model")).join(model, model.c.id == approval.c.model_id).where(*conditions)
        query = query.order_by(approval.c.requested_at.desc(), approval.c.id.desc()).limit(MAX_APPROVALS_LISTED)
        rows = (await self._conn.execute(query)).mappings().all()
        votes: dict[UUID, list[Vote]] = {row["id"]: [] for row in rows}
        if rows:
            cast = (
                select(approval_vote)
                .where(approval_vote.c.approval_id.in_(list(votes)))
                .order_by(approval_vote.c.at, approval_vote.c.subject)
            )
            for row in await self._conn.execute(cast):
                votes[row.approval_id].append(Vote(row.subject, row.approve, row.comment, row.at))
        return [_approval(row, tuple(votes[row["id"]])) for row in rows]

    async def _save_approval(self, before: Approval | None, after: Approval) -> None:
        if before is None:
            await self._conn.execute(insert(approval).values(_approval_row(after)))
        elif before.status != after.status:
            await self._conn.execute(update(approval).where(approval.c.id == after.approval_id).values(status=str(after.status)))
        for vote in after.votes[len(before.votes) if before else 0 :]:
            row = {
                "approval_id": after.approval_id,
                "subject": vote.subject,
                "approve": vote.approve,
                "comment": vote.comment,
                "at": vote.at,
            }
            await self._conn.execute(insert(approval_vote).values(row))


def _named(name: str) -> Any:
    return (model.c.name == name) & ~model.c.deleted


def _numbered(number: int) -> tuple[Any, Any]:
    return model_version.c.number == number, ~model_version.c.deleted


def _view(found: Any, version: Version, aliases: Mapping[str, int]) -> VersionView:
    own = sorted(alias for alias, number in aliases.items() if number == version.number)
    return VersionView(found.id, found.name, version, (CHAMPION, *own) if version.number == found.champion else tuple(own))


def _journey(row: Mapping[Any, Any]) -> Journey:
    return Journey(row["journey_id"], row["delivery"], row["delivery_revision"], row["run_id"])


def _version(row: Mapping[Any, Any]) -> Version:
    return Version(
        number=row["number"],
        journey=_journey(row),
        deliverable=Deliverable(
            row["model_name"],
            row["format"],
            row["blob_sha256"],
            row["blob_size"],
            row["blob_key"],
            bytes(row["deliverable"]),
            row["logged_model"] if row["blob_sha256"] else "",
        ),
        evidence=Evidence(row["evaluation_id"], row["champion_version"], row["champion_sha256"], row["report_key"]),
        author=row["author"],
        provenance=row["provenance"],
        created_at=row["created_at"],
        traceparent=row["traceparent"],
        stage=Stage(row["stage"]),
        reason=row["reason"],
        rolling_out=row["rolling_out"],
        last_evaluation=row["last_evaluation"],
        judged_unfit=row["judged_unfit"],
        origin=Origin(**{name: row[name] for name in _ORIGIN}),
        description=row["description"],
        tags=row["tags"],
        updated_at=row["updated_at"],
        deleted=row["deleted"],
    )


def _version_row(model_id: UUID, version: Version) -> dict[str, Any]:
    return {
        "model_id": model_id,
        "number": version.number,
        "stage": str(version.stage),
        "reason": version.reason,
        "rolling_out": version.rolling_out,
        "last_evaluation": version.last_evaluation,
        "judged_unfit": version.judged_unfit,
        "run_id": version.journey.run_id,
        "journey_id": version.journey.journey_id,
        "delivery": version.journey.delivery,
        "delivery_revision": version.journey.delivery_revision,
        "blob_sha256": version.deliverable.sha256,
        "blob_size": version.deliverable.size_bytes,
        "blob_key": version.deliverable.key,
        "format": version.deliverable.format,
        "model_name": version.deliverable.name,
        "deliverable": version.deliverable.encoded,
        "evaluation_id": version.evidence.evaluation_id,
        "champion_version": version.evidence.champion_version,
        "champion_sha256": version.evidence.champion_sha256,
        "report_key": version.evidence.report_key,
        "author": version.author,
        "provenance": dict(version.provenance),
        "traceparent": version.traceparent,
        "created_at": version.created_at,
        **{name: getattr(version.origin, name) for name in _ORIGIN},
        "description": version.description,
        "tags": dict(version.tags),
        "updated_at": version.updated_at or version.created_at,
        "deleted": version.deleted,
    }


def _approval(row: Mapping[Any, Any], votes: tuple[Vote, ...]) -> Approval:
    return Approval(
        approval_id=row["id"],
        model_id=row["model_id"],
        model=row["model"],
        version=row["version"],
        evaluation_id=row["evaluation_id"],
        delivery=row["delivery"],
        delivery_revision=row["delivery_revision"],
        author=row["author"],
        needed=row["needed"],
        requested_at=row["requested_at"],
        status=ApprovalStatus(row["status"]),
        votes=votes,
    )


def _approval_row(request: Approval) -> dict[str, Any]:
    return {
        "id": request.approval_id,
        "model_id": request.model_id,
        "version": request.version,
        "evaluation_id": request.evaluation_id,
        "delivery": request.delivery,
        "delivery_revision": request.delivery_revision,
        "author": request.author,
        "needed": request.needed,
        "status": str(request.status),
        "requested_at": request.requested_at,
    }
