"""What a tracking store holds, as every reader tells it, and where its artifacts may be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from headrace.sync.report import Report


@dataclass(frozen=True, slots=True)
class Experiment:
    id: str
    name: str
    deleted: bool
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """Times in milliseconds; `ended_ms` 0: it has not ended."""

    id: str
    experiment_id: str
    name: str
    status: str
    started_ms: int
    ended_ms: int
    deleted: bool
    artifact_uri: str


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a metric; of one about a logged model, also of which run and on which data set."""

    key: str
    value: float
    timestamp_ms: int
    step: int
    run_id: str = ""
    dataset_name: str = ""
    dataset_digest: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    digest: str
    source_type: str
    source: str
    schema: str
    profile: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoggedModel:
    """`status`: 1 pending, 2 ready, 3 failed, as in MLflow's enum."""

    id: str
    experiment_id: str
    name: str
    model_type: str
    source_run_id: str
    status: int
    deleted: bool
    artifact_uri: str
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Details:
    """What a run has beside its metrics. Models made: id and step."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Sequence[Dataset]
    models_read: Sequence[str] = ()
    models_made: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True)
class Version:
    number: int
    created_ms: int
    description: str
    stage: str
    source: str
    run_id: str
    run_link: str
    model_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    name: str
    description: str
    tags: Mapping[str, str]
    aliases: Mapping[str, int] = field(default_factory=dict)


class Source(Protocol):
    """A store that is read. Everything large comes one by one."""

    artifacts: ArtifactFolders

    def experiments(self) -> Iterator[Experiment]: ...

    def runs(self, experiment: Experiment) -> Iterator[Run]: ...

    def details(self, run: Run) -> Details: ...

    def points(self, run: Run) -> Iterator[Point]: ...

    def logged_models(self, experiment: Experiment) -> Iterator[LoggedModel]: ...

    def model_points(self, model: LoggedModel) -> Iterator[Point]: ...

    def registered_models(self) -> Iterator[RegisteredModel]: ...

    def versions(self, model: RegisteredModel) -> Iterator[Version]: ...

    def close(self) -> None: ...


class ArtifactFolders:
    """The local folders that artifacts may be read from: a store that somebody sends must not have other files uploaded."""

    def __init__(self, roots: Sequence[Path], report: Report) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots if root.is_dir()]
        self._report = report

    def files(self, owner: str, uri: str, usual: str) -> Iterator[tuple[str, Path]]:
        """The files of an owner, by their paths among its artifacts.

        `uri` is where the store says that they are, `usual` where they lie below a root by custom. What cannot be read is reported.
        """
        folder = self._folder(uri, usual)
        if folder is None:
            if uri:
                self._report.missed(
                    owner, f"its artifacts at {uri[:300]} are not within a local folder of the source (see --artifacts-root)"
                )
            return
        yield from self._below(owner, folder, folder, "")

    def _folder(self, uri: str, usual: str) -> Path | None:
        for place in (_local(uri), *(root / usual for root in self._roots)):
            if place is not None and os.path.isdir(place):
                real = Path(os.path.realpath(place))
                if any(real.is_relative_to(root) for root in self._roots):
                    return real
        # Nothing was ever logged: the folder that would hold it is not there.
        local = _local(uri)
        if local is not None and any(Path(os.path.realpath(local)).is_relative_to(root) for root in self._roots):
            return Path(os.path.realpath(local))
        return None

    def _below(self, owner: str, top: Path, folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        if not folder.is_dir():
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(owner, top, Path(entry.path), f"{path}/")
                continue
            real = Path(os.path.realpath(entry.path))
            if entry.is_symlink() and not real.is_relative_to(top):
                self._report.missed(f"{owner} artifact {path}", "a link that leads out of the folder")
            elif not real.exists() or not stat.S_ISREG(real.stat().st_mode):
                self._report.missed(f"{owner} artifact {path}", "not a file")
            else:
                yield path, real


def _local(uri: str) -> Path | None:
    """The path that a URI names on this machine; None for all that is elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path)) if parts.path else None
    return Path(uri) if uri.startswith("/") else None
