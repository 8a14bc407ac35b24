"""What a trainer that died has left in its state folder is cleared away, whatever a user's code made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.entrypoints.attempts import StateFolder


def make_deep(folder: Path, depth: int) -> None:
    """Folders within one another, deeper than any path can say."""
    folder.mkdir(parents=True)
    before = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=before)
        inner = os.open("deep", os.O_RDONLY, dir_fd=before)
        os.close(before)
        before = inner
    os.close(before)


async def test_a_tree_that_is_deeper_than_python_walks_is_removed_at_the_start(tmp_path: Path) -> None:
    attempt = tmp_path / "jobs" / "t" / "attempt-1"
    make_deep(attempt / "source", 5_000)
    (attempt / "link").symlink_to(tmp_path)
    (attempt / "outcome.json").write_text("{}")
    (attempt / "process.json").write_text(json.dumps({"pid": os.getpid(), "started": 0.0}))  # another process's pid by now
    folder = StateFolder(tmp_path)
    await folder.start()
    await folder.stop()
    assert [entry.name for entry in attempt.iterdir()] == ["outcome.json"]
    assert sorted(os.listdir(tmp_path)) == ["jobs", "trainer.lock"]  # a link is not followed


async def test_what_cannot_be_removed_stops_no_start_and_is_not_tried_again(tmp_path: Path) -> None:
    attempt = tmp_path / "jobs" / "t" / "attempt-1"
    (attempt / "source").mkdir(parents=True)
    (attempt / "process.json").write_text("{}")
    kept = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path)  # nothing there that removes
    try:
        folder = StateFolder(tmp_path)
        await folder.start()
        await folder.stop()
    finally:
        os.environ["PATH"] = kept
    assert [entry.name for entry in attempt.iterdir()] == ["source"]
