"""A folder for large files that a process needs for a while, and that are gone after it however it ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from servicekit import trees

_log = logging.getLogger(__name__)


class Scratch:
    """A component that makes `path` at the start and removes it at the stop: a folder of this process alone, below `state_dir`/scratch.

    A process that is killed removes nothing. So each holds a lock beside its folder, which the kernel lets go with the process, and each
    start removes the folders whose lock nobody holds. Processes of one machine may share a state folder.
    """

    name = "scratch"

    def __init__(self, state_dir: Path) -> None:
        """Touches nothing before the start."""
        self._all = state_dir.resolve() / "scratch"
        self.path = self._all / uuid.uuid4().hex
        self._lock: int | None = None

    async def start(self) -> None:
        """Blocks other starts for as long as removing takes. Raises OSError when the folder cannot be made."""
        await asyncio.to_thread(self._begin)

    async def stop(self) -> None:
        """Removes the folder. May be repeated."""
        if self._lock is not None:
            await asyncio.to_thread(_remove, self.path)
            os.close(self._lock)
            self._lock = None

    def _begin(self) -> None:
        self._all.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One start at a time: none takes another's lock file, just made and not locked yet, for that of a process that is gone.
        with _opened(self._all / "lock") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            for lock in self._all.glob("*.lock"):
                with _opened(lock) as theirs, contextlib.suppress(BlockingIOError):
                    fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _log.info("removing what a process left that ended without doing so", extra={"folder": str(lock.with_suffix(""))})
                    _remove(lock.with_suffix(""))
            self._lock = os.open(_lock_of(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.path.mkdir(mode=0o700)


def _lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """The folder, then its lock: as long as anything of it is left, a later start finds it."""
    if trees.remove(folder):
        _lock_of(folder).unlink(missing_ok=True)
