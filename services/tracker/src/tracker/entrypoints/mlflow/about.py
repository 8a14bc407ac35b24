"""What the server says of itself to MLflow's clients and page: its version, that it is there, what it can do."""

from __future__ import annotations

from collections.abc import Sequence

from servicekit import mlflow
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tracker.entrypoints.mlflow.rules import READ

VERSION = "3.3.0+headrace"
"""Clients compare it with one version only: from 3.4 on they send the spans of traces to the server, which this one does not keep."""

SERVER_INFO = {
    "store_type": "SqlStore",
    "workspaces_enabled": False,
    "trace_archival_enabled": False,
    # With these, clients send and fetch big files in parts, straight to and from the object store.
    "multipart_uploads_enabled": True,
    "multipart_downloads_enabled": True,
    "features_enabled": {"gateway": False},
}


def endpoints() -> Sequence[Endpoint]:
    return [
        Endpoint(("GET",), "/version", READ, _version),
        Endpoint(("GET",), "/health", READ, _health),
        Endpoint(("GET",), "/api/3.0/mlflow/server-info", READ, _server_info),
        Endpoint(("GET",), "/ajax-api/3.0/mlflow/server-info", READ, _server_info),
    ]


async def _version(request: Request) -> Response:
    return PlainTextResponse(VERSION)


async def _health(request: Request) -> Response:
    return PlainTextResponse("OK")


async def _server_info(request: Request) -> Response:
    return mlflow.answer(SERVER_INFO)
