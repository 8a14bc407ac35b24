"""Writes what Headrace holds as an `mlruns/` folder, which MLflow's file store of the releases 2 and 3 reads.

A run, a logged model and a version appear in the folder when they are whole: until then they lie in a folder beside it. So one that was
killed is gone on with by starting it again, and what is there and unchanged is not written anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from headrace.http import Client, InvalidInput, Json
from headrace.sync.door import Door, texts
from headrace.sync.files import META, MODELS, TRASH
from headrace.sync.report import Report

STAMP = ".headrace"
"""In a folder that is whole: the hash of what the server said of it."""

_STATUSES = {"RUNNING": 1, "SCHEDULED": 2, "FINISHED": 3, "FAILED": 4, "KILLED": 5}
_MODEL_STATUSES = {"LOGGED_MODEL_PENDING": 1, "LOGGED_MODEL_READY": 2, "LOGGED_MODEL_UPLOAD_FAILED": 3}
_KEY = re.compile(r"[/\w.\- :]+")
_ID = re.compile(r"(?:m-)?[0-9a-f]{32}|[0-9]{1,18}")


class Exporter:
    """One transfer into `folder`."""

    def __init__(self, client: Client, folder: Path, report: Report) -> None:
        """Raises InvalidInput when the folder holds something else."""
        self._client = client
        self._door = Door(client)
        self._report = report
        self._top = Path(os.path.realpath(folder))
        if self._top.exists() and (not self._top.is_dir() or not _is_ours(self._top)):
            raise InvalidInput(f"{folder} holds something else than an mlruns folder")
        self._partial = self._top.parent / f".{self._top.name}.partial"
        self._locations: dict[str, Path] = {}

    def write(self, name: str | None) -> None:
        """All experiments, or the one of that name; then the registered models, or those of its runs.

        Raises InvalidInput when there is no such experiment, Unreachable, Denied.
        """
        self._top.mkdir(parents=True, exist_ok=True)
        (self._top / TRASH).mkdir(exist_ok=True)
        found = 0
        for experiment in self._door.experiments():
            if name in (None, experiment["name"]):
                self._experiment(experiment)
                found += 1
        if name is not None and not found:
            raise InvalidInput(f"Headrace has no experiment {name!r}")
        for model in self._door.registered_models():
            self._registered(model, only_of_runs=name is not None)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _experiment(self, experiment: Json) -> None:
        of, deleted = _id(experiment["experiment_id"]), experiment["lifecycle_stage"] == "deleted"
        here, elsewhere = self._top / of, self._top / TRASH / of
        if deleted:
            here, elsewhere = elsewhere, here
        if elsewhere.is_dir() and not here.exists():
            os.replace(elsewhere, here)
        here.mkdir(exist_ok=True)
        self._texts(here / "tags", experiment.get("tags"), f"experiment {of} tag")
        _yaml(
            here / META,
            {
                # Where it was before it was deleted: restoring moves it back.
                "artifact_location": (self._top / of).as_uri(),
                "creation_time": experiment.get("creation_time"),
                "experiment_id": of,
                "last_update_time": experiment.get("last_update_time"),
                "lifecycle_stage": experiment["lifecycle_stage"],
                "name": experiment["name"],
            },
        )
        self._report.taken["experiments"] += 1
        for model in self._door.logged_models(of):
            self._whole(
                here / MODELS / _id(model["info"]["model_id"]), model, "logged models", partial(self._model, experiment_id=of, model=model)
            )
        for run in self._door.runs(of):
            run_id = _id(run["info"]["run_id"])
            self._locations[run_id] = self._top / of / run_id / "artifacts"
            self._whole(here / run_id, run, "runs", partial(self._run, experiment=here, experiment_id=of, run=run))
        self._report.say(f"experiment {experiment['name']!r}: {dict(self._report.taken)}")

    def _whole(self, at: Path, said: Json, kind: str, write: Callable[[Path], None]) -> None:
        """Has a folder written beside, then puts it into its place."""
        stamp = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        if (at / STAMP).is_file() and (at / STAMP).read_text() == stamp:
            self._report.there[kind] += 1
            return
        written = self._partial / "written"
        shutil.rmtree(self._partial, ignore_errors=True)
        written.mkdir(parents=True)
        write(written)
        (written / STAMP).write_text(stamp)
        at.parent.mkdir(parents=True, exist_ok=True)
        if at.exists():
            os.replace(at, self._partial / "before")
        os.replace(written, at)
        self._report.taken[kind] += 1

    def _run(self, at: Path, experiment: Path, experiment_id: str, run: Json) -> None:
        info, data = run["info"], run["data"]
        run_id = info["run_id"]
        what = f"run {run_id}"
        for name in ("metrics", "params", "tags", "artifacts"):
            (at / name).mkdir()
        self._texts(at / "params", data.get("params"), f"{what} param")
        self._texts(at / "tags", data.get("tags"), f"{what} tag")
        for key in [one["key"] for one in data.get("metrics") or []]:
            if (file := self._file(at / "metrics", key, f"{what} metric")) is not None:
                with file.open("w", encoding="utf-8") as lines:
                    lines.writelines(
                        f"{one['timestamp']} {_number(one['value'])} {one.get('step', 0)}\n" for one in self._door.history(run_id, key)
                    )
        inputs = run.get("inputs") or {}
        for one in inputs.get("dataset_inputs") or []:
            self._dataset(at, experiment, run_id, one)
        for one in inputs.get("model_inputs") or []:
            link = {"source_type": "MODEL_INPUT", "source_id": one["model_id"], "destination_type": "MODEL_INPUT"}
            _link(at / "inputs" / _id(one["model_id"]), {**link, "destination_id": one["model_id"]})
        for one in (run.get("outputs") or {}).get("model_outputs") or []:
            link = {"source_type": "RUN_OUTPUT", "source_id": run_id, "destination_type": "MODEL_OUTPUT"}
            _link(at / "outputs" / _id(one["model_id"]), {**link, "destination_id": one["model_id"], "step": one.get("step", 0)})
        listed = self._client.get(f"/api/v1/runs/{run_id}/artifacts").get("artifacts", [])
        self._files(at / "artifacts", f"{experiment_id}/{run_id}/artifacts", [one["path"] for one in listed], what)
        _yaml(
            at / META,
            {
                "artifact_uri": self._locations[run_id].as_uri(),
                "end_time": info.get("end_time"),
                "entry_point_name": "",
                "experiment_id": experiment_id,
                "lifecycle_stage": info["lifecycle_stage"],
                "run_id": run_id,
                "run_name": info.get("run_name", ""),
                "run_uuid": run_id,
                "source_name": "",
                "source_type": 4,
                "source_version": "",
                "start_time": info.get("start_time"),
                "status": _STATUSES[info["status"]],
                "tags": [],
                "user_id": info.get("user_id", ""),
            },
        )

    def _dataset(self, at: Path, experiment: Path, run_id: str, one: Json) -> None:
        dataset = one["dataset"]
        of = hashlib.md5(f"{dataset['name']}\0{dataset['digest']}".encode(), usedforsecurity=False).hexdigest()
        folder = experiment / "datasets" / of
        folder.mkdir(parents=True, exist_ok=True)
        fields = ("name", "digest", "source_type", "source", "schema", "profile")
        _yaml(folder / META, {field: dataset.get(field) for field in fields})
        link = {"source_type": "DATASET", "source_id": of, "destination_type": "RUN", "destination_id": run_id}
        _link(at / "inputs" / of, {**link, "tags": texts(one.get("tags"))})

    def _model(self, at: Path, experiment_id: str, model: Json) -> None:
        info, data = model["info"], model.get("data") or {}
        of = info["model_id"]
        what = f"logged model {of}"
        for name in ("metrics", "params", "tags", "artifacts"):
            (at / name).mkdir()
        self._texts(at / "params", data.get("params"), f"{what} param")
        self._texts(at / "tags", info.get("tags"), f"{what} tag")
        for one in data.get("metrics") or []:
            if (file := self._file(at / "metrics", one["key"], f"{what} metric")) is not None:
                about = f" {one['dataset_name']} {one['dataset_digest']}" if one.get("dataset_name") else ""
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(f"{one['timestamp']} {_number(one['value'])} {one.get('step', 0)} {one['run_id']}{about}\n")
        paths = [one["path"] for one in self._door.model_files(of)]
        self._files(at / "artifacts", f"{experiment_id}/models/{of}/artifacts", paths, what)
        _yaml(
            at / META,
            {
                "artifact_location": (self._top / experiment_id / MODELS / of / "artifacts").as_uri(),
                "creation_timestamp": info["creation_timestamp_ms"],
                "experiment_id": experiment_id,
                "last_updated_timestamp": info["last_updated_timestamp_ms"],
                "model_id": of,
                "model_type": info.get("model_type"),
                "name": info["name"],
                "source_run_id": info.get("source_run_id") or None,
                "status": _MODEL_STATUSES[info["status"]],
                "status_message": None,
            },
        )

    def _registered(self, model: Json, *, only_of_runs: bool) -> None:
        name = model["name"]
        versions = [one for one in self._door.versions(name) if not only_of_runs or one.get("run_id") in self._locations]
        if only_of_runs and not versions:
            return
        if not _plain(name) or "/" in name:
            self._report.missed(f"registered model {name!r}", "MLflow's file store has no folder of that name")
            return
        at = self._top / MODELS / name
        at.mkdir(parents=True, exist_ok=True)
        self._texts(at / "tags", model.get("tags"), f"registered model {name!r} tag")
        aliases = [{"key": one["alias"], "value": str(one["version"])} for one in model.get("aliases") or []]
        self._texts(at / "aliases", aliases, f"registered model {name!r} alias")
        stamps = {key: model.get(key) for key in ("creation_timestamp", "last_updated_timestamp", "description")}
        _yaml(at / META, {"name": name, **stamps})
        self._report.taken["registered models"] += 1
        for one in versions:
            folder = at / f"version-{int(one['version'])}"
            self._whole(folder, one, "model versions", partial(self._version, one=one))

    def _version(self, at: Path, one: Json) -> None:
        (at / "tags").mkdir()
        self._texts(at / "tags", one.get("tags"), f"version {one['version']} of {one['name']!r} tag")
        fields = ("creation_timestamp", "current_stage", "description", "last_updated_timestamp", "name", "run_id", "run_link", "status")
        source = self._source(one)
        meta = {**{field: one.get(field) for field in fields}, "source": source, "storage_location": source, "version": int(one["version"])}
        _yaml(at / META, {**meta, "status_message": one.get("status_message"), "user_id": one.get("user_id")})

    def _source(self, one: Json) -> str:
        """Where the version's files are here, when they are those of a run."""
        source = str(one.get("source", ""))
        found = re.fullmatch(r"(?:mlflow-artifacts:/[0-9]+/([0-9a-f]{32})/artifacts|runs:/([0-9a-f]{32}))(?:/(.*))?", source)
        if found is None or (folder := self._locations.get(found[1] or found[2])) is None:
            return source
        return (folder / found[3]).as_uri() if found[3] else folder.as_uri()

    def _files(self, folder: Path, place: str, paths: Iterable[str], what: str) -> None:
        for path in paths:
            if not _plain(path):
                self._report.missed(f"{what} artifact {path!r}", "its path leads out of its folder")
                continue
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            self._door.get_file(f"{place}/{path}", file)
            self._report.taken["artifacts"] += 1

    def _texts(self, folder: Path, pairs: list[Json] | None, what: str) -> None:
        """Texts as files; of those that are gone from the server nothing stays."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for key, value in texts(pairs).items():
            if (file := self._file(folder, key, what)) is not None:
                file.write_text(value, encoding="utf-8", newline="")

    def _file(self, folder: Path, key: str, what: str) -> Path | None:
        """The file of a key; None, and reported, when MLflow's file store cannot have one."""
        if _plain(key) and _KEY.fullmatch(key):
            try:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                if not (folder / key).is_dir():
                    return folder / key
            except (FileExistsError, NotADirectoryError):
                why = "another key is a folder of its name"
            else:
                why = "another key begins with it and a slash"
        else:
            why = "MLflow's file store takes letters, digits, _ - . : / and blanks alone"
        self._report.missed(f"{what} {key!r}", why)
        return None


def _is_ours(folder: Path) -> bool:
    return not any(folder.iterdir()) or (folder / TRASH).is_dir()


def _plain(path: str) -> bool:
    """Whether a path stays in its folder."""
    return "\0" not in path and "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _id(text: str) -> str:
    """An id that may name a folder. Raises InvalidInput."""
    if not _ID.fullmatch(text):
        raise InvalidInput(f"{text[:100]!r} is not an id")
    return text


def _number(value: Any) -> float:
    """A metric's value; the wire has NaN as a text."""
    number = float(value)
    return number if math.isfinite(number) or math.isnan(number) else math.copysign(1.7976931348623157e308, number)


def _link(folder: Path, meta: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _yaml(folder / META, {"tags": {}, **meta})


def _yaml(path: Path, meta: Mapping[str, Any]) -> None:
    """Written beside and renamed, so that it is never half there."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        yaml.safe_dump(dict(meta), file, allow_unicode=True)
    os.replace(beside, path)
