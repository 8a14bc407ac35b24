"""Reads MLflow's database, of the schemas that its releases 2 and 3 make: columns and tables that one of them lacks are taken as empty."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from headrace.http import InvalidInput
from headrace.sync.source import ArtifactFolders, Dataset, Details, Experiment, LoggedModel, Point, RegisteredModel, Run, Version

Row = Mapping[str, Any]


class Database(Protocol):
    """Reads only. A statement has `?` where its values go."""

    def rows(self, statement: str, *values: object) -> Iterator[Row]:
        """The rows as they come, in constant memory."""

    def tables(self) -> frozenset[str]: ...

    def close(self) -> None: ...


class Sqlite:
    """A SQLite file, opened for reading alone."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidInput for what is not such a file."""
        if not path.is_file():
            raise InvalidInput(f"there is no file {path}")
        try:
            self._connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
            self._connection.row_factory = sqlite3.Row
            self._connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            self.tables()
        except sqlite3.Error as error:
            raise InvalidInput(f"{path} is not a database that can be read: {error}") from None

    def rows(self, statement: str, *values: object) -> Iterator[Row]:
        for row in self._connection.execute(statement, values):
            yield dict(row)

    def tables(self) -> frozenset[str]:
        found = self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return frozenset(row["name"] for row in found)

    def close(self) -> None:
        self._connection.close()


class DatabaseSource:
    """A Source over MLflow's tables."""

    def __init__(self, database: Database, artifacts: ArtifactFolders) -> None:
        """Raises InvalidInput when it holds no experiments."""
        self._database = database
        self.artifacts = artifacts
        self._tables = database.tables()
        if not {"experiments", "runs", "metrics", "params", "tags"} <= self._tables:
            raise InvalidInput("this is not a database of MLflow: it lacks tables such as experiments and runs")

    def experiments(self) -> Iterator[Experiment]:
        for row in list(self._rows("experiments", "SELECT * FROM experiments ORDER BY experiment_id")):
            tags = self._texts("experiment_tags", "SELECT key, value FROM experiment_tags WHERE experiment_id = ?", row["experiment_id"])
            yield Experiment(str(row["experiment_id"]), row["name"], row["lifecycle_stage"] == "deleted", tags)

    def runs(self, experiment: Experiment) -> Iterator[Run]:
        statement = "SELECT * FROM runs WHERE experiment_id = ? ORDER BY start_time, run_uuid"
        for row in self._rows("runs", statement, int(experiment.id)):
            yield Run(
                row["run_uuid"],
                experiment.id,
                row.get("name") or "",
                row["status"] or "RUNNING",
                row["start_time"] or 0,
                row["end_time"] or 0,
                # Those of a deleted experiment come back with it.
                row["lifecycle_stage"] == "deleted" and not experiment.deleted,
                row["artifact_uri"] or "",
            )

    def details(self, run: Run) -> Details:
        params = self._texts("params", "SELECT key, value FROM params WHERE run_uuid = ?", run.id)
        tags = self._texts("tags", "SELECT key, value FROM tags WHERE run_uuid = ?", run.id)
        statement = (
            "SELECT d.*, i.input_uuid FROM inputs i JOIN datasets d ON d.dataset_uuid = i.source_id "
            "WHERE i.destination_id = ? AND i.destination_type = 'RUN' AND i.source_type = 'DATASET'"
        )
        datasets = [
            Dataset(
                row["name"],
                row["digest"],
                row["dataset_source_type"],
                row["dataset_source"],
                row["dataset_schema"] or "",
                row["dataset_profile"] or "",
                self._texts("input_tags", "SELECT name AS key, value FROM input_tags WHERE input_uuid = ?", row["input_uuid"]),
            )
            for row in list(self._rows("inputs", statement, run.id))
        ]
        linked = list(self._rows("inputs", "SELECT * FROM inputs WHERE source_id = ? AND source_type LIKE 'RUN%'", run.id))
        read = [row["destination_id"] for row in linked if row["destination_type"] == "MODEL_INPUT"]
        made = [(row["destination_id"], row.get("step") or 0) for row in linked if row["destination_type"] == "MODEL_OUTPUT"]
        return Details(params, tags, datasets, read, made)

    def points(self, run: Run) -> Iterator[Point]:
        for row in self._rows("metrics", "SELECT key, value, timestamp, step, is_nan FROM metrics WHERE run_uuid = ?", run.id):
            yield Point(row["key"], float("nan") if row["is_nan"] else row["value"], row["timestamp"], row["step"] or 0)

    def logged_models(self, experiment: Experiment) -> Iterator[LoggedModel]:
        statement = "SELECT * FROM logged_models WHERE experiment_id = ? ORDER BY creation_timestamp_ms, model_id"
        for row in list(self._rows("logged_models", statement, int(experiment.id))):
            of = row["model_id"]
            yield LoggedModel(
                of,
                experiment.id,
                row["name"],
                row["model_type"] or "",
                row["source_run_id"] or "",
                row["status"],
                row["lifecycle_stage"] == "deleted",
                row["artifact_location"] or "",
                self._texts(
                    "logged_model_params", "SELECT param_key AS key, param_value AS value FROM logged_model_params WHERE model_id = ?", of
                ),
                self._texts("logged_model_tags", "SELECT tag_key AS key, tag_value AS value FROM logged_model_tags WHERE model_id = ?", of),
            )

    def model_points(self, model: LoggedModel) -> Iterator[Point]:
        for row in self._rows("logged_model_metrics", "SELECT * FROM logged_model_metrics WHERE model_id = ? ORDER BY run_id", model.id):
            value = float("nan") if row["metric_value"] is None else row["metric_value"]
            dataset = (row["dataset_name"] or "", row["dataset_digest"] or "")
            yield Point(row["metric_name"], value, row["metric_timestamp_ms"], row["metric_step"], row["run_id"], *dataset)

    def registered_models(self) -> Iterator[RegisteredModel]:
        for row in list(self._rows("registered_models", "SELECT name, description FROM registered_models ORDER BY name")):
            name = row["name"]
            tags = self._texts("registered_model_tags", "SELECT key, value FROM registered_model_tags WHERE name = ?", name)
            pointed = self._rows("registered_model_aliases", "SELECT alias, version FROM registered_model_aliases WHERE name = ?", name)
            yield RegisteredModel(name, row["description"] or "", tags, {one["alias"]: one["version"] for one in pointed})

    def versions(self, model: RegisteredModel) -> Iterator[Version]:
        for row in list(self._rows("model_versions", "SELECT * FROM model_versions WHERE name = ? ORDER BY version", model.name)):
            if row["current_stage"] == "Deleted_Internal":
                continue
            statement = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"
            yield Version(
                row["version"],
                row["creation_time"] or 0,
                row["description"] or "",
                row["current_stage"] or "",
                row["source"] or "",
                row["run_id"] or "",
                row.get("run_link") or "",
                "",
                self._texts("model_version_tags", statement, model.name, row["version"]),
            )

    def close(self) -> None:
        self._database.close()

    def _rows(self, table: str, statement: str, *values: object) -> Iterator[Row]:
        """Rows of a table; none when this schema has no such table."""
        return self._database.rows(statement, *values) if table in self._tables else iter(())

    def _texts(self, table: str, statement: str, *values: object) -> dict[str, str]:
        return {row["key"]: "" if row["value"] is None else row["value"] for row in self._rows(table, statement, *values)}


def near(path: Path, artifacts_root: Path | None) -> Sequence[Path]:
    """Where the artifacts of a SQLite store are: where it was said, else in the folders beside it that MLflow makes."""
    return [artifacts_root] if artifacts_root else [path.resolve().parent / name for name in ("mlruns", "mlartifacts")]
