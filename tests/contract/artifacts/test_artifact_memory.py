"""A large artifact goes through a process of its own in constant memory: 2 GB on SeaweedFS, 256 MB on MinIO."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from typing import Any

import pytest

MB = 1024 * 1024
MOST_GROWTH = 64 * MB

# Runs in its own process, so that nothing but the store is measured. The peak is the kernel's own high-water mark.
PROGRAM = """
import asyncio, json, os, re, sys
from pathlib import Path
from artifacts import S3Location
from artifacts.s3 import S3Store

MB = 1024 * 1024
options = json.loads(sys.stdin.readline())
block = os.urandom(MB)

async def source(megabytes):
    for number in range(megabytes):
        yield number.to_bytes(8, "big") + block[8:]

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")

async def through(store, key, megabytes):
    stored = await store.put(key, source(megabytes))
    assert stored.size == megabytes * MB
    read = 0
    async for chunk in store.get(key, sha256=stored.sha256):
        read += len(chunk)
    assert read == stored.size
    await store.delete(key)

async def main():
    store = S3Store(S3Location(**options["location"]))
    await through(store, options["key"], 20)  # what the first use costs is not growth
    reset_peak()
    before = status("VmRSS")
    await through(store, options["key"], options["megabytes"])
    print(json.dumps({"growth": status("VmHWM") - before}))
    await store.stop()

asyncio.run(main())
"""


async def growth_of(location: Any, megabytes: int) -> int:
    """Bytes by which the resident memory grew at most while an artifact of this size went in and out."""
    options = {
        "location": {name: getattr(location, name) for name in ("endpoint", "access_key", "secret_key", "bucket")},
        "key": f"contract/{secrets.token_hex(6)}/large",
        "megabytes": megabytes,
    }
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", PROGRAM], input=json.dumps(options) + "\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    growth: int = json.loads(done.stdout)["growth"]
    return growth


@pytest.mark.timeout(900)
async def test_two_gigabytes_on_seaweedfs(stack_servers: Any) -> None:
    assert await growth_of(stack_servers.s3, 2048) < MOST_GROWTH


@pytest.mark.timeout(600)
async def test_a_quarter_gigabyte_on_minio(minio_server: Any) -> None:
    assert await growth_of(minio_server, 256) < MOST_GROWTH
