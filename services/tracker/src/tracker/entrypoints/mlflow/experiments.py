"""MLflow's REST API on experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid
from servicekit.mlflow import endpoints
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from tracker.domain.run import Experiment
from tracker.entrypoints.mlflow.rules import READ, WRITE_ALL
from tracker.entrypoints.mlflow.wire import KeyValue, experiment_location, experiment_number, key_values, required, texts
from tracker.experiments import Experiments


class _Create(msgspec.Struct):
    name: str = ""
    artifact_location: str = ""
    tags: tuple[KeyValue, ...] = ()


class _Named(msgspec.Struct):
    experiment_id: str = ""
    experiment_name: str = ""


class _Update(msgspec.Struct):
    experiment_id: str = ""
    new_name: str = ""


class _Tag(msgspec.Struct):
    experiment_id: str = ""
    key: str = ""
    value: str = ""


class ExperimentsApi:
    """The endpoints on experiments."""

    def __init__(self, experiments: Experiments) -> None:
        self._experiments = experiments

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/experiments/create", WRITE_ALL, self._create),
                ("GET", "/experiments/get", READ, self._get),
                ("GET", "/experiments/get-by-name", READ, self._get_by_name),
                ("POST", "/experiments/update", WRITE_ALL, self._update),
                ("POST", "/experiments/delete", WRITE_ALL, self._delete),
                ("POST", "/experiments/restore", WRITE_ALL, self._restore),
                ("POST", "/experiments/set-experiment-tag", WRITE_ALL, self._set_tag),
                ("POST", "/experiments/delete-experiment-tag", WRITE_ALL, self._delete_tag),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        required("name", asked.name)
        if asked.artifact_location not in ("", "mlflow-artifacts:/"):
            raise Invalid(
                f"Invalid value for parameter 'artifact_location': {asked.artifact_location[:200]!r}. "
                "The server decides where artifacts are; leave it out"
            )
        made = await self._experiments.create(current_caller(), asked.name, "", texts(asked.tags))
        return mlflow.answer({"experiment_id": str(made.id)})

    async def _get(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        found = await self._experiments.get(current_caller(), experiment_number(asked.experiment_id), "")
        return mlflow.answer({"experiment": experiment_json(found)})

    async def _get_by_name(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        found = await self._experiments.get(current_caller(), 0, required("experiment_name", asked.experiment_name))
        return mlflow.answer({"experiment": experiment_json(found)})

    async def _update(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Update)
        await self._experiments.rename(current_caller(), experiment_number(asked.experiment_id), required("new_name", asked.new_name))
        return mlflow.answer({})

    async def _delete(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        await self._experiments.delete(current_caller(), experiment_number(asked.experiment_id))
        return mlflow.answer({})

    async def _restore(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        await self._experiments.restore(current_caller(), experiment_number(asked.experiment_id))
        return mlflow.answer({})

    async def _set_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tag)
        experiment_id = experiment_number(asked.experiment_id)
        await self._experiments.set_tag(current_caller(), experiment_id, required("key", asked.key), asked.value)
        return mlflow.answer({})

    async def _delete_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tag)
        await self._experiments.delete_tag(current_caller(), experiment_number(asked.experiment_id), required("key", asked.key))
        return mlflow.answer({})


def experiment_json(found: Experiment) -> dict[str, Any]:
    """An experiment as MLflow writes it."""
    return {
        "experiment_id": str(found.id),
        "name": found.name,
        "artifact_location": experiment_location(found.id),
        "lifecycle_stage": found.lifecycle_stage,
        "creation_time": found.created_ms,
        "last_update_time": found.last_update_ms,
        "tags": key_values(found.tags),
    }
