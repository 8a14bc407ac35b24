"""Runs `python -m evaluator.worker` on a task in namespaces of its own, and takes back what it left, believing nothing of it unchecked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shutil
import signal
import stat
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluator import worker
from evaluator.domain.candidate import Model, Tensor
from evaluator.domain.evaluation import Latency
from evaluator.domain.statistics import Floats
from evaluator.ports import Prediction, Unjudgeable, WorkerDied

_log = logging.getLogger(__name__)

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",  # noqa: S108 - its own, empty one
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}
"""The whole environment of the process: nothing of ours is in it."""

NAMESPACES = (
    # The kernel ends unshare when this process dies, and with it everything in its process namespace.
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--"),
)
"""What is put before the command: new user, mount, process and network namespaces."""

LATENCY_ROWS = 1000
_RESULT_BYTES = 64 * 1024
_STDERR_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process may use. `timeout_s` is real time."""

    memory_bytes: int = 4 * 1024**3
    cpu_seconds: int = 600
    file_bytes: int = 512 * 1024**2
    timeout_s: float = 900


class SandboxPredictor:
    """Predicts in a new process per model. With `isolated=False` there are no namespaces, only limits and the clean environment: for
    places that are a sandbox themselves and allow none within."""

    def __init__(self, limits: Limits | None = None, *, isolated: bool = True, work_dir: Path | None = None) -> None:
        self._limits = limits or Limits()
        self._isolated = isolated
        self._work_dir = work_dir

    async def predict(
        self, model: Path, declared: Model | None, rows: Path, samples: dict[str, Any] | None, *, measure: bool
    ) -> Prediction:
        with tempfile.TemporaryDirectory(prefix="headrace-predict-", dir=self._work_dir) as folder:
            task = Path(folder)
            await asyncio.to_thread(self._prepare, task, model, declared, rows, samples, measure)
            await self._run(task)
            return await asyncio.to_thread(_collect, task / "out")

    def _prepare(self, task: Path, model: Path, declared: Model | None, rows: Path, samples: dict[str, Any] | None, measure: bool) -> None:
        for name in ("in", "out", "root"):
            (task / name).mkdir()
        _link(model, task / "in" / worker.MODEL)
        _link(rows, task / "in" / worker.ROWS)
        if samples is not None:
            (task / "in" / worker.SAMPLES).write_text(json.dumps(samples))
        limits = asdict(self._limits)
        del limits["timeout_s"]
        told = {
            "signature": None if declared is None else _signature(declared),
            "samples": samples is not None,
            "latency_rows": LATENCY_ROWS if measure else 0,
            "jail": self._isolated,
            "limits": limits,
        }
        (task / "in" / worker.TASK).write_text(json.dumps(told))

    async def _run(self, task: Path) -> None:
        command = [*(NAMESPACES if self._isolated else []), sys.executable, "-I", "-m", worker.__name__, str(task)]
        with (task / "stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                code = await process.wait()
        except TimeoutError:
            raise WorkerDied(f"the prediction took longer than {self._limits.timeout_s:g} s and was ended") from None
        finally:
            await _end(process)
        if code != 0:
            with (task / "stderr").open("rb") as stderr:
                stderr.seek(max(0, os.fstat(stderr.fileno()).st_size - _STDERR_BYTES))
                _log.warning("a prediction process died", extra={"code": code, "stderr": stderr.read().decode(errors="replace")})
            raise WorkerDied(f"the process that runs the model died: {_how(code)}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Leaves nothing of the process behind, whatever happened."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _how(code: int) -> str:
    # unshare reports the end of its child by a signal as a shell does.
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        return f"it was ended by {name}" + (", perhaps for want of memory" if name in ("SIGKILL", "SIGABRT") else "")
    return f"it ended with code {code}"


def _collect(out: Path) -> Prediction:
    """Reads what the process left. Raises Unjudgeable for a refusal, WorkerDied for what it cannot have meant to leave."""
    try:
        result = json.loads(_read_bounded(out / worker.RESULT))
        if isinstance(result, dict) and "refused" in result:
            raise Unjudgeable(str(result["refused"])[:1000])
        scores = _load(out / worker.SCORES).astype(np.float64)
        samples = None
        if result["samples"] is not None:
            names = [str(name) for name in result["samples"]]
            samples = {name: _load(out / f"sample-{i}.npy") for i, name in enumerate(names)}
        latency = result["latency"]
        measured = None if latency is None else Latency(float(latency["p50_ms"]), float(latency["p99_ms"]), int(latency["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkerDied(f"the process that runs the model left no result: {type(error).__name__}") from error
    return Prediction(scores, samples, measured)


def _read_bounded(path: Path) -> bytes:
    with _open(path) as file:
        data: bytes = file.read(_RESULT_BYTES + 1)
    if len(data) > _RESULT_BYTES:
        raise ValueError("result too large")
    return data


def _load(path: Path) -> Floats:
    with _open(path) as file:
        # Before the array is read: its header may promise more than the file holds, and memory is taken for what it promises.
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} is not an array")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if math.prod(shape) * dtype.itemsize > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path.name} is cut off")
        file.seek(0)
        array: Floats = np.load(file, allow_pickle=False)
    return array


def _open(path: Path) -> Any:
    """A regular file, and neither what a link points at (a file of ours, perhaps) nor a pipe that never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name} is not a file")
    return os.fdopen(descriptor, "rb")


def _signature(declared: Model) -> dict[str, list[dict[str, str]]]:
    def told(tensors: tuple[Tensor, ...]) -> list[dict[str, str]]:
        return [{"name": tensor.name, "datatype": tensor.datatype} for tensor in tensors]

    return {"inputs": told(declared.inputs), "outputs": told(declared.outputs)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
