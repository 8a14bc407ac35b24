"""Reads an `mlruns/` folder: MLflow's file store, as its releases 2 and 3 write it.

Nothing is read that a link leads to out of the folder, and no line or list is held that grows with the size of a metric's history.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from headrace.http import InvalidInput
from headrace.sync.report import Report
from headrace.sync.source import ArtifactFolders, Dataset, Details, Experiment, LoggedModel, Point, RegisteredModel, Run, Version

META = "meta.yaml"
TRASH = ".trash"
MODELS = "models"
_RESERVED = frozenset({"tags", "datasets", "traces", MODELS})
_STATUSES = {1: "RUNNING", 2: "SCHEDULED", 3: "FINISHED", 4: "FAILED", 5: "KILLED"}
_MAX_TEXT = 4 * 1024 * 1024
"""Characters of a tag, a param or a description in YAML; more is no such thing."""


class FileSource:
    """A Source over a folder."""

    def __init__(self, root: Path, artifacts_root: Path | None, report: Report) -> None:
        """Raises InvalidInput when there is no such folder, or it holds no experiment."""
        self._root = Path(os.path.realpath(root))
        self._report = report
        if not self._root.is_dir():
            raise InvalidInput(f"{root} is not a folder")
        if not any((entry / META).is_file() for entry in self._root.iterdir()):
            raise InvalidInput(f"{root} is not an mlruns folder: no folder in it has a {META}")
        self._folders: dict[str, Path] = {}
        self.artifacts = ArtifactFolders([self._root, *([artifacts_root] if artifacts_root else [])], report)

    def experiments(self) -> Iterator[Experiment]:
        for parent, deleted in ((self._root, False), (self._root / TRASH, True)):
            for folder in self._folders_in(parent):
                if folder.name in (TRASH, MODELS) or (meta := self._meta(folder, "experiment")) is None:
                    continue
                found = _text(meta, "experiment_id") or folder.name
                self._folders[found] = folder
                gone = deleted or meta.get("lifecycle_stage") == "deleted"
                yield Experiment(found, _text(meta, "name"), gone, self._texts(folder / "tags"))

    def runs(self, experiment: Experiment) -> Iterator[Run]:
        for folder in self._folders_in(self._folders[experiment.id]):
            if folder.name in _RESERVED or (meta := self._meta(folder, "run")) is None:
                continue
            try:
                status = meta.get("status", 1)
                yield Run(
                    folder.name,
                    experiment.id,
                    _text(meta, "run_name") or _text(meta, "name"),
                    _STATUSES.get(status, "RUNNING") if isinstance(status, int) else str(status),
                    int(meta.get("start_time") or 0),
                    int(meta.get("end_time") or 0),
                    # Those of a deleted experiment come back with it.
                    meta.get("lifecycle_stage") == "deleted" and not experiment.deleted,
                    _text(meta, "artifact_uri"),
                )
            except (TypeError, ValueError) as error:
                self._report.missed(f"run {folder.name}", f"its {META} is malformed: {error}")

    def details(self, run: Run) -> Details:
        folder = self._folders[run.experiment_id] / run.id
        datasets: list[Dataset] = []
        read: list[str] = []
        for one in self._folders_in(folder / "inputs"):
            if (meta := self._meta(one, f"input of run {run.id}")) is None:
                continue
            if meta.get("source_type") == "DATASET":
                described = self._dataset(run, _text(meta, "source_id"))
                if described is not None:
                    tags = meta.get("tags") or {}
                    datasets.append(Dataset(*described, {str(key): str(value) for key, value in tags.items()}))
            elif meta.get("source_type") == "MODEL_INPUT" or one.name.startswith("m-"):
                read.append(one.name)
        made = [
            (one.name, int(meta.get("step") or 0))
            for one in self._folders_in(folder / "outputs")
            if (meta := self._meta(one, f"output of run {run.id}")) is not None
        ]
        return Details(self._texts(folder / "params"), self._texts(folder / "tags"), datasets, read, made)

    def points(self, run: Run) -> Iterator[Point]:
        yield from self._points(self._folders[run.experiment_id] / run.id / "metrics", f"run {run.id}", of_model=False)

    def logged_models(self, experiment: Experiment) -> Iterator[LoggedModel]:
        for folder in self._folders_in(self._folders[experiment.id] / MODELS):
            if (meta := self._meta(folder, "logged model")) is None:
                continue
            yield LoggedModel(
                folder.name,
                experiment.id,
                _text(meta, "name"),
                _text(meta, "model_type"),
                _text(meta, "source_run_id"),
                int(meta.get("status") or 1),
                meta.get("lifecycle_stage") == "deleted",
                _text(meta, "artifact_location"),
                self._texts(folder / "params"),
                self._texts(folder / "tags"),
            )

    def model_points(self, model: LoggedModel) -> Iterator[Point]:
        yield from self._points(
            self._folders[model.experiment_id] / MODELS / model.id / "metrics", f"logged model {model.id}", of_model=True
        )

    def registered_models(self) -> Iterator[RegisteredModel]:
        for folder in self._folders_in(self._root / MODELS):
            if (meta := self._meta(folder, "registered model")) is None:
                continue
            aliases = {name: int(text) for name, text in self._texts(folder / "aliases").items() if text.strip().isdecimal()}
            yield RegisteredModel(_text(meta, "name") or folder.name, _text(meta, "description"), self._texts(folder / "tags"), aliases)

    def versions(self, model: RegisteredModel) -> Iterator[Version]:
        folders = [one for one in self._folders_in(self._root / MODELS / model.name) if one.name.startswith("version-")]
        for folder in sorted(folders, key=lambda one: int(one.name[8:]) if one.name[8:].isdecimal() else 0):
            if (meta := self._meta(folder, f"version of {model.name}")) is None or meta.get("current_stage") == "Deleted_Internal":
                continue
            yield Version(
                int(meta["version"]),
                int(meta.get("creation_timestamp") or 0),
                _text(meta, "description"),
                _text(meta, "current_stage"),
                _text(meta, "source"),
                _text(meta, "run_id"),
                _text(meta, "run_link"),
                _text(meta, "model_id"),
                self._texts(folder / "tags"),
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _dataset(self, run: Run, found: str) -> tuple[str, str, str, str, str, str] | None:
        folder = self._folders[run.experiment_id] / "datasets" / found
        if not found or "/" in found or (meta := self._meta(folder, f"data set of run {run.id}")) is None:
            return None
        name, digest, source_type = (_text(meta, key) for key in ("name", "digest", "source_type"))
        return name, digest, source_type, _text(meta, "source"), _text(meta, "schema"), _text(meta, "profile")

    def _points(self, folder: Path, owner: str, *, of_model: bool) -> Iterator[Point]:
        for key, path in self._files(folder, owner):
            malformed = 0
            with path.open(encoding="utf-8", errors="replace") as lines:
                while line := lines.readline(100_000):
                    try:
                        yield _point(key, line.split(), of_model=of_model)
                    except (ValueError, IndexError):
                        malformed += bool(line.strip())
            if malformed:
                self._report.missed(f"{owner} metric {key}", f"{malformed} malformed lines")

    def _texts(self, folder: Path) -> dict[str, str]:
        found = {}
        for key, path in self._files(folder, str(folder.relative_to(self._root))):
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                found[key] = file.read(_MAX_TEXT)
        return found

    def _files(self, folder: Path, owner: str) -> Iterator[tuple[str, Path]]:
        if not folder.is_dir() or not self._inside(folder):
            return
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                key = path.relative_to(folder).as_posix()
                if self._inside(path) and path.is_file():
                    yield key, path
                else:
                    self._report.missed(f"{owner} {key}", "a link that leads out of the folder, or no file")

    def _folders_in(self, parent: Path) -> Iterator[Path]:
        if not parent.is_dir() or not self._inside(parent):
            return
        with os.scandir(parent) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        for name in names:
            if self._inside(parent / name):
                yield parent / name
            else:
                self._report.missed(str(parent / name), "a link that leads out of the folder")

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def _meta(self, folder: Path, what: str) -> Mapping[str, Any] | None:
        path = folder / META
        try:
            if not self._inside(path):
                raise ValueError("a link that leads out of the folder")
            with path.open(encoding="utf-8") as file:
                meta = yaml.safe_load(file.read(_MAX_TEXT))
            if not isinstance(meta, dict):
                raise ValueError("it is not a mapping")
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            self._report.missed(f"{what} {folder.name}", f"its {META} cannot be read: {error}")
            return None
        return meta


def _point(key: str, parts: list[str], *, of_model: bool) -> Point:
    """A line of a metric's file: time, value, step; of a model's also the run; of both then the data set's name and digest.

    Of a name with spaces all but the digest is the name.
    """
    timestamp, value = int(parts[0]), float(parts[1])
    step = int(parts[2]) if len(parts) > 2 else 0
    rest = parts[3:]
    run_id = rest.pop(0) if of_model else ""
    return Point(key, value, timestamp, step, run_id, " ".join(rest[:-1]), rest[-1] if rest else "")


def _text(meta: Mapping[str, Any], key: str) -> str:
    value = meta.get(key)
    return "" if value is None else str(value)
