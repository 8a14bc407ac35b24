"""Unmodified MLflow clients: environments, each made from its lock on first use and shared by all tests, and scripts in them."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from uv import find_uv_bin

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "mlflow-clients"
NAMES = ("current", "older")
"""The newest client, and the last one before MLflow 3. `browser` is an environment, too: that which drives Chromium."""


def python(name: str) -> Path:
    """The interpreter of the client's environment `name`. Blocks while it is made; safe to call from several processes."""
    return of_lock(HERE / name / "requirements.lock")


def of_lock(lock: Path) -> Path:
    """The interpreter of an environment of this lock file; as `python`."""
    target = CACHE / f"{lock.parent.name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    interpreter = target / "bin" / "python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            environment = {**os.environ, "VIRTUAL_ENV": str(target)}
            uv = find_uv_bin()
            subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(target)], check=True)
            sync = [uv, "pip", "sync", "--quiet", "--no-config", "--require-hashes", "--compile-bytecode", str(lock)]
            subprocess.run(sync, env=environment, check=True)
            (target / "complete").touch()
    return interpreter


async def run(
    interpreter: Path, script: Path, url: str, key: str, *arguments: str, folder: Path, variables: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Runs a script in `folder` with a clean environment as a user would, MLFLOW_TRACKING_URI set; exit code, output, errors."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MLFLOW_TRACKING_URI": url,
        "MLFLOW_TRACKING_TOKEN": key,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # An error that the client tries again would take minutes to be told.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        **(variables or {}),
    }
    started = await asyncio.create_subprocess_exec(
        str(interpreter),
        str(script),
        *arguments,
        env=environment,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await started.communicate()
    return started.returncode or 0, output.decode(), errors.decode()
