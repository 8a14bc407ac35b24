"""Runs and what they log, in PostgreSQL. Batches go as arrays in one statement each: this is the path that every training step takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, Select, Text, TextClause, any_, delete, func, literal, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters import logged
from tracker.adapters import tables as t
from tracker.domain.model import BlobRef, DeliverableModel, Signature, TensorSpec
from tracker.domain.run import DatasetRef, Facts, Metric, Run, RunSource, Status
from tracker.ports import RequestKey

_LEASE_END = "clock_timestamp() + make_interval(secs => :seconds)"

# Points are identified by all their columns, so a batch sent again adds none. Both inserts go in the order of the key: batches of one
# run that meet wait for each other and never in a circle. The latest point of a key is the one of the highest (step, time, value).
_METRICS = text(
    """
    WITH point AS (
        SELECT key, step, timestamp_ms, value
        FROM unnest(CAST(:keys AS text[]), CAST(:steps AS bigint[]), CAST(:times AS bigint[]), CAST(:numbers AS double precision[]))
             AS given (key, step, timestamp_ms, value)
    ), kept AS (
        INSERT INTO tracker.metric_point (run_id, key, step, timestamp_ms, value)
        SELECT :run_id, key, step, timestamp_ms, value FROM point ORDER BY key, step, timestamp_ms, value
        ON CONFLICT DO NOTHING
    ), whole AS (
        DELETE FROM tracker.run_logged WHERE run_id = :run_id
    )
    INSERT INTO tracker.metric_latest AS latest (run_id, key, step, timestamp_ms, value, experiment_id, started_ms)
    SELECT DISTINCT ON (key) :run_id, key, step, timestamp_ms, value, run.experiment_id, run.started_ms
    FROM point, tracker.run WHERE run.run_id = :run_id
    ORDER BY key, step DESC, timestamp_ms DESC, value DESC
    ON CONFLICT (run_id, key) DO UPDATE
        SET step = excluded.step, timestamp_ms = excluded.timestamp_ms, value = excluded.value
        WHERE (latest.step, latest.timestamp_ms, latest.value) < (excluded.step, excluded.timestamp_ms, excluded.value)
    """
)

_PARAMS = text(
    """
    WITH whole AS (
        DELETE FROM tracker.run_logged WHERE run_id = :run_id
    )
    INSERT INTO tracker.param (run_id, key, value, experiment_id, started_ms)
    SELECT :run_id, key, value, run.experiment_id, run.started_ms
    FROM unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS given (key, value), tracker.run WHERE run.run_id = :run_id ORDER BY key
    ON CONFLICT DO NOTHING
    """
)

_CHANGED_PARAMS = text(
    """
    SELECT param.key, param.value
    FROM tracker.param JOIN unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS given (key, value) ON given.key = param.key
    WHERE param.run_id = :run_id AND param.value <> given.value
    ORDER BY param.key
    """
)

_TAGS = text(
    """
    INSERT INTO tracker.tag AS old (run_id, key, value, experiment_id, started_ms)
    SELECT :run_id, key, value, run.experiment_id, run.started_ms
    FROM unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS given (key, value), tracker.run WHERE run.run_id = :run_id ORDER BY key
    ON CONFLICT (run_id, key) DO UPDATE SET value = excluded.value WHERE old.value <> excluded.value
    """
)


class SqlRuns:
    """Implements `ports.Runs` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, run: Run, request: RequestKey | None) -> bool:
        row = {
            "run_id": run.run_id,
            "experiment_id": run.experiment_id,
            "name": run.name,
            "user_name": run.user,
            "status": run.status.value,
            "lifecycle_stage": run.lifecycle_stage,
            "started_ms": run.started_ms,
            "finished_ms": run.finished_ms,
            "deleted_ms": run.deleted_ms,
            "reason": run.reason,
            "parent_run_id": run.parent_run_id,
            "source_commit": run.source.commit,
            "source_dirty": run.source.dirty,
            "source_diff_key": run.source.diff_key,
            "source_command": run.source.command,
            "training_id": run.source.training_id,
            "lease_seconds": run.lease_seconds,
            "lease_expires_at": _lease_end(run.lease_seconds) if run.lease_seconds else None,
            "fencing_token": run.fencing_token,
            "event_sequence": run.event_sequence,
            "requested_by": request.caller if request else None,
            "request_id": request.request_id if request else None,
        }
        statement = upsert(t.run).values(**row).on_conflict_do_nothing(constraint="run_request").returning(t.run.c.run_id)
        return (await self._conn.execute(statement)).first() is not None

    async def get(self, run_id: str) -> Run | None:
        return await self._one(select(t.run).where(t.run.c.run_id == run_id))

    async def lock(self, run_id: str) -> Run | None:
        # NO KEY: rows that refer to this one may still be added.
        return await self._one(select(t.run).where(t.run.c.run_id == run_id).with_for_update(key_share=True))

    async def share(self, run_id: str) -> Run | None:
        return await self._one(select(t.run).where(t.run.c.run_id == run_id).with_for_update(read=True))

    async def lock_by_request(self, request: RequestKey) -> Run | None:
        same = (t.run.c.requested_by == request.caller) & (t.run.c.request_id == request.request_id)
        return await self._one(select(t.run).where(same).with_for_update(key_share=True))

    async def save(self, run: Run) -> None:
        values: dict[str, Any] = {
            "name": run.name,
            "parent_run_id": run.parent_run_id,
            "source_commit": run.source.commit,
            "source_command": run.source.command,
            "status": run.status.value,
            "reason": run.reason,
            "finished_ms": run.finished_ms,
            "lifecycle_stage": run.lifecycle_stage,
            "deleted_ms": run.deleted_ms,
            "lease_seconds": run.lease_seconds,
            "fencing_token": run.fencing_token,
            "event_sequence": run.event_sequence,
        }
        if not run.lease_seconds:
            values["lease_expires_at"] = None
        await self._conn.execute(update(t.run).where(t.run.c.run_id == run.run_id).values(**values))
        if run.ended:
            await self._conn.execute(logged.KEEP_WHOLE, {"run_id": run.run_id})

    async def renew_lease(self, run: Run) -> datetime:
        statement = (
            update(t.run)
            .where(t.run.c.run_id == run.run_id)
            .values(lease_expires_at=_lease_end(run.lease_seconds))
            .returning(t.run.c.lease_expires_at)
        )
        expires: datetime = (await self._conn.execute(statement)).scalar_one()
        return expires

    async def lock_expired(self, limit: int) -> Sequence[tuple[Run, int]]:
        now_ms = (func.extract("epoch", func.clock_timestamp()) * 1000).label("now_ms")
        statement = (
            select(t.run, now_ms)
            .where(t.run.c.status == Status.RUNNING.value, t.run.c.lease_expires_at < func.clock_timestamp())
            .order_by(t.run.c.lease_expires_at)
            .limit(limit)
            .with_for_update(key_share=True, skip_locked=True, of=t.run)
        )
        rows = (await self._conn.execute(statement)).mappings().all()
        return [(run_of(row), int(row["now_ms"])) for row in rows]

    async def page(self, experiment_id: int, status: str, before: tuple[int, str] | None, limit: int) -> Sequence[Run]:
        statement = select(t.run).where(t.run.c.experiment_id == experiment_id)
        if status:
            statement = statement.where(t.run.c.status == status)
        if before is not None:
            statement = statement.where(tuple_(t.run.c.started_ms, t.run.c.run_id) < before)
        statement = statement.order_by(t.run.c.started_ms.desc(), t.run.c.run_id.desc()).limit(limit)
        return [run_of(row) for row in (await self._conn.execute(statement)).mappings()]

    async def facts(self, run_ids: Sequence[str]) -> Mapping[str, Facts]:
        params = await self._by_run(t.param, t.param.c.value, run_ids)
        metrics = await self._by_run(t.metric_latest, t.metric_latest.c.value, run_ids)
        tags = await self._by_run(t.tag, t.tag.c.value, run_ids)
        models = await self._models(run_ids)
        inputs = await self._inputs(run_ids)
        return {run_id: Facts(params[run_id], metrics[run_id], tags[run_id], models[run_id], inputs[run_id]) for run_id in run_ids}

    async def log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        arrays = {
            "keys": [metric.key for metric in metrics],
            "steps": [metric.step for metric in metrics],
            "times": [metric.timestamp_ms for metric in metrics],
            "numbers": [metric.value for metric in metrics],
        }
        await self._conn.execute(_METRICS, {"run_id": run_id, **arrays})

    async def log_params(self, run_id: str, params: Mapping[str, str]) -> Mapping[str, str]:
        arrays = {"run_id": run_id, "keys": list(params), "texts": list(params.values())}
        await self._conn.execute(_PARAMS, arrays)
        changed = await self._conn.execute(_CHANGED_PARAMS, arrays)
        return {row.key: row.value for row in changed}

    async def log_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        if tags:
            kept = await self._is_kept(run_id)
            await self._conn.execute(_TAGS, {"run_id": run_id, "keys": list(tags), "texts": list(tags.values())})
            if kept:
                await self._conn.execute(logged.TAGS_ANEW, {"run_id": run_id})

    async def tag(self, run_id: str, key: str) -> str | None:
        found = await self._conn.execute(select(t.tag.c.value).where(t.tag.c.run_id == run_id, t.tag.c.key == key))
        value: str | None = found.scalar_one_or_none()
        return value

    async def delete_tag(self, run_id: str, key: str) -> bool:
        kept = await self._is_kept(run_id)
        gone = await self._conn.execute(delete(t.tag).where(t.tag.c.run_id == run_id, t.tag.c.key == key))
        if kept:
            await self._conn.execute(logged.TAGS_ANEW, {"run_id": run_id})
        return gone.rowcount > 0

    async def history(self, run_id: str, key: str, after: Metric | None, limit: int) -> Sequence[Metric]:
        point = t.metric_point.c
        statement = select(point.value, point.timestamp_ms, point.step).where(point.run_id == run_id, point.key == key)
        if after is not None:
            statement = statement.where(tuple_(point.step, point.timestamp_ms, point.value) > (after.step, after.timestamp_ms, after.value))
        statement = statement.order_by(point.step, point.timestamp_ms, point.value).limit(limit)
        return [Metric(key, row.value, row.timestamp_ms, row.step) for row in await self._conn.execute(statement)]

    async def log_model(self, run_id: str, model: DeliverableModel) -> None:
        values: dict[str, Any] = {
            "format": model.format,
            "blob": model.blob.sha256,
            "samples": model.samples.sha256 if model.samples else None,
            "signature": {"inputs": _tensors(model.signature.inputs), "outputs": _tensors(model.signature.outputs)},
            "logged_model_id": model.logged_model_id,
            "folder": model.folder,
        }
        statement = upsert(t.model).values(run_id=run_id, name=model.name, **values)
        await self._conn.execute(statement.on_conflict_do_update(index_elements=["run_id", "name"], set_=values))

    async def log_inputs(self, run_id: str, inputs: Sequence[DatasetRef]) -> None:
        if inputs:
            rows = [{"run_id": run_id, "dataset": ref.name, "version": ref.version} for ref in inputs]
            await self._conn.execute(upsert(t.run_input).on_conflict_do_nothing(), rows)

    async def _is_kept(self, run_id: str) -> bool:
        """Whether what the run logged is kept whole; then it is held, so that tags set at the same time are put into it one by one."""
        kept = select(t.run_logged.c.run_id).where(t.run_logged.c.run_id == run_id).with_for_update()
        return (await self._conn.execute(kept)).first() is not None

    async def _one(self, statement: Select[Any]) -> Run | None:
        row = (await self._conn.execute(statement)).mappings().first()
        return None if row is None else run_of(row)

    async def _by_run(self, table: Any, value: Any, run_ids: Sequence[str]) -> Mapping[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        statement = select(table.c.run_id, table.c.key, value).where(_among(table.c.run_id, run_ids)).order_by(table.c.key)
        for run_id, key, one in await self._conn.execute(statement):
            found[run_id][key] = one
        return found

    async def _models(self, run_ids: Sequence[str]) -> Mapping[str, list[DeliverableModel]]:
        blob, samples = t.blob.alias("model_blob"), t.blob.alias("samples_blob")
        statement = (
            select(
                t.model,
                blob.c.size_bytes.label("blob_size"),
                blob.c.key.label("blob_key"),
                samples.c.size_bytes.label("samples_size"),
                samples.c.key.label("samples_key"),
            )
            .join(blob, blob.c.sha256 == t.model.c.blob)
            .outerjoin(samples, samples.c.sha256 == t.model.c.samples)
            .where(_among(t.model.c.run_id, run_ids))
            .order_by(t.model.c.position)
        )
        found: dict[str, list[DeliverableModel]] = defaultdict(list)
        for row in (await self._conn.execute(statement)).mappings():
            signature = Signature(_specs(row["signature"]["inputs"]), _specs(row["signature"]["outputs"]))
            stored = BlobRef(row["blob"], row["blob_size"], row["blob_key"])
            rows = BlobRef(row["samples"], row["samples_size"], row["samples_key"]) if row["samples"] else None
            model = DeliverableModel(row["name"], row["format"], stored, signature, rows, row["logged_model_id"], row["folder"])
            found[row["run_id"]].append(model)
        return found

    async def _inputs(self, run_ids: Sequence[str]) -> Mapping[str, list[DatasetRef]]:
        used, version = t.run_input.c, t.dataset_version.c
        statement = (
            select(used.run_id, used.dataset, used.version, version.sha256)
            .join(t.dataset_version, (version.name == used.dataset) & (version.version == used.version))
            .where(_among(used.run_id, run_ids))
            .order_by(used.position)
        )
        found: dict[str, list[DatasetRef]] = defaultdict(list)
        for row in await self._conn.execute(statement):
            found[row.run_id].append(DatasetRef(row.dataset, row.version, row.sha256))
        return found


def _among(column: Any, run_ids: Sequence[str]) -> ColumnElement[bool]:
    """One array instead of a list of parameters: the statement stays the same however many runs there are."""
    among: ColumnElement[bool] = column == any_(literal(list(run_ids), ARRAY(Text)))
    return among


def _lease_end(seconds: int) -> TextClause:
    return text(_LEASE_END).bindparams(seconds=float(seconds))


def _tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]


def _specs(tensors: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor["name"], tensor["datatype"], tuple(tensor["shape"])) for tensor in tensors)


def run_of(row: Mapping[str, Any] | RowMapping) -> Run:
    return Run(
        run_id=row["run_id"],
        experiment_id=row["experiment_id"],
        name=row["name"],
        user=row["user_name"],
        status=Status(row["status"]),
        lifecycle_stage=row["lifecycle_stage"],
        started_ms=row["started_ms"],
        finished_ms=row["finished_ms"],
        source=RunSource(
            commit=row["source_commit"],
            dirty=row["source_dirty"],
            diff_key=row["source_diff_key"],
            command=row["source_command"],
            training_id=row["training_id"],
        ),
        reason=row["reason"],
        parent_run_id=row["parent_run_id"],
        lease_seconds=row["lease_seconds"],
        fencing_token=row["fencing_token"],
        event_sequence=row["event_sequence"],
        deleted_ms=row["deleted_ms"],
    )
