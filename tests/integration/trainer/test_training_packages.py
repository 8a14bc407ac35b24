"""Packages and processes of a training: real packages from the index by the source's own lock, and several processes by torchrun."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from contracts.trainer.v1 import service_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOCK = Path(__file__).parents[3] / "requirements.lock"


def pinned(name: str) -> str:
    """A package with its hashes, as the workspace's own lock pins it."""
    found = re.search(rf"^{name}==[^\n]*(?:\n +--hash[^\n]*)*", LOCK.read_text(), re.MULTILINE)
    assert found is not None
    return found[0] + "\n"


async def test_packages_are_installed_by_the_lock_once_and_seen_read_only(shared: Any) -> None:
    script = """
import idna, sys, importlib.util, pathlib
print("idna", idna.__version__, idna.__file__.startswith(sys.prefix), importlib.util.find_spec("headrace").origin)
print("compiled", pathlib.Path(importlib.util.cache_from_source(idna.__file__)).exists())
try:
    pathlib.Path(idna.__file__).write_text("")
except OSError as error:
    print("refused", error.errno)
"""
    lock = pinned("idna")
    source = await shared.upload({"train.py": script, "requirements.lock": lock})
    for _ in range(2):
        training = await shared.submit("", source=source)
        ended = await shared.ended(training.training_id, within_s=240)
        log = await shared.log(training.training_id)
        assert ended.status == "succeeded", log
        version = lock.split("==")[1].split()[0]
        assert f"idna {version} True /headrace/sdk/headrace/__init__.py" in log
        assert "compiled True" in log
        assert "refused 30" in log  # read-only file system
    assert "installing the packages" not in log  # the second one found them
    run = await shared.run(ended.run_id)
    assert run.tags["headrace.packages"] == f"idna=={version}"
    assert (await shared.artifact(ended.run_id, "requirements.lock")).decode() == lock


async def test_a_package_with_another_hash_is_not_installed(shared: Any) -> None:
    lock = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, pinned("idna"))
    training = await shared.submit("", source=await shared.upload({"train.py": "", "requirements.lock": lock}))
    ended = await shared.ended(training.training_id, within_s=240)
    assert (ended.status, ended.attempt) == ("failed", 1)
    assert "could not be installed" in ended.reason
    assert "idna" in ended.reason
    assert (await shared.run(ended.run_id)).status == "FAILED"


async def test_several_processes_are_started_by_torchrun(shared: Any) -> None:
    # What stands in for torch here only says how it was called; the source's own folder comes before installed packages.
    files = {
        "torch/__init__.py": "",
        "torch/distributed/__init__.py": "",
        "torch/distributed/run.py": "import sys; print('torchrun', sys.argv[1:])",
        "train.py": "",
    }
    training = await shared.submit(
        "", source=await shared.upload(files), command=["python", "train.py", "--lr", "1"], resources=pb.Resources(processes=3)
    )
    assert (await shared.ended(training.training_id)).status == "succeeded"
    log = await shared.log(training.training_id)
    assert "torchrun ['--standalone', '--nproc-per-node', '3', 'train.py', '--lr', '1']" in log
