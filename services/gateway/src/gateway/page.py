"""MLflow's own web page, unmodified: the files of its bundle as the `mlflow` wheel brings them.

The package is never imported. A file is read when it is first asked for, and kept as it is sent: compressed, if that makes it smaller.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.metadata
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response

VERSION = "3.17.2"
"""The page that is tried with this gateway; another one may ask for what is not served."""

_BUILD = "mlflow/server/js/build"
_HASHED = re.compile(r"\.[0-9a-f]{8,32}\.")
_TEXT = ("text/", "application/json", "application/javascript", "image/svg+xml")
_UNCHANGING = "private, max-age=31536000, immutable"
_ASK_AGAIN = "private, no-cache"

POLICY = "frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'; connect-src 'self' data: blob:"
"""The page's Content-Security-Policy: it talks to its own host only, whatever a run's name or note has made of it."""


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    compressed: bool
    kind: str
    etag: str


class Page:
    """The files of one bundle by their path in it."""

    def __init__(self, folder: Path) -> None:
        """Lists the folder. Raises FileNotFoundError unless it holds the page."""
        if not (folder / "index.html").is_file():
            raise FileNotFoundError(f"{folder} does not hold MLflow's page: there is no index.html")
        # What may be asked for is what is there now: no path of a request ever becomes a path of the disk.
        self._paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
        self._files: dict[str, _File] = {}

    async def answer(self, path: str, headers: Mapping[str, str]) -> Response | None:
        """The answer to a GET of one file; None when there is none of this name. `headers` are the request's, names in lower case."""
        source = self._paths.get(path)
        if source is None:
            return None
        file = self._files.get(path)
        if file is None:
            # Two that ask at once both read it, and the same comes of it.
            file = self._files[path] = await asyncio.to_thread(_read, source)
        told = {
            "etag": file.etag,
            "cache-control": _UNCHANGING if _HASHED.search(path) else _ASK_AGAIN,
            "vary": "accept-encoding",
            "content-security-policy": POLICY,
        }
        if file.etag in (tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=told)
        content = file.content
        if file.compressed:
            if "gzip" in headers.get("accept-encoding", ""):
                told["content-encoding"] = "gzip"
            else:
                content = await asyncio.to_thread(gzip.decompress, content)
        return Response(content, headers=told | {"content-type": file.kind})


def find(folder: str) -> Page | None:
    """The page in `folder` or, when that is empty, in the installed package mlflow; None when it is not installed or comes without
    its page, as mlflow-skinny does. Raises FileNotFoundError for a folder that does not hold it."""
    if folder:
        return Page(Path(folder))
    try:
        build = Path(str(importlib.metadata.distribution("mlflow").locate_file(_BUILD)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return Page(build) if build.is_dir() else None


def _read(source: Path) -> _File:
    content = source.read_bytes()
    kind = mimetypes.guess_type(source.name)[0] or "application/octet-stream"
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    if not kind.startswith(_TEXT):
        return _File(content, False, kind, etag)
    kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    packed = gzip.compress(content, 6, mtime=0)
    return _File(packed, True, kind, etag) if len(packed) < len(content) else _File(content, False, kind, etag)
