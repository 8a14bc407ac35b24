"""Makes an ONNX file of a logged model: an environment of the model's own requirements, then `convert.py` in the sandbox.

The model's code, and what its pickle runs, see the model, the environment and an empty folder for what comes out: no network, no secret.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servicekit.errors import Invalid, Unavailable

from trainer.runner import sandbox
from trainer.runner.sandbox import Command, Limits
from trainer.runner.venv import Venvs, resolve

CONVERTERS = {
    "sklearn": ("skl2onnx>=1.18",),
    "xgboost": ("skl2onnx>=1.18", "onnxmltools>=1.13"),
    "lightgbm": ("skl2onnx>=1.18", "onnxmltools>=1.13"),
    "pytorch": ("onnxscript>=0.5",),
}
"""What each flavour that can be converted needs, besides the model's own requirements and what all need."""

_ALWAYS = ("onnx>=1.16,<2", "onnxruntime>=1.20")
REQUIREMENTS = "requirements.txt"
MAX_REQUIREMENTS_BYTES = 100_000
MAX_PACKAGE_BYTES = 64 * 1024 * 1024

_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?P<extras>\[[A-Za-z0-9._, -]*\])?"
    r"==(?P<version>[A-Za-z0-9.!_-]+)(\+[A-Za-z0-9.]+)?"
)
_SCRIPT = Path(__file__).resolve().parents[3] / "sandboxed" / "convert.py"
_REFUSED = 3
"""Its exit code when the model cannot be converted, and `package.json` says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """What came out: the file, its signature and sample rows as JSON has them, how far it is from the original, and the environment."""

    file: Path
    signature: dict[str, Any]
    samples: dict[str, Any]
    parity: dict[str, Any]
    lock: bytes


class Packager:
    """Converts models, each in an environment that is kept for the next that asks for the same."""

    def __init__(self, venvs: Venvs, limits: Limits) -> None:
        """`limits`: what a conversion may use."""
        self._venvs = venvs
        self._limits = limits

    async def package(self, model: Path, flavours: Sequence[str], folder: Path, output: Callable[[bytes], None]) -> Package:
        """Converts the MLflow model in the folder `model`; `folder` is an empty folder for the work and what comes out of it.

        `output` takes what the installer and the converter print. Takes minutes when packages are to be installed. Repeatable in another
        empty folder. When cancelled nothing of it goes on. Raises Invalid with the reason when the model cannot be converted, Unavailable
        when a package index does not answer.
        """
        flavour = next((one for one in CONVERTERS if one in flavours), None)
        if flavour is None:
            raise Invalid(f"it was logged as {', '.join(flavours) or 'nothing'}; what can be converted are {', '.join(CONVERTERS)}")
        wanted = await asyncio.to_thread(requirements, model, flavour)
        for name in ("lock", "venv", "out"):
            (folder / name).mkdir()
        lock = await resolve(wanted, folder / "lock", output)
        venv = await self._venvs.ensure(lock, folder / "venv", lambda line: output(f"{line}\n".encode()), output)
        out = folder / "out"
        words = [str(venv / "bin" / "python"), "-I", str(_SCRIPT), str(model), str(out)]
        command = Command(words, _environment(venv), visible=[*sandbox.visible_python(venv), _SCRIPT, model], writable=[out])
        ended = await sandbox.run(command, self._limits, folder / "sandbox", output)
        if ended.killed:
            raise Invalid(f"the conversion was stopped: {ended.killed}")
        if ended.error:
            raise Unavailable(f"the conversion could not be started: {ended.error}")
        told = await asyncio.to_thread(_told, out, ended.code)
        return Package(out / "model.onnx", told["signature"], told["samples"], told["parity"], lock)


def requirements(model: Path, flavour: str) -> list[str]:
    """What the environment of a conversion needs: the model's pinned requirements, and the converters. Blocks.

    Raises Invalid for a model that does not say what it needs, or says it otherwise than by versions of packages: an address or an option
    could have the installer fetch anything.
    """
    file = model / REQUIREMENTS
    if not file.is_file() or file.stat().st_size > MAX_REQUIREMENTS_BYTES:
        raise Invalid(f"it has no {REQUIREMENTS} of at most {MAX_REQUIREMENTS_BYTES} bytes, which says what it needs to be loaded")
    pins = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        stated = line.partition("#")[0].strip()
        if not stated:
            continue
        pin = _PIN.fullmatch(stated)
        if pin is None:
            raise Invalid(f"{REQUIREMENTS}, line {number}: a version of a package is needed, like name==1.0, not {stated[:100]!r}")
        # The small one loads models just as well, and brings a tenth of the packages.
        name = "mlflow-skinny" if pin["name"].lower() == "mlflow" else pin["name"]
        # A build like +cpu or +cu130 is in no public index; the version without it is the same code.
        pins.append(f"{name}{pin['extras'] or ''}=={pin['version']}")
    if not any(pin.startswith("mlflow-skinny==") for pin in pins):
        pins.append("mlflow-skinny")
    return [*pins, *_ALWAYS, *CONVERTERS[flavour]]


def _environment(venv: Path) -> dict[str, str]:
    return {
        "PATH": f"{venv / 'bin'}:{os.defpath}",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        # MLflow neither keeps a database nor tells anybody about its use.
        "MLFLOW_TRACKING_URI": "file:///tmp/mlruns",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _told(out: Path, code: int) -> dict[str, Any]:
    """What the converter wrote. It ran the model's code, so nothing of it is believed but its form; what it says of the answers is
    judged again by the evaluation. Raises Invalid."""
    file = out / "package.json"
    if code not in (0, _REFUSED) or not file.is_file() or file.is_symlink() or file.stat().st_size > MAX_PACKAGE_BYTES:
        raise Invalid(f"the conversion ended with exit code {code}; its log says more")
    try:
        told = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise Invalid("the conversion left what is not JSON") from None
    if isinstance(told, dict) and isinstance(told.get("refused"), str):
        raise Invalid(told["refused"][:2_000])
    if not isinstance(told, dict) or not all(isinstance(told.get(part), dict) for part in ("signature", "samples", "parity")):
        raise Invalid("the conversion left no signature, samples and parity")
    model = out / "model.onnx"
    if model.is_symlink() or not model.is_file():
        raise Invalid("the conversion left no model.onnx")
    return told
