"""A client by plain HTTP with one connection that is kept: what the tracking store's figures are measured with."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Mapping
from typing import Any

Target = tuple[str, Mapping[str, str]]
"""`host:port`, and headers."""

START_MS = 1_700_000_000_000


class Client:
    """Not thread-safe. Raises RuntimeError for any answer but 200."""

    def __init__(self, target: Target) -> None:
        self._headers = {**target[1], "content-type": "application/json"}
        self._connection = http.client.HTTPConnection(target[0], timeout=120)

    def call(self, method: str, path: str, body: bytes | None = None, api: str = "/api/2.0/mlflow") -> bytes:
        """What is answered."""
        self._connection.request(method, f"{api}{path}", body, self._headers)
        return self._told(path)

    def post(self, path: str, body: Any) -> Any:
        return json.loads(self.call("POST", path, json.dumps(body).encode()))

    def new_run(self) -> str:
        return str(self.post("/runs/create", {"experiment_id": "0", "start_time": START_MS})["run"]["info"]["run_id"])

    def upload(self, path: str, parts: Iterable[bytes], size: int) -> None:
        """Sends a file part by part."""
        headers = {**self._headers, "content-type": "application/octet-stream", "content-length": str(size)}
        self._connection.request("PUT", path, parts, headers)
        self._told(path)

    def download(self, path: str, into: bytearray) -> int:
        """Reads a file through a buffer; how many bytes it has."""
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {answer.read()[:300]!r}")
        size = 0
        while taken := answer.readinto(into):
            size += taken
        return size

    def close(self) -> None:
        self._connection.close()

    def _told(self, path: str) -> bytes:
        answer = self._connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {told[:300]!r}")
        return told
