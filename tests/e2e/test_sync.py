"""MLflow's stores come in and go out: a transfer that is killed and started again, twice over, loses nothing and doubles nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import World
from tests.mlflow import clients

SCRIPT = Path(clients.HERE) / "store.py"


class Failed(Exception):
    """A command ended badly; the message is what it said."""


async def store(client: str, asked: str, name: str, url: str, key: str, folder: Path) -> str:
    code, printed, errors = await clients.run(clients.python(client), SCRIPT, url, key, asked, name, folder=folder)
    assert code == 0, errors[-3_000:]
    return printed


async def told(client: str, name: str, url: str, key: str, folder: Path) -> Any:
    return json.loads((await store(client, "tell", name, url, key, folder)).splitlines()[-1])


async def headrace(world: World, *words: str, kill_after_lines: int = 0) -> Any:
    """What `headrace sync ... --json` tells; None when it was killed after it had told so many lines of progress."""
    environment = {"PATH": os.environ["PATH"], "HEADRACE_URL": world.url, "HEADRACE_API_KEY": world.key, "HOME": "/nonexistent"}
    started = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("headrace")), "sync", *words, "--json"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    if kill_after_lines:
        assert started.stderr is not None
        for _ in range(kill_after_lines):
            await started.stderr.readline()
        started.send_signal(signal.SIGKILL)
        await started.communicate()
        return None
    output, errors = await started.communicate()
    if started.returncode != 0:
        raise Failed((errors + output).decode()[-3_000:])
    return json.loads(output)


@pytest.mark.parametrize("client", clients.NAMES)
async def test_a_store_comes_in_and_goes_out_as_it_was(world: World, client: str, tmp_path: Path) -> None:
    name, source, back = world.name, tmp_path / "mlruns", tmp_path / "out"
    await store(client, "make", name, source.as_uri(), "none", tmp_path)
    before = await told(client, name, source.as_uri(), "none", tmp_path)
    assert len(before[name]["runs"]["parent"]["history"]["loss"]) == 3_000

    counted = await headrace(world, "import", str(source), "--dry-run")
    assert counted["taken"]["experiments"] >= 2
    for lines in (1, 2, 3):
        await headrace(world, "import", str(source), kill_after_lines=lines)
    await headrace(world, "import", str(source))
    assert await told(client, name, world.url, world.key, tmp_path) == before
    again = await headrace(world, "import", str(source))
    assert not any(again["taken"].get(kind) for kind in ("runs", "logged models", "model versions", "artifacts")), again

    await headrace(world, "export", str(back), "--experiment", name, kill_after_lines=1)
    await headrace(world, "export", str(back), "--experiment", name)
    await headrace(world, "export", str(back), "--experiment", f"{name}-gone")
    assert await told(client, name, back.as_uri(), "none", tmp_path) == before
    repeated = await headrace(world, "export", str(back), "--experiment", name)
    assert not any(repeated["taken"].get(kind) for kind in ("runs", "logged models", "model versions", "artifacts")), repeated


async def test_what_is_no_store_is_told_and_nothing_is_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(Failed, match="there is no file"):
        await headrace(world, "import", str(tmp_path / "absent"))
    with pytest.raises(Failed, match="holds something else than an mlruns folder"):
        await headrace(world, "export", str(tmp_path / "other"))
    with pytest.raises(Failed, match="has no experiment 'none'"):
        await headrace(world, "export", str(tmp_path / "new"), "--experiment", "none")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
