"""Secrets of one stack: made once, kept in files that only their owner can read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


class Secrets:
    """A folder (0700) with one secret per file (0600). Not safe for two processes at once: its owner holds the stack's lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The secret `name`, made and stored on first use."""
        file = self.directory / name
        if file.exists():
            return file.read_text().strip()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory.chmod(0o700)
        value = make()
        draft = file.with_name(name + ".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as output:
            output.write(value + "\n")
            output.flush()
            os.fsync(output.fileno())
        draft.replace(file)
        return value
