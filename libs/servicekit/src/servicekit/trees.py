"""Removes folders that somebody else has filled, however deep they are: what Python has for that recurses, and gives up at a depth that
anybody can make."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

_log = logging.getLogger(__name__)


def remove(*paths: Path) -> bool:
    """Removes files and folders with all that is in them; one that is not there is no error. What cannot be removed is told in the log
    and stays: False. Blocks; repeatable."""
    if not paths:
        return True
    done = subprocess.run(["rm", "-rf", "--", *map(str, paths)], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        _log.warning("not all could be removed: %s", done.stderr.decode(errors="replace").strip()[-500:])
    return done.returncode == 0
