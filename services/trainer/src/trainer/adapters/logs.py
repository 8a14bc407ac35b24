"""Logs of trainings as files in the state folder, one per training: the runner appends, the service reads."""

from __future__ import annotations

import asyncio
from pathlib import Path


def log_file(state_dir: Path, training_id: str) -> Path:
    """Where a training's log is."""
    return job_dir(state_dir, training_id) / "log.txt"


def job_dir(state_dir: Path, training_id: str) -> Path:
    """The folder of a training; each attempt has its own below it."""
    return state_dir / "jobs" / training_id


class LogFiles:
    """Implements `ports.Logs`."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    async def read(self, training_id: str, offset: int, limit: int) -> bytes:
        return await asyncio.to_thread(_read, log_file(self._state_dir, training_id), offset, limit)


def _read(file: Path, offset: int, limit: int) -> bytes:
    try:
        with file.open("rb") as log:
            log.seek(offset)
            return log.read(limit)
    except FileNotFoundError:
        return b""  # nothing was written yet
