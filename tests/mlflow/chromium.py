"""A real Chromium: the one of the machine or, where the tests run as root on Debian, Debian's own package, installed on first use."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess

from tests.mlflow.clients import CACHE

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str:
    """Its path. Blocks while it is installed. Raises FileNotFoundError with what to install."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "chromium.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if (found := _installed()) is None and os.geteuid() == 0 and shutil.which("apt-get"):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
                subprocess.run(["apt-get", "--quiet", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
            found = _installed()
    if found is None:
        raise FileNotFoundError("the tests of MLflow's page need Chromium: install the package chromium")
    return found


def _installed() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)
