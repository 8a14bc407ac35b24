"""Parts of requests and answers that several endpoints of MLflow's API share: ids, tags, runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from servicekit.errors import Invalid
from servicekit.mlflow import number

from tracker.domain.record import DatasetInput, Record
from tracker.domain.run import Metric, Run


class KeyValue(msgspec.Struct):
    """A tag or a param."""

    key: str = ""
    value: str = ""


class OfRun(msgspec.Struct, kw_only=True):
    """A request about a run. Clients send its id under both names, older ones under the second."""

    run_id: str = ""
    run_uuid: str = ""

    def run(self) -> str:
        """Raises Invalid when there is no id."""
        return required("run_id", self.run_id or self.run_uuid)


def required(name: str, value: str) -> str:
    """Raises Invalid when a text is empty."""
    if not value:
        raise Invalid(f"Missing value for required parameter '{name}'.")
    return value


def experiment_number(text: str) -> int:
    """An experiment's id, which the wire has as a text. Raises Invalid."""
    required("experiment_id", text)
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Invalid(f"Invalid value for parameter 'experiment_id': {text[:50]!r} is not the id of an experiment")
    return int(text)


def texts(given: Sequence[KeyValue], limit: int | None = None) -> dict[str, str]:
    """Tags or params by key; of a key that is there twice the last counts. Values longer than `limit` are cut there, as MLflow does."""
    return {one.key: one.value if limit is None else one.value[:limit] for one in given}


def finite(value: float) -> float:
    """A metric's value as MLflow keeps it: the infinities as the largest numbers there are."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value


def experiment_location(experiment_id: int) -> str:
    """Where the artifacts of an experiment are, in MLflow's words. Clients never choose it."""
    return f"mlflow-artifacts:/{experiment_id}"


def run_info(run: Run) -> dict[str, Any]:
    info: dict[str, Any] = {
        "run_id": run.run_id,
        "run_uuid": run.run_id,
        "run_name": run.name,
        "experiment_id": str(run.experiment_id),
        "user_id": run.user,
        "status": run.status.value,
        "start_time": run.started_ms,
        "artifact_uri": f"{experiment_location(run.experiment_id)}/{run.run_id}/artifacts",
        "lifecycle_stage": run.lifecycle_stage,
    }
    if run.finished_ms:
        info["end_time"] = run.finished_ms
    return info


def run_json(record: Record) -> dict[str, Any]:
    """A run as MLflow writes it."""
    return {
        "info": run_info(record.run),
        "data": {
            "metrics": [metric_json(one) for one in record.metrics],
            "params": key_values(record.params),
            "tags": key_values(record.tags),
        },
        "inputs": {
            "dataset_inputs": [_dataset_input(one) for one in record.datasets],
            "model_inputs": [{"model_id": model_id} for model_id in record.model_inputs],
        },
        "outputs": {"model_outputs": [{"model_id": one.model_id, "step": one.step} for one in record.model_outputs]},
    }


def metric_json(metric: Metric) -> dict[str, Any]:
    return {"key": metric.key, "value": number(metric.value), "timestamp": metric.timestamp_ms, "step": metric.step}


def key_values(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in pairs.items()]


def _dataset_input(one: DatasetInput) -> dict[str, Any]:
    dataset = one.dataset
    described = {"name": dataset.name, "digest": dataset.digest, "source_type": dataset.source_type, "source": dataset.source}
    if dataset.schema:
        described["schema"] = dataset.schema
    if dataset.profile:
        described["profile"] = dataset.profile
    return {"tags": key_values(one.tags), "dataset": described}
