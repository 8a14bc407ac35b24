"""The jail holds what it promises, asked from inside; and the parent believes nothing that comes out of it unchecked."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from evaluator import jail, worker
from evaluator.adapters.sandbox import ENVIRONMENT, NAMESPACES, Limits, SandboxPredictor, _collect
from evaluator.ports import Unjudgeable
from servicekit.errors import Unavailable

X = np.linspace(-2, 2, 40, dtype=np.float32)
KINDS = ["late", "other"] * 20

PROBE = """
import json, os, socket, sys
from pathlib import Path
import resource
from evaluator import jail
# A file system below a folder that is to be read-only, as a machine may have one below /usr.
below = Path(sys.argv[4], "below")
below.mkdir(parents=True)
jail._mount("tmpfs", below, "tmpfs", 0)
(below / "seen").write_text("x")
inside, outside = jail.enter(Path(sys.argv[1]), [sys.argv[4]])
def unshared():
    if jail._libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
        raise OSError("refused")
    return "a new user namespace"
def tried(action):
    try:
        return str(action())
    except OSError as error:
        return type(error).__name__
found = {
    "environment": dict(os.environ),
    "root": sorted(os.listdir("/")),
    "secret": tried(lambda: Path(sys.argv[2]).read_text()),
    "home": tried(lambda: os.listdir(os.path.expanduser("~root"))),
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2)),
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "write_in": tried(lambda: (inside / "x").write_text("x")),
    "write_root": tried(lambda: Path("/x").write_text("x")),
    "write_python": tried(lambda: Path(sys.prefix, "x").write_text("x")),
    "read_below": tried(lambda: (below / "seen").read_text()),
    "write_below": tried(lambda: (below / "x").write_text("x")),
    "write_limit": tried(lambda: Path("/proc/sys/user/max_user_namespaces").write_text("9")),
    "namespaces": Path("/proc/sys/user/max_user_namespaces").read_text().strip(),
    "unshare": tried(unshared),
    "processes_at_once": resource.getrlimit(resource.RLIMIT_NPROC),
    "write_out": tried(lambda: (outside / "x").write_text("x")),
    "mount": tried(lambda: os.makedirs("/tmp/m") or jail._mount("tmpfs", Path("/tmp/m"), "tmpfs", 0)),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "status": [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))],
}
(outside / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture
def found_inside(tmp_path: Path) -> dict[str, Any]:
    """What a process sees and may do in the jail, while this test's process has secrets and a server of its own."""
    folder = tmp_path / "with a space"
    for name in ("in", "out", "root"):
        (folder / name).mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [*NAMESPACES, sys.executable, "-I", "-c", PROBE, str(folder), str(secret), str(port), str(tmp_path / "more")]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "out" / "found.json").read_text())
    return found


def test_inside_there_is_python_the_task_and_nothing_else(found_inside: dict[str, Any]) -> None:
    assert found_inside["secret"] == "FileNotFoundError"
    assert set(found_inside["root"]) <= {"bin", "dev", "etc", "lib", "lib64", "proc", "sys", "task", "tmp", "usr"} | {
        Path(path).parts[1] for path in (sys.prefix, sys.base_prefix, worker.__file__)
    }
    assert set(found_inside["environment"]) - {"LC_CTYPE"} <= set(ENVIRONMENT)
    assert len(found_inside["processes"]) == 1


def test_inside_there_is_no_network(found_inside: dict[str, Any]) -> None:
    assert found_inside["connect"] in ("OSError", "ConnectionRefusedError")
    assert found_inside["interfaces"] == ["lo"]


def test_inside_only_its_answer_can_be_written(found_inside: dict[str, Any]) -> None:
    assert found_inside["write_out"] == "1"
    for place in ("write_in", "write_root", "write_python"):
        assert found_inside[place] == "OSError"


def test_inside_what_is_mounted_below_a_folder_is_as_readonly_as_the_folder(found_inside: dict[str, Any]) -> None:
    assert found_inside["read_below"] == "x"
    assert found_inside["write_below"] == "OSError"


def test_inside_there_are_no_further_namespaces_and_few_processes(found_inside: dict[str, Any]) -> None:
    assert found_inside["namespaces"] == "0"
    assert found_inside["write_limit"] in ("OSError", "PermissionError")
    assert found_inside["unshare"] == "OSError"
    assert found_inside["processes_at_once"] == [jail.PROCESSES, jail.PROCESSES]


def test_a_capability_that_cannot_be_dropped_is_an_error_and_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        """Knows 40 capabilities, and does not let go of the ones that it is told."""

        def __init__(self, refused: set[int]) -> None:
            self.refused = refused
            self.asked: list[int] = []

        def prctl(self, option: int, capability: int, *_: int) -> int:
            if option != 24:
                return 0
            self.asked.append(capability)
            ctypes.set_errno(errno.EPERM if capability in self.refused else errno.EINVAL)
            return -1 if capability in self.refused or capability in (3, *range(40, 64)) else 0

        def capset(self, *_: object) -> int:
            return 0

    kernel = Kernel(set())
    monkeypatch.setattr(jail, "_libc", kernel)
    jail.drop_privileges()
    assert kernel.asked == list(range(64)), "one that is not known ends nothing"
    monkeypatch.setattr(jail, "_libc", Kernel({21}))
    with pytest.raises(PermissionError, match="capability 21"):
        jail.drop_privileges()


def test_inside_there_are_no_privileges(found_inside: dict[str, Any]) -> None:
    assert found_inside["mount"] in ("OSError", "PermissionError")
    values = dict(line.split(":\t") for line in found_inside["status"])
    assert int(values["CapEff"], 16) == 0
    assert int(values["CapBnd"], 16) == 0
    assert values["NoNewPrivs"] == "1"


# -- the predictor


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.arrow"
    table = pa.table({"x": X, "kind": KINDS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def written(folder: Path, data: bytes) -> Path:
    path = folder / "a model.onnx"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("isolated", [True, False])
async def test_a_prediction_from_the_sandbox(tiny: ModuleType, tmp_path: Path, rows: Path, isolated: bool) -> None:
    data = tiny.linear(1.5)
    predictor = SandboxPredictor(isolated=isolated, work_dir=tmp_path)
    samples = {"x": [[1.0]], "kind": [["late"]]}
    found = await predictor.predict(written(tmp_path, data), tiny.declared(data), rows, samples, measure=True)
    np.testing.assert_allclose(found.scores, tiny.probability(1.5, X, KINDS)[:, 0], rtol=1e-6)
    assert found.samples is not None
    assert found.samples["probability"].shape == (1, 1)
    assert found.latency is not None
    assert found.latency.rows == 40
    assert not [name for name in os.listdir(tmp_path) if name.startswith("headrace-predict-")]


async def test_what_the_model_does_wrong_is_told(tiny: ModuleType, tmp_path: Path, rows: Path) -> None:
    data = tiny.linear(1.0, breaks_above=1.0)
    with pytest.raises(Unjudgeable, match="GatherElements"):
        await SandboxPredictor().predict(written(tmp_path, data), tiny.declared(data), rows, None, measure=False)


async def test_a_model_that_never_ends_is_ended(tiny: ModuleType, tmp_path: Path, rows: Path) -> None:
    data = tiny.linear(1.0, spins=tiny.ENDLESS)
    predictor = SandboxPredictor(Limits(timeout_s=3), work_dir=tmp_path)
    with pytest.raises(Unavailable, match="longer than 3 s"):
        await predictor.predict(written(tmp_path, data), tiny.declared(data), rows, None, measure=False)
    assert not _workers(tmp_path)


async def test_a_process_that_is_killed_is_a_passing_fault(tiny: ModuleType, tmp_path: Path, rows: Path) -> None:
    data = tiny.linear(1.0, spins=tiny.ENDLESS)
    predictor = SandboxPredictor(Limits(cpu_seconds=1), work_dir=tmp_path)
    with pytest.raises(Unavailable, match="died"):
        await predictor.predict(written(tmp_path, data), tiny.declared(data), rows, None, measure=False)


async def test_too_much_memory_ends_the_process_or_the_prediction_and_not_us(tiny: ModuleType, tmp_path: Path, rows: Path) -> None:
    data = tiny.linear(1.0)
    predictor = SandboxPredictor(Limits(memory_bytes=64 * 1024**2), work_dir=tmp_path)
    with pytest.raises((Unavailable, Unjudgeable)):
        await predictor.predict(written(tmp_path, data), tiny.declared(data), rows, None, measure=False)


async def test_cancelling_leaves_no_process_behind(tiny: ModuleType, tmp_path: Path, rows: Path) -> None:
    data = tiny.linear(1.0, spins=tiny.ENDLESS)
    predictor = SandboxPredictor(work_dir=tmp_path)
    work = asyncio.create_task(predictor.predict(written(tmp_path, data), tiny.declared(data), rows, None, measure=False))
    async with asyncio.timeout(30):
        while not _workers(tmp_path):  # noqa: ASYNC110 - another process, which does not tell us
            await asyncio.sleep(0.02)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not _workers(tmp_path)


def _workers(work_dir: Path) -> list[psutil.Process]:
    """Processes that work in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if worker.__name__ in words and any(word.startswith(str(work_dir)) for word in words):
            found.append(process)
    return found


# -- what comes out is not believed


def result(out: Path, **changes: Any) -> Path:
    told = {"rows": 2, "latency": None, "samples": None} | changes
    (out / worker.RESULT).write_text(json.dumps(told))
    np.save(out / worker.SCORES, np.array([0.5, 0.25]))
    return out


def test_a_result_as_it_should_be(tmp_path: Path) -> None:
    assert _collect(result(tmp_path)).scores.tolist() == [0.5, 0.25]


def test_a_link_to_another_file_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.npy"
    np.save(elsewhere, np.array([1.0, 0.0]))
    out = tmp_path / "out"
    out.mkdir()
    result(out)
    (out / worker.SCORES).unlink()
    (out / worker.SCORES).symlink_to(elsewhere)
    with pytest.raises(Unavailable, match="no result"):
        _collect(out)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    np.save(result(tmp_path) / worker.SCORES, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unavailable, match="no result"):
        _collect(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "{}", json.dumps({"samples": 3, "latency": None}), " " * 100_000])
def test_an_answer_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    (result(tmp_path) / worker.RESULT).write_text(text)
    with pytest.raises(Unavailable, match="no result"):
        _collect(tmp_path)


def test_a_pipe_in_place_of_a_file_does_not_hang_us(tmp_path: Path) -> None:
    (result(tmp_path) / worker.SCORES).unlink()
    os.mkfifo(tmp_path / worker.SCORES)
    with pytest.raises(Unavailable, match="no result"):
        _collect(tmp_path)


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    with (result(tmp_path) / worker.SCORES).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(Unavailable, match="no result"):
        _collect(tmp_path)
