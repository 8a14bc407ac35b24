"""The two GraphQL reads of MLflow's own page, and the small questions for which it wants an answer though nothing is behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Forbidden, Invalid, NotFound
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from tracker.amendments import Amendments
from tracker.domain.record import DatasetInput, Record
from tracker.domain.run import Experiment, Metric, Run
from tracker.entrypoints.mlflow import selections
from tracker.entrypoints.mlflow.rules import READ
from tracker.entrypoints.mlflow.selections import Selection
from tracker.entrypoints.mlflow.wire import experiment_location, experiment_number, finite, required, run_info
from tracker.experiments import Experiments

_AJAX = "/ajax-api"


class _Asked(msgspec.Struct):
    query: str = ""
    variables: dict[str, Any] | None = None
    operation_name: str | None = msgspec.field(name="operationName", default=None)


class GraphqlApi:
    """The endpoints that only MLflow's page asks."""

    def __init__(self, experiments: Experiments, amendments: Amendments) -> None:
        self._experiments = experiments
        self._amendments = amendments

    def endpoints(self) -> Sequence[Endpoint]:
        return [
            Endpoint(("POST",), "/graphql", READ, self._graphql),
            Endpoint(("GET", "POST"), f"{_AJAX}/3.0/mlflow/ui-telemetry", READ, _no_telemetry),
            # Without these the page shows an error, or waits for ever.
            Endpoint(("GET", "POST"), f"{_AJAX}/2.0/mlflow/gateway-proxy", READ, _nothing),
            Endpoint(("POST",), f"{_AJAX}/3.0/mlflow/traces/search", READ, _nothing),
            Endpoint(("POST",), f"{_AJAX}/3.0/mlflow/traces/metrics", READ, _nothing),
        ]

    async def _graphql(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Asked)
        fields = selections.read(asked.query, asked.variables or {}, asked.operation_name or "")
        data: dict[str, Any] = {}
        errors: list[str] = []
        for one in fields:
            try:
                data[one.answered_as] = await self._read(one)
            except (NotFound, Invalid, Forbidden) as error:
                data[one.answered_as] = None
                errors.append(error.message)
        return mlflow.answer({"data": data, "errors": errors} if errors else {"data": data})

    async def _read(self, asked: Selection) -> Any:
        if asked.name == "__typename":
            return "Query"
        given = asked.arguments.get("input")
        if asked.name == "mlflowGetExperiment":
            experiment = await self._experiment(_text(given, "experimentId"))
            return selections.project(_answer("MlflowGetExperimentResponse", experiment=_experiment(experiment)), asked.fields)
        if asked.name == "mlflowGetRun":
            record = await self._amendments.record(current_caller(), _text(given, "runId") or required("runId", _text(given, "runUuid")))
            run = _run(record, await self._experiment(str(record.run.experiment_id)))
            return selections.project(_answer("MlflowGetRunResponse", run=run), asked.fields)
        raise Invalid(f"there is no field {asked.name[:100]!r} in Query")

    async def _experiment(self, experiment_id: str) -> Experiment:
        return await self._experiments.get(current_caller(), experiment_number(experiment_id), "")


def _text(given: Any, name: str) -> str:
    value = given.get(name) if isinstance(given, dict) else None
    if value is not None and not isinstance(value, str | int):
        raise Invalid(f"Invalid value for parameter '{name}': a text is needed")
    return "" if value is None else str(value)


def _answer(typename: str, **what: Any) -> dict[str, Any]:
    return {"__typename": typename, "apiError": None, **what}


def _experiment(found: Experiment) -> dict[str, Any]:
    return {
        "__typename": "MlflowExperiment",
        "experimentId": str(found.id),
        "name": found.name,
        "artifactLocation": experiment_location(found.id),
        "lifecycleStage": found.lifecycle_stage,
        "creationTime": str(found.created_ms),
        "lastUpdateTime": str(found.last_update_ms),
        "effectiveTraceArchivalRetention": None,
        "tags": _pairs("MlflowExperimentTag", found.tags),
    }


def _run(record: Record, experiment: Experiment) -> dict[str, Any]:
    # Which versions came of a run is the registry's to know; the page finds them by the tags of logged models too.
    return {
        "__typename": "MlflowRunExtension",
        "info": _info(record.run),
        "experiment": _experiment(experiment),
        "modelVersions": [],
        "data": {
            "__typename": "MlflowRunData",
            "metrics": [_metric(one) for one in record.metrics],
            "params": _pairs("MlflowParam", record.params),
            "tags": _pairs("MlflowRunTag", record.tags),
        },
        "inputs": {
            "__typename": "MlflowRunInputs",
            "datasetInputs": [_dataset(one) for one in record.datasets],
            "modelInputs": [{"__typename": "MlflowModelInput", "modelId": model_id} for model_id in record.model_inputs],
        },
        "outputs": {
            "__typename": "MlflowRunOutputs",
            "modelOutputs": [
                {"__typename": "MlflowModelOutput", "modelId": one.model_id, "step": str(one.step)} for one in record.model_outputs
            ],
        },
    }


def _info(run: Run) -> dict[str, Any]:
    told = run_info(run)
    return {
        "__typename": "MlflowRunInfo",
        "runId": run.run_id,
        "runUuid": run.run_id,
        "runName": run.name,
        "experimentId": str(run.experiment_id),
        "userId": run.user,
        "status": run.status.value,
        "startTime": str(run.started_ms),
        "endTime": str(run.finished_ms) if run.finished_ms else None,
        "artifactUri": told["artifact_uri"],
        "lifecycleStage": run.lifecycle_stage,
    }


def _metric(one: Metric) -> dict[str, Any]:
    # This wire has no name for what is not a number.
    value = None if math.isnan(one.value) else finite(one.value)
    return {"__typename": "MlflowMetric", "key": one.key, "value": value, "timestamp": str(one.timestamp_ms), "step": str(one.step)}


def _dataset(one: DatasetInput) -> dict[str, Any]:
    dataset = one.dataset
    return {
        "__typename": "MlflowDatasetInput",
        "tags": _pairs("MlflowInputTag", one.tags),
        "dataset": {
            "__typename": "MlflowDataset",
            "name": dataset.name,
            "digest": dataset.digest,
            "sourceType": dataset.source_type,
            "source": dataset.source,
            "schema": dataset.schema or None,
            "profile": dataset.profile or None,
        },
    }


def _pairs(typename: str, pairs: Any) -> list[dict[str, str]]:
    return [{"__typename": typename, "key": key, "value": value} for key, value in pairs.items()]


async def _no_telemetry(request: Request) -> Response:
    return mlflow.answer({"disable_ui_telemetry": True})


async def _nothing(request: Request) -> Response:
    return mlflow.answer({})
