"""What a process leaves in its scratch folder: nothing when it ends, and nothing after the next start when it was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from servicekit.scratch import Scratch

HOLDS = """
import asyncio, sys, time
from pathlib import Path
from servicekit.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
asyncio.run(scratch.start())
(scratch.path / "holdout").write_text("large")
print(scratch.path, flush=True)
time.sleep(600)
"""


def folders(state: Path) -> list[Path]:
    return sorted(path for path in (state / "scratch").iterdir() if path.is_dir())


async def test_the_folder_is_there_until_the_stop(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    await scratch.start()
    (scratch.path / "model").write_text("x")
    await scratch.stop()
    await scratch.stop()
    assert [path.name for path in (tmp_path / "state" / "scratch").iterdir()] == ["lock"]


async def test_a_tree_that_is_deeper_than_python_walks_is_removed(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    await scratch.start()
    inner = os.open(scratch.path, os.O_RDONLY)
    for _ in range(3_000):
        os.mkdir("deep", dir_fd=inner)
        outer, inner = inner, os.open("deep", os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    os.close(inner)
    await scratch.stop()
    assert folders(tmp_path) == []


async def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_is_not(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        for _ in range(2)
    ]
    mine = Scratch(tmp_path)
    try:
        paths = []
        for process in started:
            assert process.stdout is not None
            paths.append(Path(process.stdout.readline().strip()))
        killed, running = started
        killed.kill()
        killed.wait(30)
        assert folders(tmp_path) == sorted(paths)
        await mine.start()
        assert folders(tmp_path) == sorted([paths[1], mine.path])
        assert (paths[1] / "holdout").read_text() == "large"
        assert running.poll() is None
    finally:
        await mine.stop()
        for process in started:
            process.kill()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()
