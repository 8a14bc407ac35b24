"""Runs as MLflow's API shows them, and what only that API keeps of them, in PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters import tables as t
from tracker.adapters.runs import run_of
from tracker.domain.record import DatasetInput, DescribedDataset, ModelMetric, ModelOutput, Record
from tracker.domain.run import Metric, Run

# Each of a run's lists comes as one JSON array in the run's row: one round trip. JSON has no NaN and no infinity, so values come as texts.
_RECORD = text(
    """
    SELECT run.*,
        (SELECT json_agg(json_build_array(key, value::text, timestamp_ms, step) ORDER BY key)
         FROM tracker.metric_latest WHERE run_id = run.run_id) AS metrics,
        (SELECT json_agg(json_build_array(key, value) ORDER BY key) FROM tracker.param WHERE run_id = run.run_id) AS params,
        (SELECT json_agg(json_build_array(key, value) ORDER BY key) FROM tracker.tag WHERE run_id = run.run_id) AS tags,
        (SELECT json_agg(json_build_array(
                    used.name, used.digest, described.source_type, described.source, described.schema, described.profile, used.tags
                ) ORDER BY used.position)
         FROM tracker.run_dataset AS used JOIN tracker.described_dataset AS described USING (experiment_id, name, digest)
         WHERE used.run_id = run.run_id) AS datasets,
        (SELECT json_agg(json_build_array(direction, model_id, step) ORDER BY position)
         FROM tracker.run_model WHERE run_id = run.run_id) AS models
    FROM tracker.run AS run WHERE run.run_id = :run_id
    """
)

_MODEL_METRICS = text(
    """
    INSERT INTO tracker.model_metric (model_id, key, step, timestamp_ms, value, run_id, dataset_name, dataset_digest)
    SELECT model_id, key, step, timestamp_ms, value, :run_id, dataset_name, dataset_digest
    FROM unnest(
        CAST(:models AS text[]), CAST(:keys AS text[]), CAST(:steps AS bigint[]), CAST(:times AS bigint[]),
        CAST(:numbers AS double precision[]), CAST(:names AS text[]), CAST(:digests AS text[])
    ) AS given (model_id, key, step, timestamp_ms, value, dataset_name, dataset_digest)
    ORDER BY model_id, key, step, timestamp_ms, value, dataset_name, dataset_digest
    ON CONFLICT DO NOTHING
    """
)


class SqlRecords:
    """Implements `ports.Records` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def get(self, run_id: str) -> Record | None:
        row = (await self._conn.execute(_RECORD, {"run_id": run_id})).mappings().first()
        if row is None:
            return None
        metrics, params, tags, datasets, models = (_list(row[name]) for name in ("metrics", "params", "tags", "datasets", "models"))
        return Record(
            run=run_of(row),
            metrics=[Metric(key, float(value), timestamp_ms, step) for key, value, timestamp_ms, step in metrics],
            params=dict(params),
            tags=dict(tags),
            datasets=[DatasetInput(DescribedDataset(*described), tags) for *described, tags in datasets],
            model_inputs=[model_id for direction, model_id, _ in models if direction == "input"],
            model_outputs=[ModelOutput(model_id, step) for direction, model_id, step in models if direction == "output"],
        )

    async def log_datasets(self, run: Run, inputs: Sequence[DatasetInput]) -> None:
        if not inputs:
            return
        # In the order of the key: requests that meet wait for each other and never in a circle.
        described = {(one.dataset.name, one.dataset.digest): one for one in reversed(inputs)}
        rows = [
            {
                "experiment_id": run.experiment_id,
                "name": name,
                "digest": digest,
                "source_type": one.dataset.source_type,
                "source": one.dataset.source,
                "schema": one.dataset.schema,
                "profile": one.dataset.profile,
            }
            for (name, digest), one in sorted(described.items())
        ]
        await self._conn.execute(upsert(t.described_dataset).on_conflict_do_nothing(), rows)
        used = [
            {
                "run_id": run.run_id,
                "experiment_id": run.experiment_id,
                "name": name,
                "digest": digest,
                "tags": dict(described[name, digest].tags),
            }
            for name, digest in dict.fromkeys((one.dataset.name, one.dataset.digest) for one in inputs)
        ]
        await self._conn.execute(upsert(t.run_dataset).on_conflict_do_nothing(), used)

    async def log_model_inputs(self, run_id: str, model_ids: Sequence[str]) -> None:
        await self._log_models(run_id, "input", [ModelOutput(model_id, 0) for model_id in model_ids])

    async def log_model_outputs(self, run_id: str, outputs: Sequence[ModelOutput]) -> None:
        await self._log_models(run_id, "output", outputs)

    async def log_model_metrics(self, run_id: str, metrics: Sequence[ModelMetric]) -> None:
        arrays = {
            "models": [one.model_id for one in metrics],
            "keys": [one.metric.key for one in metrics],
            "steps": [one.metric.step for one in metrics],
            "times": [one.metric.timestamp_ms for one in metrics],
            "numbers": [one.metric.value for one in metrics],
            "names": [one.dataset_name for one in metrics],
            "digests": [one.dataset_digest for one in metrics],
        }
        await self._conn.execute(_MODEL_METRICS, {"run_id": run_id, **arrays})

    async def _log_models(self, run_id: str, direction: str, models: Sequence[ModelOutput]) -> None:
        rows = [{"run_id": run_id, "direction": direction, "model_id": one.model_id, "step": one.step} for one in models]
        if rows:
            await self._conn.execute(upsert(t.run_model).on_conflict_do_nothing(), rows)


def _list(value: Any) -> list[Any]:
    """A JSON array as the driver answers it; None for no rows."""
    if value is None:
        return []
    found: list[Any] = json.loads(value) if isinstance(value, str) else value
    return found
