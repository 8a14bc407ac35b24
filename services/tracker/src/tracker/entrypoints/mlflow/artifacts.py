"""MLflow's REST API on artifacts: lists, and the store to which clients send files and from which they fetch them, through the server or
in parts straight to the object store."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid, TooLarge, Unavailable
from servicekit.mlflow import endpoints
from servicekit.rest import Endpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tracker.artifacts import MAX_LISTED, Artifacts, Content
from tracker.domain.artifact import Listed, Place, location, place
from tracker.entrypoints.mlflow.rules import READ, WRITE
from tracker.entrypoints.mlflow.wire import OfRun, required
from tracker.handlers import told

STORE_PREFIXES = ("/api/2.0/mlflow-artifacts", "/ajax-api/2.0/mlflow-artifacts")

_IMAGES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp"})
_OF_TEXT = frozenset({"application/json", "application/yaml", "application/x-yaml", "application/xml", "application/javascript"})
_NO_SUFFIX = frozenset({"MLmodel", "MLproject", "yaml", "yml", "log", "jsonl", "cfg", "conf", "ini", "toml"})


class _List(OfRun, kw_only=True):
    path: str = ""
    page_token: str = ""


class _Path(msgspec.Struct):
    path: str = ""


class _CreateParts(msgspec.Struct):
    path: str = ""
    num_parts: int = 1


class _Part(msgspec.Struct):
    part_number: int
    etag: str = ""


class _EndParts(msgspec.Struct):
    path: str = ""
    upload_id: str = ""
    parts: list[_Part] = []


class ArtifactsApi:
    """The endpoints on artifacts."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts

    def endpoints(self) -> Sequence[Endpoint]:
        stored = [
            Endpoint(methods, f"{prefix}{path}", rule, handle, deadline_s)
            for prefix in STORE_PREFIXES
            for methods, path, rule, handle, deadline_s in (
                (("GET",), "/artifacts", READ, self._list_stored, 60.0),
                (("GET",), "/artifacts/{path:path}", READ, self._get, None),
                (("PUT",), "/artifacts/{path:path}", WRITE, self._put, None),
                (("DELETE",), "/artifacts/{path:path}", WRITE, self._delete, None),
                (("POST",), "/mpu/create/{path:path}", WRITE, self._create_parts, 60.0),
                # Reads all of a file, which may have 5 TiB.
                (("POST",), "/mpu/complete/{path:path}", WRITE, self._complete_parts, None),
                (("POST",), "/mpu/abort/{path:path}", WRITE, self._abort_parts, 60.0),
                (("GET",), "/presigned/{path:path}", READ, self._presigned, 60.0),
            )
        ]
        return [
            *endpoints([("GET", "/artifacts/list", READ, self._list)]),
            *stored,
            Endpoint(("GET",), "/get-artifact", READ, self._page_gets, None),
        ]

    async def _list(self, request: Request) -> Response:
        asked = await mlflow.read(request, _List)
        run_id = asked.run()
        caller = current_caller()
        experiment = await self._artifacts.experiment_of(caller, run_id)
        listed = await self._artifacts.listed(caller, Place(experiment, run_id, asked.path.rstrip("/")), asked.page_token, MAX_LISTED)
        told_files: dict[str, Any] = {"root_uri": location(experiment, run_id), "files": [file_json(one) for one in listed]}
        if len(listed) == MAX_LISTED:
            told_files["next_page_token"] = _name(listed[-1])
        return mlflow.answer(told_files)

    async def _list_stored(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Path)
        where = _place(required("path", asked.path))
        # Clients take the list for all there is, so one that would be cut is refused.
        listed = await self._artifacts.listed(current_caller(), where)
        if len(listed) == MAX_LISTED:
            raise TooLarge(f"a folder with {MAX_LISTED} files or more cannot be listed so; GET artifacts/list has pages")
        return mlflow.answer({"files": [{**file_json(one), "path": _name(one)} for one in listed]})

    async def _get(self, request: Request) -> Response:
        return FileResponse(await self._artifacts.open(current_caller(), _place(request.path_params["path"])))

    async def _page_gets(self, request: Request) -> Response:
        asked = await mlflow.read(request, _List)
        caller, run_id = current_caller(), asked.run()
        experiment = await self._artifacts.experiment_of(caller, run_id)
        return FileResponse(await self._artifacts.open(caller, Place(experiment, run_id, required("path", asked.path))))

    async def _put(self, request: Request) -> Response:
        where = _place(request.path_params["path"])
        length = request.headers.get("content-length", "")
        announced = int(length) if length.isascii() and length.isdecimal() else None
        await self._artifacts.put(current_caller(), where, _body(request), announced)
        return mlflow.answer({})

    async def _delete(self, request: Request) -> Response:
        await self._artifacts.remove(current_caller(), _place(request.path_params["path"]))
        return mlflow.answer({})

    async def _create_parts(self, request: Request) -> Response:
        asked = await mlflow.read(request, _CreateParts)
        parts = await self._artifacts.start_parts(current_caller(), _file_in(request, asked.path), asked.num_parts)
        credentials = [{"url": url, "part_number": number, "headers": {}} for number, url in enumerate(parts.urls, start=1)]
        return mlflow.answer({"upload_id": parts.upload_id, "credentials": credentials})

    async def _complete_parts(self, request: Request) -> Response:
        asked = await mlflow.read(request, _EndParts)
        parts = sorted(asked.parts, key=lambda part: part.part_number)
        if not parts or [part.part_number for part in parts] != list(range(1, len(parts) + 1)):
            raise Invalid("Invalid value for parameter 'parts': every part is named once, and they are numbered from 1 on")
        where = _file_in(request, asked.path)
        await self._artifacts.complete_parts(current_caller(), where, required("upload_id", asked.upload_id), [one.etag for one in parts])
        return mlflow.answer({})

    async def _abort_parts(self, request: Request) -> Response:
        asked = await mlflow.read(request, _EndParts)
        await self._artifacts.abort_parts(current_caller(), _file_in(request, asked.path), required("upload_id", asked.upload_id))
        return mlflow.answer({})

    async def _presigned(self, request: Request) -> Response:
        link = await self._artifacts.link(current_caller(), _place(request.path_params["path"]))
        return mlflow.answer({"url": link.url, "headers": {}, "file_size": link.size_bytes})


class FileResponse(Response):
    """A file as it streams. A browser saves it and never runs it, whatever is in it. One that turns out not to be what was stored ends
    before its announced length, and the connection with it."""

    def __init__(self, content: Content) -> None:
        artifact = content.artifact
        name = artifact.path.rpartition("/")[2]
        headers = {
            "content-length": str(artifact.object.size_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "x-content-type-options": "nosniff",
        }
        super().__init__(None, 200, headers, media_type=media_type(name))
        self._chunks = content.chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            # The first before the head: what the store has not is told as an error.
            first = await anext(chunks, b"")
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def media_type(name: str) -> str:
    """What a file is shown as: images as such, all that is text as plain text, the rest as bytes."""
    if name in _NO_SUFFIX or name.rpartition(".")[2].lower() in _NO_SUFFIX:
        return "text/plain"
    guessed = mimetypes.guess_type(name, strict=False)[0] or ""
    if guessed in _IMAGES:
        return guessed
    return "text/plain" if guessed.startswith("text/") or guessed in _OF_TEXT else "application/octet-stream"


def file_json(one: Listed) -> dict[str, Any]:
    """A file or folder as MLflow writes it."""
    told_file: dict[str, Any] = {"path": one.path, "is_dir": one.is_folder}
    if one.size_bytes is not None:
        told_file["file_size"] = one.size_bytes
    return told_file


def _name(one: Listed) -> str:
    return one.path.rpartition("/")[2]


def _place(text: str) -> Place:
    with told():
        return place(text.removesuffix("/"))


def _file_in(request: Request, local: str) -> Place:
    """The file that a request about parts is for: the folder is in its address, and of the client's own path the name counts."""
    folder = _place(request.path_params["path"])
    name = re.split(r"[\\/]", required("path", local))[-1]
    return Place(folder.experiment_id, folder.owner, f"{folder.path}/{name}" if folder.path else name)


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Unavailable("the client went away") from None
