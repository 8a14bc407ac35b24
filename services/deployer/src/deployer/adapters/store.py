"""The deployer's store on PostgreSQL: transactions, and what can be read without one. Reads and writes by Core, rows are few."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from eventing.envelope import Event as Envelope
from eventing.outbox import Outbox
from jobs import JobQueue
from pydantic import TypeAdapter
from servicekit import db
from sqlalchemy import Row, Select, and_, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from deployer.adapters import tables as t
from deployer.domain.endpoint import Endpoint
from deployer.domain.rollout import ENDED, LIVE, Rollout
from deployer.domain.route import Route
from deployer.domain.version import Arm, Version
from deployer.ports import Announcement, Decision, Delivery, Deposed, Due, EndpointRecord, LoadedModel, RolloutRecord

LOAD = "load"
"""The kind of the job that loads and warms up a rollout's version."""

_ROLLOUT = TypeAdapter(Rollout)
_ROUTE = TypeAdapter(Route)
_VERSION = TypeAdapter(Version)

EncodeEvent = Callable[[Announcement, int], Envelope]
EncodeRoute = Callable[[Route, int, int], Envelope]
"""How events are written for the wire, given the key's sequence (and the publication); the entry points know that."""


class SqlUnitOfWork:
    """Implements `ports.UnitOfWork` on one connection."""

    def __init__(self, conn: AsyncConnection, outbox: Outbox, jobs: JobQueue, encode_event: EncodeEvent, encode_route: EncodeRoute) -> None:
        self._conn = conn
        self._outbox = outbox
        self._jobs = jobs
        self._encode_event = encode_event
        self._encode_route = encode_route
        self.emitted = False
        self.enqueued = False

    async def fence(self, epoch: int) -> None:
        current = await self._conn.scalar(select(t.leader.c.epoch).where(t.leader.c.id == 1).with_for_update(read=True))
        if current != epoch:
            raise Deposed(f"epoch {epoch} is over, {current} leads")

    async def lock(self, endpoint: str) -> EndpointRecord | None:
        row = (await self._conn.execute(select(t.endpoint).where(t.endpoint.c.name == endpoint).with_for_update())).one_or_none()
        if row is None:
            return None
        body = await self._conn.scalar(
            select(t.route.c.body).where(t.route.c.endpoint == endpoint).order_by(t.route.c.revision.desc()).limit(1)
        )
        return _endpoint(row, body)

    async def add_endpoint(self, name: str, delivery: str) -> None:
        # The columns that the migration gives a default are left to it.
        await self._conn.execute(insert(t.endpoint).values(name=name, delivery=delivery).on_conflict_do_nothing())

    async def save_endpoint(self, record: EndpointRecord) -> None:
        endpoint = record.endpoint
        await self._conn.execute(
            update(t.endpoint)
            .where(t.endpoint.c.name == endpoint.name)
            .values(
                delivery=record.delivery,
                revision=endpoint.revision,
                serving=endpoint.serving,
                previous=endpoint.previous,
                live=endpoint.live,
                waiting=endpoint.waiting,
                watching=endpoint.watching,
                generation=record.generation,
                acknowledged=record.acknowledged,
                watched=record.watched,
                changed_at=case(
                    (t.endpoint.c.revision != endpoint.revision, func.clock_timestamp()),
                    else_=t.endpoint.c.changed_at,
                ),
            )
        )

    async def rollout(self, rollout_id: str) -> RolloutRecord | None:
        row = (await self._conn.execute(_rollouts().where(t.rollout.c.id == rollout_id))).one_or_none()
        return None if row is None else _rollout(row)

    async def add_rollout(self, record: RolloutRecord) -> None:
        rollout = record.rollout
        await self._conn.execute(
            insert(t.rollout).values(
                id=rollout.id,
                endpoint=rollout.endpoint,
                state=rollout.state.value,
                body=_ROLLOUT.dump_python(rollout, mode="json"),
                baseline_version=record.baseline_version,
                traceparent=record.traceparent,
            )
        )

    async def save_rollout(self, record: RolloutRecord) -> None:
        rollout = record.rollout
        finished = func.coalesce(t.rollout.c.finished_at, func.clock_timestamp()) if rollout.state in ENDED else None
        await self._conn.execute(
            update(t.rollout)
            .where(t.rollout.c.id == rollout.id)
            .values(
                state=rollout.state.value,
                body=_ROLLOUT.dump_python(rollout, mode="json"),
                baseline_version=record.baseline_version,
                finished_at=finished,
            )
        )

    async def log(self, rollout_id: str, source: str, target: str, reason: str, evidence: dict[str, Any]) -> None:
        counted = update(t.rollout).where(t.rollout.c.id == rollout_id).values(decisions=t.rollout.c.decisions + 1)
        sequence = (await self._conn.execute(counted.returning(t.rollout.c.decisions))).scalar_one()
        await self._conn.execute(
            insert(t.decision).values(
                rollout_id=rollout_id, sequence=sequence, from_state=source, to_state=target, reason=reason, evidence=evidence
            )
        )

    async def set_deadline(self, rollout_id: str, seconds: float | None) -> None:
        at = None if seconds is None else func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        await self._conn.execute(update(t.rollout).where(t.rollout.c.id == rollout_id).values(deadline_at=at))

    async def deadline_is_over(self, rollout_id: str) -> bool:
        over = t.rollout.c.deadline_at <= func.clock_timestamp()
        return bool(await self._conn.scalar(select(func.coalesce(over, False)).where(t.rollout.c.id == rollout_id)))

    async def arms(self, endpoint: str, ids: Iterable[str | None]) -> dict[str, Arm]:
        wanted = [arm for arm in ids if arm is not None]
        if not wanted:
            return {}
        rows = await self._conn.execute(select(t.arm).where(t.arm.c.endpoint == endpoint, t.arm.c.id.in_(wanted)))
        return {row.id: _arm(row) for row in rows}

    async def save_arm(self, arm: Arm) -> None:
        statement = insert(t.arm).values(
            endpoint=arm.endpoint,
            id=arm.id,
            version=_VERSION.dump_python(arm.version, mode="json"),
            runtime=arm.runtime,
            runtime_model=arm.runtime_model,
            last_revision=arm.last_revision,
        )
        changed = {"runtime_model": statement.excluded.runtime_model, "last_revision": statement.excluded.last_revision}
        await self._conn.execute(statement.on_conflict_do_update(index_elements=[t.arm.c.endpoint, t.arm.c.id], set_=changed))

    async def models(self, runtime: str | None = None) -> list[LoadedModel]:
        m = t.runtime_model.c
        statement = select(m.name, m.runtime, m.endpoint, m.arm, m.wanted, m.state).where(m.state != "gone").order_by(m.name)
        if runtime is not None:
            statement = statement.where(m.runtime == runtime)
        return [LoadedModel(**row._mapping) for row in await self._conn.execute(statement)]

    async def save_model(self, model: LoadedModel) -> None:
        statement = insert(t.runtime_model).values(
            name=model.name,
            runtime=model.runtime,
            endpoint=model.endpoint,
            arm=model.arm,
            wanted=model.wanted,
            state=model.state,
        )
        changed = {"wanted": statement.excluded.wanted, "state": statement.excluded.state, "changed_at": func.clock_timestamp()}
        await self._conn.execute(statement.on_conflict_do_update(index_elements=[t.runtime_model.c.name], set_=changed))

    async def delivery(self, name: str, revision: int) -> Delivery | None:
        d = t.delivery.c
        statement = select(t.delivery).where(d.name == name, d.revision >= revision).order_by(d.revision).limit(1)
        row = (await self._conn.execute(statement)).one_or_none()
        return None if row is None else Delivery(row.name, row.revision, row.endpoint, row.section, row.deleted)

    async def save_delivery(self, delivery: Delivery) -> bool:
        result = await self._conn.execute(
            insert(t.delivery)
            .values(
                name=delivery.name,
                revision=delivery.revision,
                endpoint=delivery.endpoint,
                section=delivery.section,
                deleted=delivery.deleted,
            )
            .on_conflict_do_nothing()
        )
        return result.rowcount == 1

    async def publish(self, route: Route) -> None:
        await self._conn.execute(
            insert(t.route)
            .values(endpoint=route.endpoint, revision=route.revision, body=_ROUTE.dump_python(route, mode="json"))
            .on_conflict_do_nothing()
        )
        e = t.endpoint.c
        row = (
            await self._conn.execute(
                update(t.endpoint)
                .where(e.name == route.endpoint)
                .values(routes_sequence=e.routes_sequence + 1, publication=e.publication + 1, published_at=func.clock_timestamp())
                .returning(e.routes_sequence, e.publication)
            )
        ).one()
        await self._outbox.append(self._conn, [self._encode_route(route, row.publication, row.routes_sequence)])
        self.emitted = True

    async def route_is_older(self, endpoint: str, seconds: float) -> bool:
        e = t.endpoint.c
        old = e.changed_at < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        return bool(await self._conn.scalar(select(old).where(e.name == endpoint)))

    async def announce(self, announcement: Announcement) -> None:
        e = t.endpoint.c
        statement = update(t.endpoint).where(e.name == announcement.record.rollout.endpoint)
        counted = statement.values(deploys_sequence=e.deploys_sequence + 1).returning(e.deploys_sequence)
        sequence = (await self._conn.execute(counted)).scalar_one()
        await self._outbox.append(self._conn, [self._encode_event(announcement, sequence)])
        self.emitted = True

    async def enqueue_load(self, rollout_id: str) -> None:
        await self._jobs.enqueue(self._conn, LOAD, rollout_id, {"rollout_id": rollout_id}, max_attempts=20)
        self.enqueued = True


class SqlStore:
    """Implements `ports.Store`."""

    def __init__(self, engine: AsyncEngine, outbox: Outbox, jobs: JobQueue, encode_event: EncodeEvent, encode_route: EncodeRoute) -> None:
        self._engine = engine
        self._outbox = outbox
        self._jobs = jobs
        self._encode_event = encode_event
        self._encode_route = encode_route

    def on(self, conn: AsyncConnection) -> SqlUnitOfWork:
        """A unit of work within somebody else's transaction, such as a consumer's."""
        return SqlUnitOfWork(conn, self._outbox, self._jobs, self._encode_event, self._encode_route)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[SqlUnitOfWork]:
        try:
            async with self._engine.begin() as conn:
                work = self.on(conn)
                yield work
        except Exception as error:
            raise db.translate(error) from error
        if work.emitted:
            self._outbox.committed()
        if work.enqueued:
            self._jobs.notify()

    async def due(self, republish_after_s: float) -> Due:
        e, r, d = t.endpoint.c, t.rollout.c, t.delivery.c
        newest = select(d.name, func.max(d.revision).label("revision")).group_by(d.name).subquery()
        current = (
            select(d.name, d.endpoint, d.deleted).join(newest, and_(d.name == newest.c.name, d.revision == newest.c.revision)).subquery()
        )
        old = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, republish_after_s)
        in_use = or_(e.serving.is_not(None), e.live.is_not(None), e.waiting.is_not(None))
        orphaned = (
            select(e.name).join(current, current.c.name == e.delivery).where(in_use, or_(current.c.deleted, current.c.endpoint != e.name))
        )
        m = t.runtime_model.c
        on_the_way = select(r.body["canary"].astext).where(r.id.in_([e.live, e.waiting])).correlate(t.endpoint)
        idle = (
            select(e.name)
            .join(t.runtime_model, m.endpoint == e.name)
            .where(m.wanted, m.state != "gone", m.arm.is_distinct_from(e.serving), m.arm.is_distinct_from(e.previous))
            .where(m.arm.not_in(on_the_way))
        )
        async with self._read() as conn:
            begin = await conn.scalars(select(e.name).where(e.live.is_(None), e.waiting.is_not(None)))
            deadlines = await conn.scalars(select(r.id).where(r.deadline_at <= func.clock_timestamp()))
            unpublished = await conn.scalars(select(e.name).where(e.watched, e.published_at < old))
            at_rest = and_(e.live.is_(None), e.watching.is_(None))
            unnoted = await conn.execute(select(e.name, e.revision).where(e.watched, or_(e.acknowledged < e.revision, at_rest)))
            orphans = await conn.scalars(orphaned)
            return Due(
                begin=begin.all(),
                deadlines=deadlines.all(),
                unpublished=unpublished.all(),
                unacknowledged=[(row.name, row.revision) for row in unnoted],
                orphaned=orphans.all(),
                idle=(await conn.scalars(idle.distinct())).all(),
            )

    async def live(self) -> list[RolloutRecord]:
        r = t.rollout.c
        watched = select(t.endpoint.c.watching).where(t.endpoint.c.watching.is_not(None))
        return await self._select(_rollouts().where(or_(r.state.in_([state.value for state in LIVE]), r.id.in_(watched))))

    async def rollouts(self, endpoint: str, limit: int, before: str) -> list[RolloutRecord]:
        statement = _rollouts().order_by(t.rollout.c.id.desc()).limit(limit)
        if endpoint:
            statement = statement.where(t.rollout.c.endpoint == endpoint)
        if before:
            statement = statement.where(t.rollout.c.id < before)
        return await self._select(statement)

    async def find_rollout(self, rollout_id: str) -> RolloutRecord | None:
        found = await self._select(_rollouts().where(t.rollout.c.id == rollout_id))
        return found[0] if found else None

    async def decisions(self, rollout_id: str, after: int, limit: int) -> list[Decision]:
        d = t.decision.c
        wanted = select(t.decision).where(d.rollout_id == rollout_id, d.sequence > after).order_by(d.sequence).limit(limit)
        async with self._read() as conn:
            rows = await conn.execute(wanted)
            return [Decision(row.sequence, row.at, row.from_state, row.to_state, row.reason, row.evidence) for row in rows]

    async def endpoints(self, name: str = "") -> list[EndpointRecord]:
        e, r = t.endpoint.c, t.route.c
        newest = select(r.body).where(r.endpoint == e.name).order_by(r.revision.desc()).limit(1).scalar_subquery()
        statement = select(t.endpoint, newest.label("body")).order_by(e.name)
        if name:
            statement = statement.where(e.name == name)
        async with self._read() as conn:
            return [_endpoint(row, row.body) for row in await conn.execute(statement)]

    async def _select(self, statement: Select[Any]) -> list[RolloutRecord]:
        async with self._read() as conn:
            return [_rollout(row) for row in await conn.execute(statement)]

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.connect() as conn:
                yield conn
        except Exception as error:
            raise db.translate(error) from error


def _rollouts() -> Select[Any]:
    """Rollouts with the version of their canary, which stands with its arm."""
    r, a = t.rollout.c, t.arm.c
    canary = r.body["canary"].astext
    return select(t.rollout, a.version).join(t.arm, and_(a.endpoint == r.endpoint, a.id == canary))


def _rollout(row: Row[Any]) -> RolloutRecord:
    return RolloutRecord(
        rollout=_ROLLOUT.validate_python(row.body),
        version=_VERSION.validate_python(row.version),
        baseline_version=row.baseline_version,
        traceparent=row.traceparent,
        decisions=row.decisions,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def _endpoint(row: Row[Any], body: dict[str, Any] | None) -> EndpointRecord:
    endpoint = Endpoint(row.name, row.revision, row.serving, row.previous, row.live, row.waiting, row.watching)
    route = None if body is None else _ROUTE.validate_python(body)
    return EndpointRecord(endpoint, row.delivery, route, row.generation, row.acknowledged)


def _arm(row: Row[Any]) -> Arm:
    return Arm(row.id, row.endpoint, _VERSION.validate_python(row.version), row.runtime, row.runtime_model, row.last_revision)
