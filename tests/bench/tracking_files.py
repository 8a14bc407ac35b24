"""A file of 1 GiB through the gateway into the object store and back, beside the same file straight to the store, in turns.

It is also downloaded as MLflow's newest client does with so large a file: it asks for a presigned URL, and goes to the store with it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from artifacts.port import S3Location
from artifacts.s3 import S3Store
from localstack import api
from localstack.layout import Stack

from tests.bench.plain_http import Client, Target

SIZE = 2**30
ROUNDS = 3
_PART = os.urandom(2**20)
_KEY = "bench/whole.bin"


@dataclass(frozen=True)
class Speeds:
    """The best of some rounds in bytes per second, through the gateway and straight; most memory of a service meanwhile in bytes (RSS)."""

    upload: float
    download: float
    presigned: float
    store_upload: float
    store_download: float
    memory: dict[str, int]


async def urls(system: Stack) -> tuple[str, str]:
    """Where the store itself takes the file, and gives it."""
    access = system.addresses
    store = S3Store(S3Location(access.s3_endpoint, access.s3_access_key, access.s3_secret_key, access.s3_bucket))
    try:
        return await store.presign_put(_KEY, 3600), await store.presign_get(_KEY, 3600)
    finally:
        await store.stop()


def speeds(system: Stack, target: Target, put_url: str, get_url: str) -> Speeds:
    """Blocks for about a minute."""
    client = Client(target)
    run_id = client.new_run()
    path, link = (f"/api/2.0/mlflow-artifacts/{what}/0/{run_id}/artifacts/whole.bin" for what in ("artifacts", "presigned"))
    store = Client((urllib.parse.urlsplit(put_url).netloc, {}))
    put, get = (_below(url) for url in (put_url, get_url))
    pids = {row.name: row.pid for row in api.status(system.paths.state) if row.name in ("gateway", "tracker") and row.pid}
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the most so far is forgotten
    buffer = bytearray(2**20)
    best: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        best[name] = max(best.get(name, 0.0), SIZE / (time.perf_counter() - began))

    def read(source: Client, where: str) -> None:
        if (size := source.download(where, buffer)) != SIZE:
            raise RuntimeError(f"{where} has {size} bytes, not {SIZE}")

    def linked() -> None:
        read(store, _below(json.loads(client.call("GET", link, api=""))["url"]))

    for _ in range(ROUNDS):
        timed("store_upload", lambda: store.upload(put, (_PART for _ in range(SIZE // len(_PART))), SIZE))
        timed("upload", lambda: client.upload(path, (_PART for _ in range(SIZE // len(_PART))), SIZE))
        timed("store_download", lambda: read(store, get))
        timed("download", lambda: read(client, path))
        timed("presigned", linked)
    client.close()
    store.close()
    return Speeds(**best, memory={name: _most(pid) for name, pid in pids.items()})


def _below(url: str) -> str:
    """Path and query."""
    return urllib.parse.urlsplit(url)._replace(scheme="", netloc="").geturl()


def _most(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
