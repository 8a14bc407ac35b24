"""The tracker's part of MLflow's REST API: the table of its endpoints, and the component that serves it."""

from __future__ import annotations

from collections.abc import Mapping

from servicekit import mlflow
from servicekit.rest import RestApi

from tracker.entrypoints.mlflow.experiments import Experiments
from tracker.handlers import Tracker


class MlflowApi:
    """A component that has `http`, which the process serves on its HTTP address."""

    name = "mlflow"

    def __init__(self, tracker: Tracker, token_hashes: Mapping[str, str]) -> None:
        endpoints = [*Experiments(tracker).endpoints()]
        self.http = RestApi(endpoints, token_hashes, mlflow.told, mlflow.missing)

    async def start(self) -> None:
        """Nothing to do: the process serves it."""

    async def stop(self) -> None:
        """Nothing to let go of."""
