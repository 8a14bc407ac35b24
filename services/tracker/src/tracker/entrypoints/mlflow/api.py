"""The tracker's part of MLflow's REST API: the table of its endpoints, and the component that serves it."""

from __future__ import annotations

from collections.abc import Mapping

from servicekit import mlflow
from servicekit.rest import RestApi

from tracker.amendments import Amendments
from tracker.artifacts import Artifacts
from tracker.entrypoints.mlflow import about
from tracker.entrypoints.mlflow.artifacts import ArtifactsApi
from tracker.entrypoints.mlflow.experiments import ExperimentsApi
from tracker.entrypoints.mlflow.graphql import GraphqlApi
from tracker.entrypoints.mlflow.inputs import InputsApi
from tracker.entrypoints.mlflow.logged_models import LoggedModelsApi
from tracker.entrypoints.mlflow.logging import LoggingApi
from tracker.entrypoints.mlflow.metrics import MetricsApi
from tracker.entrypoints.mlflow.runs import RunsApi
from tracker.entrypoints.mlflow.search import SearchApi
from tracker.experiments import Experiments
from tracker.handlers import Tracker
from tracker.histories import Histories
from tracker.logged_models import LoggedModels
from tracker.searches import Searches


class MlflowApi:
    """A component that has `http`, which the process serves on its HTTP address."""

    name = "mlflow"

    def __init__(
        self,
        experiments: Experiments,
        tracker: Tracker,
        amendments: Amendments,
        searches: Searches,
        histories: Histories,
        artifacts: Artifacts,
        logged_models: LoggedModels,
        token_hashes: Mapping[str, str],
    ) -> None:
        endpoints = [
            *ExperimentsApi(experiments).endpoints(),
            *RunsApi(tracker, amendments).endpoints(),
            *LoggingApi(tracker, amendments).endpoints(),
            *InputsApi(amendments).endpoints(),
            *SearchApi(searches).endpoints(),
            *MetricsApi(histories).endpoints(),
            *ArtifactsApi(artifacts).endpoints(),
            *LoggedModelsApi(logged_models, artifacts).endpoints(),
            *GraphqlApi(experiments, amendments).endpoints(),
            *about.endpoints(),
        ]
        self.http = RestApi(endpoints, token_hashes, mlflow.told, mlflow.missing)

    async def start(self) -> None:
        """Nothing to do: the process serves it."""

    async def stop(self) -> None:
        """Nothing to let go of."""
