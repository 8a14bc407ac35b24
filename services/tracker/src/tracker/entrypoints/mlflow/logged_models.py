"""MLflow's REST API on logged models."""

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

from tracker.artifacts import MAX_LISTED, Artifacts
from tracker.domain.artifact import Place
from tracker.domain.logged_model import LoggedModelView, ModelStatus, OnDataset
from tracker.entrypoints.mlflow.artifacts import FileResponse, file_json
from tracker.entrypoints.mlflow.rules import READ, WRITE
from tracker.entrypoints.mlflow.wire import KeyValue, experiment_number, key_values, metric_json, required, texts
from tracker.logged_models import LoggedModels, NewModel, Ordering

_STATUSES = {
    ModelStatus.PENDING: ("LOGGED_MODEL_PENDING", 1),
    ModelStatus.READY: ("LOGGED_MODEL_READY", 2),
    ModelStatus.FAILED: ("LOGGED_MODEL_UPLOAD_FAILED", 3),
}
"""Clients write a status by its name or by its number."""


class _Create(msgspec.Struct):
    experiment_id: str = ""
    name: str = ""
    model_type: str = ""
    source_run_id: str = ""
    params: list[KeyValue] = []
    tags: list[KeyValue] = []


class _Get(msgspec.Struct):
    allow_deleted: str = ""


class _Finalize(msgspec.Struct):
    status: int | str = ""


class _Params(msgspec.Struct):
    params: list[KeyValue] = []


class _Tags(msgspec.Struct):
    tags: list[KeyValue] = []


class _Dataset(msgspec.Struct):
    dataset_name: str = ""
    dataset_digest: str = ""


class _OrderBy(msgspec.Struct):
    field_name: str = ""
    ascending: bool = True
    dataset_name: str = ""
    dataset_digest: str = ""


class _Search(msgspec.Struct):
    experiment_ids: list[str] = []
    filter: str = ""
    datasets: list[_Dataset] = []
    max_results: int = 0
    order_by: list[_OrderBy] = []
    page_token: str = ""


class _Files(msgspec.Struct):
    artifact_directory_path: str = ""
    artifact_file_path: str = ""
    page_token: str = ""


class LoggedModelsApi:
    """The endpoints on logged models."""

    def __init__(self, models: LoggedModels, artifacts: Artifacts) -> None:
        self._models = models
        self._artifacts = artifacts

    def endpoints(self) -> Sequence[Endpoint]:
        one = "/logged-models/{model_id}"
        return endpoints(
            [
                ("POST", "/logged-models", WRITE, self._create),
                ("POST", "/logged-models/search", READ, self._search),
                ("GET", one, READ, self._get),
                ("PATCH", one, WRITE, self._finalize),
                ("DELETE", one, WRITE, self._delete),
                ("POST", f"{one}/params", WRITE, self._log_params),
                ("PATCH", f"{one}/tags", WRITE, self._set_tags),
                ("DELETE", f"{one}/tags/{{key:path}}", WRITE, self._delete_tag),
                ("GET", f"{one}/artifacts/directories", READ, self._list),
                ("GET", f"{one}/artifacts/files", READ, self._file),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        command = NewModel(
            experiment_number(asked.experiment_id),
            asked.name,
            asked.model_type,
            asked.source_run_id,
            texts(asked.params),
            texts(asked.tags),
        )
        return mlflow.answer({"model": model_json(await self._models.create(current_caller(), command))})

    async def _get(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Get)
        found = await self._models.get(current_caller(), _model_id(request), deleted=asked.allow_deleted.lower() == "true")
        return mlflow.answer({"model": model_json(found)})

    async def _finalize(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Finalize)
        status = next((status for status, names in _STATUSES.items() if asked.status in names), "")
        return mlflow.answer({"model": model_json(await self._models.finalize(current_caller(), _model_id(request), status))})

    async def _delete(self, request: Request) -> Response:
        await self._models.delete(current_caller(), _model_id(request))
        return mlflow.answer({})

    async def _log_params(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Params)
        await self._models.log_params(current_caller(), _model_id(request), texts(asked.params))
        return mlflow.answer({})

    async def _set_tags(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tags)
        await self._models.set_tags(current_caller(), _model_id(request), texts(asked.tags))
        return mlflow.answer({})

    async def _delete_tag(self, request: Request) -> Response:
        await self._models.delete_tag(current_caller(), _model_id(request), request.path_params["key"])
        return mlflow.answer({})

    async def _search(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Search)
        if not asked.experiment_ids:
            raise Invalid("Missing value for required parameter 'experiment_ids'.")
        found, token = await self._models.search(
            current_caller(),
            [experiment_number(one) for one in asked.experiment_ids],
            asked.filter,
            [OnDataset(one.dataset_name, one.dataset_digest) for one in asked.datasets],
            [
                Ordering(one.field_name, one.ascending, OnDataset(one.dataset_name, one.dataset_digest) if one.dataset_name else None)
                for one in asked.order_by
            ],
            asked.max_results,
            asked.page_token,
        )
        told_page: dict[str, Any] = {"models": [model_json(one) for one in found]}
        if token:
            told_page["next_page_token"] = token
        return mlflow.answer(told_page)

    async def _list(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Files)
        caller, found = current_caller(), await self._models.get(current_caller(), _model_id(request))
        where = Place(found.model.experiment_id, found.model.model_id, asked.artifact_directory_path.rstrip("/"))
        listed = await self._artifacts.listed(caller, where, asked.page_token, MAX_LISTED)
        told_files: dict[str, Any] = {"root_uri": found.model.artifact_uri, "files": [file_json(one) for one in listed]}
        if len(listed) == MAX_LISTED:
            told_files["next_page_token"] = listed[-1].path.rpartition("/")[2]
        return mlflow.answer(told_files)

    async def _file(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Files)
        found = await self._models.get(current_caller(), _model_id(request))
        where = Place(found.model.experiment_id, found.model.model_id, required("artifact_file_path", asked.artifact_file_path))
        return FileResponse(await self._artifacts.open(current_caller(), where))


def model_json(view: LoggedModelView) -> dict[str, Any]:
    """A logged model as MLflow writes it."""
    model = view.model
    info: dict[str, Any] = {
        "model_id": model.model_id,
        "experiment_id": str(model.experiment_id),
        "name": model.name,
        "creation_timestamp_ms": model.created_ms,
        "last_updated_timestamp_ms": model.updated_ms,
        "artifact_uri": model.artifact_uri,
        "status": _STATUSES[model.status][0],
        "model_type": model.model_type,
        "source_run_id": model.source_run_id,
        "tags": key_values(view.tags),
    }
    metrics = []
    for run_id, one in view.metrics:
        about = {"dataset_name": one.dataset_name, "dataset_digest": one.dataset_digest} if one.dataset_name else {}
        metrics.append({**metric_json(one.metric), **about, "model_id": model.model_id, "run_id": run_id})
    return {"info": info, "data": {"params": key_values(view.params), "metrics": metrics}}


def _model_id(request: Request) -> str:
    model_id: str = request.path_params["model_id"]
    if "\x00" in model_id:
        raise Invalid("Invalid value for parameter 'model_id'.")
    return model_id
