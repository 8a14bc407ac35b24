"""MLflow's own web page for the gateway: taken from the locked `mlflow` wheel, without what that package depends on and without running it.

A stack can do without it: a machine that cannot fetch it starts all the same, and is told how to get it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from localstack.cache import Progress, cache_dir, exclusive, repository
from localstack.errors import Missing, StackError

_BUILD = Path("mlflow") / "server" / "js" / "build"


def lock_file() -> Path:
    """Version and hash of the wheel."""
    return repository() / "deploy" / "runtimes" / "mlflow-page" / "requirements.lock"


def installed() -> Path | None:
    """The folder of the page when it has been fetched, else None."""
    folder = _folder() / "build"
    return folder if folder.is_dir() else None


def fetch(progress: Progress) -> Path:
    """The folder of the page, fetched by its lock on first use (40 MB). Blocks; safe to call from several processes.

    Raises Missing without uv, StackError when it cannot be had; then nothing is left behind.
    """
    target = _folder()
    with exclusive(target.parent / "lock"):
        if (found := installed()) is not None:
            return found
        progress.step("mlflow page", "fetching it")
        with tempfile.TemporaryDirectory(prefix="mlflow-page-", dir=target.parent) as unpacked:
            wheel = Path(unpacked) / "wheel"
            _unpack(wheel)
            if not (wheel / _BUILD / "index.html").is_file():
                raise StackError("MLflow's page could not be fetched: its wheel does not hold it")
            kept = Path(unpacked) / "kept"
            shutil.copytree(wheel / _BUILD, kept / "build")
            for licenses in wheel.glob("mlflow-*.dist-info/licenses"):
                shutil.copytree(licenses, kept / "licenses")
            kept.rename(target)
    return target / "build"


def fetch_if_possible(progress: Progress) -> None:
    """As `fetch`, but when the page cannot be had it only says so, and how to get it later."""
    try:
        fetch(progress)
    except StackError as error:
        progress.step("mlflow page", f"{error}. All else works without it; to get it, run `headrace down` and `headrace up` once online")


def _folder() -> Path:
    return cache_dir() / "runtimes" / f"mlflow-page-{hashlib.sha256(lock_file().read_bytes()).hexdigest()[:12]}"


def _unpack(folder: Path) -> None:
    from uv import find_uv_bin

    try:
        program = find_uv_bin()
    except FileNotFoundError as error:
        raise Missing("the package uv is not installed: run scripts/setup") from error
    # Links to uv's own copies are made where that is on the same disk: nothing is copied that is thrown away again.
    install = ["pip", "install", "--quiet", "--no-config", "--no-deps", "--no-build", "--require-hashes", "--target", str(folder)]
    done = subprocess.run([program, *install, "-r", str(lock_file())], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError("MLflow's page could not be fetched: " + " ".join(done.stderr.split())[-400:])
