"""The registry's part of MLflow's REST API: the table of its endpoints, and the component that serves it."""

from __future__ import annotations

from collections.abc import Mapping

from servicekit import mlflow
from servicekit.rest import RestApi

from registry.entrypoints.mlflow.models import RegisteredModels
from registry.entrypoints.mlflow.versions import ModelVersions
from registry.handlers.catalogue import Catalogue
from registry.handlers.versions import Versions


class MlflowApi:
    """A component that has `http`, which the process serves on its HTTP address."""

    name = "mlflow"

    def __init__(self, catalogue: Catalogue, versions: Versions, token_hashes: Mapping[str, str]) -> None:
        endpoints = [*RegisteredModels(catalogue, versions).endpoints(), *ModelVersions(catalogue, versions).endpoints()]
        self.http = RestApi(endpoints, token_hashes, mlflow.told, mlflow.missing)

    async def start(self) -> None:
        """Nothing to do: the process serves it."""

    async def stop(self) -> None:
        """Nothing to let go of."""
