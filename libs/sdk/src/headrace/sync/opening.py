"""Finds out what kind of store a source is, by its name, and opens it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from headrace.http import InvalidInput
from headrace.sync.database import DatabaseSource, Sqlite, near
from headrace.sync.files import FileSource
from headrace.sync.report import Report
from headrace.sync.source import ArtifactFolders, Source


def open_source(name: str, artifacts_root: Path | None, report: Report) -> Source:
    """A folder, a SQLite file, or a URI of one. Raises InvalidInput for what cannot be read."""
    if artifacts_root is not None and not artifacts_root.is_dir():
        raise InvalidInput(f"{artifacts_root} is not a folder")
    path = _path(name)
    if path.is_dir():
        return FileSource(path, artifacts_root, report)
    return DatabaseSource(Sqlite(path), ArtifactFolders(near(path, artifacts_root), report))


def _path(name: str) -> Path:
    """The local path that is meant: of a database's URI three slashes begin a relative path, four an absolute one."""
    scheme, colon, _ = name.partition("://")
    if not colon:
        return Path(name.removeprefix("file:"))
    if scheme == "sqlite" and name.startswith("sqlite:///"):
        return Path(unquote(name.removeprefix("sqlite:///").partition("?")[0]))
    if scheme == "file" and (parts := urlsplit(name)).netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    raise InvalidInput(f"{scheme}:// is not a source that can be read: an mlruns folder or a SQLite database is")
