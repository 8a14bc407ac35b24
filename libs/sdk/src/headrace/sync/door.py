"""The calls of Headrace's API that a transfer makes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from headrace.http import Client, InvalidInput, Json, Unreachable, pause
from headrace.sync.source import Dataset, Point

API = "/api/2.0/mlflow"
PAGE = 200


class Door:
    """MLflow's API behind a gateway. What may be repeated is repeated by the client; things that are made here are made once."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def experiment(self, name: str) -> Json | None:
        """An experiment by its name, deleted ones too; None when there is none."""
        return self._found(f"{API}/experiments/get-by-name", "experiment", experiment_name=name)

    def create_experiment(self, name: str, tags: Mapping[str, str]) -> str:
        return str(self.client.post(f"{API}/experiments/create", {"name": name, "tags": pairs(tags)})["experiment_id"])

    def experiments(self) -> Iterator[Json]:
        yield from self._pages(f"{API}/experiments/search", "experiments", {"view_type": "ALL", "max_results": PAGE})

    def runs(self, experiment_id: str, filter: str = "", size: int = PAGE) -> Iterator[Json]:
        asked = {"experiment_ids": [experiment_id], "filter": filter, "run_view_type": "ALL", "max_results": size}
        yield from self._pages(f"{API}/runs/search", "runs", asked)

    def logged_models(self, experiment_id: str, filter: str = "") -> Iterator[Json]:
        asked = {"experiment_ids": [experiment_id], "filter": filter, "max_results": PAGE}
        yield from self._pages(f"{API}/logged-models/search", "models", asked)

    def registered_model(self, name: str) -> Json | None:
        return self._found(f"{API}/registered-models/get", "registered_model", name=name)

    def registered_models(self) -> Iterator[Json]:
        yield from self._gets(f"{API}/registered-models/search", "registered_models", max_results=PAGE)

    def versions(self, name: str) -> Iterator[Json]:
        quoted = name.replace("'", "''")
        yield from self._gets(f"{API}/model-versions/search", "model_versions", filter=f"name = '{quoted}'", max_results=PAGE)

    def history(self, run_id: str, key: str) -> Iterator[Json]:
        yield from self._gets(f"{API}/metrics/get-history", "metrics", run_id=run_id, metric_key=key, max_results=10_000)

    def log(self, run_id: str, **batch: Any) -> None:
        self.client.post(f"{API}/runs/log-batch", {"run_id": run_id, **batch}, repeatable=True)

    def again(self, path: str, body: Mapping[str, Any]) -> Json:
        """A POST that may be repeated."""
        return self.client.post(f"{API}{path}", body, repeatable=True)

    def once(self, path: str, body: Mapping[str, Any]) -> Json:
        """A POST that makes something anew each time."""
        return self.client.post(f"{API}{path}", body)

    def put_file(self, place: str, file: Path) -> None:
        """Sends an artifact, in constant memory; again after errors that may pass."""
        path = f"/api/2.0/mlflow-artifacts/artifacts/{quote(place)}"
        for attempt in itertools.count():
            try:
                self.client.send_file(path, file)
                return
            except Unreachable:
                if attempt == 4:
                    raise
            time.sleep(pause(attempt))

    def get_file(self, place: str, file: Path) -> None:
        """Fetches an artifact into a new file."""
        self.client.fetch_file(f"/api/2.0/mlflow-artifacts/artifacts/{quote(place)}", file)

    def model_files(self, model_id: str) -> Iterator[Json]:
        """All files of a logged model, folder by folder."""
        folders = [""]
        while folders:
            asked = {"artifact_directory_path": folders.pop()}
            for one in self._gets(f"{API}/logged-models/{model_id}/artifacts/directories", "files", **asked):
                if one.get("is_dir"):
                    folders.append(one["path"])
                else:
                    yield one

    def _found(self, path: str, what: str, **params: Any) -> Json | None:
        try:
            return dict(self.client.get(path, **params)[what])
        except InvalidInput as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _pages(self, path: str, what: str, asked: Json) -> Iterator[Json]:
        token = ""
        while True:
            answer = self.client.post(path, {**asked, "page_token": token}, repeatable=True)
            yield from answer.get(what, [])
            if not (token := answer.get("next_page_token", "")):
                return

    def _gets(self, path: str, what: str, **params: Any) -> Iterator[Json]:
        token = None
        while True:
            answer = self.client.get(path, page_token=token, **params)
            yield from answer.get(what, [])
            if not (token := answer.get("next_page_token")):
                return


def pairs(texts: Mapping[str, str]) -> list[Json]:
    """Tags or params as the wire has them."""
    return [{"key": key, "value": value} for key, value in texts.items()]


def texts(found: Sequence[Json] | None) -> dict[str, str]:
    """Tags or params as read from the wire."""
    return {one["key"]: one.get("value", "") for one in found or ()}


def metric(point: Point, model_id: str = "") -> Json:
    """A point as the wire has it."""
    value = (
        point.value if math.isfinite(point.value) else "NaN" if math.isnan(point.value) else "Infinity" if point.value > 0 else "-Infinity"
    )
    body: Json = {"key": point.key, "value": value, "timestamp": point.timestamp_ms, "step": point.step}
    if model_id:
        body |= {"model_id": model_id, "dataset_name": point.dataset_name, "dataset_digest": point.dataset_digest}
    return body


def dataset_input(one: Dataset) -> Json:
    """A data set that a run reads, as the wire has it."""
    described = {"name": one.name, "digest": one.digest, "source_type": one.source_type, "source": one.source}
    return {"tags": pairs(one.tags), "dataset": {**described, "schema": one.schema, "profile": one.profile}}
