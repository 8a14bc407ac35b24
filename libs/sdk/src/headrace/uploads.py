"""Sends a file's bytes straight to the object store, part by part, by URLs that the gateway hands out."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path
from typing import Any

import httpx

from headrace.config import proxy
from headrace.http import PATIENCE_S, Client, HeadraceError, Unreachable, pause


def sha256_of(path: Path) -> tuple[str, int]:
    """Hexadecimal SHA-256 and size in bytes, in constant memory."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def upload(client: Client, start_path: str, path: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Uploads `path` and returns the stored object with the upload's id under "upload_id".

    `start_path` is the gateway's path that starts the upload. Blocks until the store has verified the hash. Repeatable:
    what is stored already is not sent again. Raises Unreachable when the store does not answer.
    """
    digest, size = sha256_of(path)
    ticket = client.post(start_path, {**extra, "size_bytes": size, "sha256": digest}, repeatable=True)
    etags: list[str] = []
    if not ticket.get("complete"):
        with path.open("rb") as file, httpx.Client(timeout=httpx.Timeout(120.0, connect=5.0), proxy=proxy(), trust_env=False) as store:
            for url in ticket["part_urls"]:
                etags.append(put_part(store, url, file.read(int(ticket["part_size_bytes"])), client.patience_s))
    done = client.post(f"/api/v1/uploads/{ticket['upload_id']}/complete", {"part_etags": etags}, repeatable=True)
    return {**done.get("object", {}), "upload_id": ticket["upload_id"]}


def put_part(store: httpx.Client, url: str, data: bytes, patience_s: float = PATIENCE_S) -> str:
    """PUTs one part by its presigned URL, returns its ETag. Repeats on connection errors and 5xx for `patience_s` seconds; the store
    keeps the last."""
    deadline = time.monotonic() + patience_s
    for attempt in itertools.count():
        last = time.monotonic() > deadline
        try:
            answer = store.put(url, content=data)
        except httpx.TransportError as error:
            if last:
                raise Unreachable(f"the object store does not answer: {error}") from error
        else:
            if answer.status_code < 300:
                return str(answer.headers.get("etag", "")).strip('"')
            if answer.status_code < 500 or last:
                raise HeadraceError(f"the object store refused a part with {answer.status_code}: {answer.text[:200]}")
        time.sleep(pause(attempt))
    raise AssertionError("unreachable: the loop ends by returning or raising")
