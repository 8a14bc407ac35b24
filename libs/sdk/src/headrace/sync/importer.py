"""Brings a source's experiments, runs and logged models into Headrace.

The server gives ids of its own; what a thing was before is a tag of it. How far a transfer came is read from those tags alone, so one
that was killed at any moment is gone on with by starting it again, from whichever machine, and one that is complete changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import ParamSpec, TypeVar

from headrace.http import Client, InvalidInput, Json
from headrace.sync.door import Door, dataset_input, metric, pairs, texts
from headrace.sync.report import Report
from headrace.sync.source import Experiment, LoggedModel, Point, Run, Source
from headrace.uploads import upload

SOURCE_RUN = "headrace.source_run_id"
SOURCE_MODEL = "headrace.source_model_id"
DELETED_SOURCE = "headrace.source_deleted_experiment"
SYNCED = "headrace.synced"
"""On a run or logged model whose content is all there: of which state of the source."""

OURS = frozenset({SOURCE_RUN, SOURCE_MODEL, SYNCED})
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
LOGGED_MODELS = "mlflow.log-model.history"
POINTS = 1_000
TEXTS = 100
_STATUSES = {2: "LOGGED_MODEL_READY", 3: "LOGGED_MODEL_UPLOAD_FAILED"}

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Importer:
    """One transfer. After `experiments` the maps say what runs and models of the source have become."""

    def __init__(self, client: Client, source: Source, report: Report) -> None:
        self._client = client
        self._door = Door(client)
        self._source = source
        self._report = report
        self.run_ids: dict[str, tuple[str, str]] = {}
        """Of a run of the source: its id here and its experiment's."""
        self.model_ids: dict[str, str] = {}

    def experiments(self, name: str | None = None) -> None:
        """All experiments, or the one of that name. Raises InvalidInput when there is none, Unreachable, Denied."""
        chosen = [one for one in self._source.experiments() if name in (None, one.name)]
        if name is not None and not chosen:
            raise InvalidInput(f"the source has no experiment {name!r}")
        for experiment in chosen:
            self._experiment(experiment)

    def _experiment(self, experiment: Experiment) -> None:
        there = self._door.experiment(experiment.name)
        if there is None:
            ours = {DELETED_SOURCE: experiment.id} if experiment.deleted else {}
            target = self._door.create_experiment(experiment.name, ours)
            self._report.taken["experiments"] += 1
        else:
            target = str(there["experiment_id"])
            ours = {key: value for key, value in texts(there.get("tags")).items() if key == DELETED_SOURCE}
            gone = there["lifecycle_stage"] == "deleted"
            if gone and not experiment.deleted:
                self._report.missed(f"experiment {experiment.name!r}", "Headrace's experiment of that name is deleted: restore it first")
                return
            if experiment.deleted and ours.get(DELETED_SOURCE) != experiment.id:
                self._report.missed(f"deleted experiment {experiment.name!r}", "Headrace has another experiment of that name")
                return
            self._report.there["experiments"] += 1
            if gone:  # it was deleted when all was there
                self._known(target)
                return
        for key, value in experiment.tags.items():
            if there is None or texts(there.get("tags")).get(key) != value:
                self._try(
                    f"tag {key!r} of experiment {experiment.name!r}",
                    self._door.again,
                    "/experiments/set-experiment-tag",
                    {"experiment_id": target, "key": key, "value": value},
                )
        self._content(experiment, target)
        if experiment.deleted:
            self._door.once("/experiments/delete", {"experiment_id": target})
        self._report.say(f"experiment {experiment.name!r}: {dict(self._report.taken)}")

    def _content(self, experiment: Experiment, target: str) -> None:
        complete = self._known(target)
        runs = {one.id: one for one in self._source.runs(experiment)}
        pending = {one.id: one for one in runs.values() if complete.get(one.id) != _state(one)}
        self._report.there["runs"] += len(runs) - len(pending)
        # Parents first: a run says at its beginning whose child it is.
        for run in pending.values():
            self._begin(run, experiment, runs, [])
            if run.deleted and run.id in self.run_ids:  # by an earlier transfer, and changed in the source since
                self._door.again("/runs/restore", {"run_id": self.run_ids[run.id][0]})
        models = list(self._source.logged_models(experiment))
        for model in models:
            self._model(model, target, complete)
        for run in pending.values():
            if run.id in self.run_ids:
                self._fill(run)
        for model in models:
            self._finish_model(model, complete)
        for run in pending.values():
            if run.id in self.run_ids:
                self._end(run)
                self._report.taken["runs"] += 1
                self._report.say(f"run {run.id} is run {self.run_ids[run.id][0]}")

    def _known(self, target: str) -> dict[str, str]:
        """What is there of earlier transfers; answers the state of each whose content is complete, by its id in the source."""
        complete = {}
        for run in self._door.runs(target, f"tags.`{SOURCE_RUN}` LIKE '%'"):
            tags = texts(run["data"].get("tags"))
            self.run_ids[tags[SOURCE_RUN]] = (run["info"]["run_id"], target)
            if run["info"].get("status") + run["info"]["lifecycle_stage"] == tags.get(SYNCED, "").partition(" ")[0]:
                complete[tags[SOURCE_RUN]] = tags[SYNCED]
        for model in self._door.logged_models(target, f"tags.`{SOURCE_MODEL}` LIKE '%'"):
            tags = texts(model["info"].get("tags"))
            self.model_ids[tags[SOURCE_MODEL]] = model["info"]["model_id"]
            complete[tags[SOURCE_MODEL]] = tags.get(SYNCED, "")
        return complete

    def _begin(self, run: Run, experiment: Experiment, runs: Mapping[str, Run], children: Sequence[str]) -> None:
        if run.id in self.run_ids:
            return
        tags = {SOURCE_RUN: run.id}
        parent = self._source.details(run).tags.get(PARENT, "")
        if parent in runs and parent not in (*children, run.id):
            self._begin(runs[parent], experiment, runs, [*children, run.id])
        if parent in self.run_ids:
            tags[PARENT] = self.run_ids[parent][0]
        if run.name:
            tags[RUN_NAME] = run.name
        asked = {
            "experiment": experiment.name,
            "name": run.name,
            "started_ms": run.started_ms,
            "tags": tags,
            "request_id": f"sync-{run.id}",
        }
        made = self._try(f"run {run.id}", self._client.post, "/api/v1/runs", asked)
        if made is not None:
            self.run_ids[run.id] = (made["run"]["run_id"], made["run"]["experiment_id"])

    def _fill(self, run: Run) -> None:
        """All that a run logged. Everything may be logged again."""
        target = self.run_ids[run.id][0]
        what = f"run {run.id}"
        details = self._source.details(run)
        tags = {key: value for key, value in details.tags.items() if key not in OURS}
        if tags.get(PARENT, "") in self.run_ids:
            tags[PARENT] = self.run_ids[tags[PARENT]][0]
        history = tags.pop(LOGGED_MODELS, None)
        self._log(f"{what} param", target, "params", pairs(details.params), TEXTS)
        self._log(f"{what} tag", target, "tags", pairs(tags), TEXTS)
        if history is not None:
            self._history(what, target, history)
        points = self._log(f"{what} metric", target, "metrics", map(metric, self._source.points(run)), POINTS)
        self._report.taken["metric points"] += points
        for dataset in details.datasets:
            asked = {"run_id": target, "datasets": [dataset_input(dataset)]}
            self._try(f"{what} data set {dataset.name!r}", self._door.again, "/runs/log-inputs", asked)
        read = [{"model_id": self.model_ids[one]} for one in details.models_read if one in self.model_ids]
        made = [{"model_id": self.model_ids[one], "step": step} for one, step in details.models_made if one in self.model_ids]
        if read:
            self._try(what, self._door.again, "/runs/log-inputs", {"run_id": target, "models": read})
        if made:
            self._try(what, self._door.again, "/runs/outputs", {"run_id": target, "models": made})
        start = f"/api/v1/runs/{target}/uploads"
        for path, file in self._source.artifacts.files(what, run.artifact_uri, f"{run.experiment_id}/{run.id}/artifacts"):
            if self._try(f"{what} artifact {path}", upload, self._client, start, file, {"path": path}) is not None:
                self._report.taken["artifacts"] += 1

    def _end(self, run: Run) -> None:
        target = self.run_ids[run.id][0]
        self._door.log(target, tags=[{"key": SYNCED, "value": _state(run)}])
        if run.status != "RUNNING":
            asked = {"run_id": target, "status": run.status, **({"end_time": run.ended_ms} if run.ended_ms else {})}
            self._try(f"run {run.id}", self._door.again, "/runs/update", asked)
        if run.deleted:
            self._door.again("/runs/delete", {"run_id": target})

    def _model(self, model: LoggedModel, target: str, complete: Mapping[str, str]) -> None:
        if model.deleted:
            self._report.missed(f"logged model {model.id}", "it is deleted")
            return
        if complete.get(model.id) == _model_state(model):
            self._report.there["logged models"] += 1
            return
        what = f"logged model {model.id}"
        tags = {key: value for key, value in model.tags.items() if key not in OURS}
        if model.id not in self.model_ids:
            asked = {
                "experiment_id": target,
                "name": model.name,
                "model_type": model.model_type,
                "source_run_id": self.run_ids.get(model.source_run_id, ("", ""))[0],
                "tags": pairs({**tags, SOURCE_MODEL: model.id}),
                "params": pairs(model.params),
            }
            made = self._try(what, self._door.once, "/logged-models", asked)
            if made is None:
                return
            self.model_ids[model.id] = made["model"]["info"]["model_id"]
        here = self.model_ids[model.id]
        stored = {one["path"]: one.get("file_size") for one in self._door.model_files(here)}
        for path, file in self._source.artifacts.files(what, model.artifact_uri, f"{model.experiment_id}/models/{model.id}/artifacts"):
            if stored.get(path) == file.stat().st_size:
                continue
            place = f"{target}/models/{here}/artifacts/{path}"
            self._try(f"{what} artifact {path}", self._door.put_file, place, file)
            self._report.taken["artifacts"] += 1

    def _finish_model(self, model: LoggedModel, complete: Mapping[str, str]) -> None:
        here = self.model_ids.get(model.id)
        if here is None or model.deleted or complete.get(model.id) == _model_state(model):
            return
        what = f"logged model {model.id}"
        for run_id, points in _by_run(self._source.model_points(model)):
            if run_id not in self.run_ids:
                self._report.missed(f"{what} metrics of run {run_id}", "that run was not taken")
                continue
            target = self.run_ids[run_id][0]
            wired = [metric(one, here) for one in points]
            self._log(f"{what} metric", target, "metrics", wired, POINTS)
        if model.status in _STATUSES:
            self._try(what, self._client.patch, f"/api/2.0/mlflow/logged-models/{here}", {"status": _STATUSES[model.status]})
        tags = {**{key: value for key, value in model.tags.items() if key not in OURS}, SYNCED: _model_state(model)}
        self._client.patch(f"/api/2.0/mlflow/logged-models/{here}/tags", {"tags": pairs(tags)})
        self._report.taken["logged models"] += 1

    def _history(self, what: str, target: str, history: str) -> None:
        """Models that older clients logged, which a tag holds: their run is another here."""
        try:
            models = json.loads(history)
            if not isinstance(models, list):
                raise ValueError("not a list")
        except (ValueError, RecursionError) as error:
            self._report.missed(f"{what} tag {LOGGED_MODELS}", f"it is not a list of models: {error}")
            return
        for model in models:
            mapped = json.dumps({**model, "run_id": target}) if isinstance(model, dict) else json.dumps(model)
            asked = {"run_id": target, "model_json": mapped}
            self._try(f"{what} model", self._door.again, "/runs/log-model", asked)

    def _log(self, what: str, target: str, field: str, things: Iterable[Json], size: int) -> int:
        """Logs metrics, params or tags in batches, and answers how many went."""
        rest = iter(things)
        sent = 0
        while some := list(islice(rest, size)):
            sent += self._send(what, target, field, some)
        return sent

    def _send(self, what: str, target: str, field: str, some: list[Json]) -> int:
        """One batch; of one that is refused each half, so that only what is wrong is left out."""
        try:
            self._door.log(target, **{field: some})
            return len(some)
        except InvalidInput as error:
            if len(some) == 1:
                self._report.missed(f"{what} {str(some[0]['key'])[:100]!r}", str(error)[:500])
                return 0
        half = len(some) // 2
        return self._send(what, target, field, some[:half]) + self._send(what, target, field, some[half:])

    def _try(self, what: str, call: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T | None:
        """What the call answers; None, and reported, when it can never succeed."""
        try:
            return call(*args, **named)
        except InvalidInput as error:
            self._report.missed(what, str(error)[:500])
            return None


def _state(run: Run) -> str:
    """What is known of a run's state without reading what it logged: another state is taken again."""
    return f"{run.status}{'deleted' if run.deleted else 'active'} {run.ended_ms}"


def _model_state(model: LoggedModel) -> str:
    facts = json.dumps([model.status, sorted(model.tags.items()), sorted(model.params.items())])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _by_run(points: Iterator[Point]) -> Iterator[tuple[str, list[Point]]]:
    """Points in runs of one run's, not more than a batch each."""
    batch: list[Point] = []
    for point in points:
        if batch and (point.run_id != batch[0].run_id or len(batch) == POINTS):
            yield batch[0].run_id, batch
            batch = []
        batch.append(point)
    if batch:
        yield batch[0].run_id, batch
