"""Downloads the packages of the demo's trainings into uv's cache, so that the first training need not wait: `python -m scripts.demo.prefetch`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from uv import find_uv_bin

LOCK = Path(__file__).resolve().parents[2] / "examples" / "flights" / "requirements.lock"


def main() -> None:
    """Entry point. Repeatable; blocks until everything is there."""
    with tempfile.TemporaryDirectory(prefix="headrace-prefetch-") as folder:
        # An environment that is thrown away: what uv unpacked stays in its cache, and the next one is made of links to it.
        uv = [find_uv_bin(), "pip", "install", "--no-config", "--quiet", "--require-hashes", "--python", sys.executable]
        subprocess.run([*uv, "--target", folder, "-r", str(LOCK)], check=True)


if __name__ == "__main__":
    main()
