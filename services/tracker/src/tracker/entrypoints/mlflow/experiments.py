"""MLflow's REST API on experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from tracker.domain.run import Experiment
from tracker.entrypoints.mlflow.rules import READ, WRITE_ALL, endpoints
from tracker.handlers import Tracker


class _Create(msgspec.Struct):
    name: str = ""


class _Named(msgspec.Struct):
    experiment_id: str = ""
    experiment_name: str = ""


class Experiments:
    """The endpoints on experiments."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/experiments/create", WRITE_ALL, self._create),
                ("GET", "/experiments/get", READ, self._get),
                ("GET", "/experiments/get-by-name", READ, self._get_by_name),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        made = await self._tracker.create_experiment(current_caller(), asked.name, "")
        return mlflow.answer({"experiment_id": str(made.id)})

    async def _get(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        found = await self._tracker.get_experiment(current_caller(), experiment_number(asked.experiment_id), "")
        return mlflow.answer({"experiment": experiment(found)})

    async def _get_by_name(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        if not asked.experiment_name:
            raise Invalid("Missing value for required parameter 'experiment_name'.")
        return mlflow.answer({"experiment": experiment(await self._tracker.get_experiment(current_caller(), 0, asked.experiment_name))})


def experiment(found: Experiment) -> dict[str, Any]:
    """An experiment as MLflow writes it."""
    return {
        "experiment_id": str(found.id),
        "name": found.name,
        "artifact_location": f"mlflow-artifacts:/{found.id}",
        "lifecycle_stage": found.lifecycle_stage,
        "creation_time": found.created_ms,
        "last_update_time": found.created_ms,
    }


def experiment_number(text: str) -> int:
    """An experiment's id, which the wire has as a text. Raises Invalid."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Invalid(f"Invalid value for parameter 'experiment_id': {text[:50]!r} is not the id of an experiment")
    return int(text)
