"""Downloads the packages of the demo's trainings into uv's cache, so that the first training need not wait.

`python -m scripts.demo.prefetch`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from localstack.cache import cache_dir
from uv import find_uv_bin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main() -> None:
    """Entry point. Repeatable; blocks until everything is there."""
    scratch = cache_dir()
    scratch.mkdir(exist_ok=True)
    # An environment that is thrown away, on the disk of the real one: what uv unpacked stays in its cache, and both are links to it.
    with tempfile.TemporaryDirectory(prefix="prefetch-", dir=scratch) as folder:
        uv = [find_uv_bin(), "pip", "install", "--no-config", "--quiet", "--require-hashes", "--python", sys.executable]
        for number, lock in enumerate(sorted(EXAMPLES.glob("*/requirements.lock"))):
            subprocess.run([*uv, "--target", f"{folder}/{number}", "-r", str(lock)], check=True)


if __name__ == "__main__":
    main()
