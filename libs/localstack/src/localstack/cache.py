"""Where downloads are kept (`.cache/` of the repository), who may write there (one process at a time), and how progress is told."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from localstack.errors import Missing


class Progress(Protocol):
    """How long steps report themselves. `done` and `total` are in the step's own unit; a total of 0 means unknown."""

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None:
        return None


def repository() -> Path:
    """The root of the checkout that this package belongs to. Raises Missing when it was installed without one."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "requirements.lock").exists() and (folder / "deploy" / "runtimes").is_dir():
            return folder
    raise Missing("the local stack needs a checkout of the Headrace repository: install it with scripts/setup there")


def cache_dir() -> Path:
    """The folder for downloads: HEADRACE_CACHE_DIR, else `.cache/` of the repository."""
    chosen = os.environ.get("HEADRACE_CACHE_DIR")
    return Path(chosen).resolve() if chosen else repository() / ".cache"


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Holds a file lock: a second process waits here. The lock goes with the process that holds it."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
