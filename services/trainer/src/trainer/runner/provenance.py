"""What a run was made with, as tags: packages, interpreter, machine, seed."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil

import psutil

from trainer.domain.training import Training
from trainer.runner.child import output_of
from trainer.runner.venv import packages

_MAX_TAG = 8_000
_GPU_S = 10.0


async def tags(training: Training, attempt: int, lock: bytes) -> dict[str, str]:
    """The tags of one attempt's run; all begin with `headrace.`."""
    pinned = packages(lock)
    told = {
        "headrace.training_id": training.training_id,
        "headrace.attempt": str(attempt),
        "headrace.lock_sha256": hashlib.sha256(lock).hexdigest(),
        "headrace.packages": " ".join(pinned)[:_MAX_TAG],
        "headrace.python": platform.python_version(),
        "headrace.platform": platform.platform(),
        "headrace.cpu_count": str(os.cpu_count() or 0),
        "headrace.memory_bytes": str(psutil.virtual_memory().total),
        "headrace.seed": str(training.seed),
        "headrace.processes": str(max(1, training.resources.processes)),
    }
    if training.delivery:
        told["headrace.delivery"] = training.delivery
    if training.started_by:
        told["headrace.started_by"] = training.started_by
    if training.source.git_url:
        told["headrace.source"] = f"{training.source.git_url} {training.source.git_ref}"[:_MAX_TAG]
    if gpus := await _gpus():
        told["headrace.gpu"] = gpus[:_MAX_TAG]
    return told


async def _gpus() -> str:
    """What nvidia-smi says is there; "" without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        code, said = await output_of([program, *query], {"PATH": os.defpath}, _GPU_S)
    except TimeoutError:
        return ""
    return said.strip() if code == 0 else ""
