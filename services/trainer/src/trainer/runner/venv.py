"""The environment of a training: what the source's own lock file says, installed once per lock and kept.

Only wheels are installed, so that nothing of a package runs outside of the sandbox: a source distribution would run its build, and even
compiling bytecode would run a package's .pth files, so that is done in the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import platform
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uv
from servicekit.errors import Invalid, Unavailable

from trainer.runner import sandbox, tree
from trainer.runner.child import output_of
from trainer.runner.disk import FULL
from trainer.runner.sandbox import Command, Limits

LOCK = "requirements.lock"
_COMPLETE = ".headrace-complete"
_INSTALL_S = 3_600.0
_WAIT_S = 0.2

# What uv says when an index, not the lock, is at fault.
_PASSING = ("error sending request", "dns error", "timed out", "timeout", "Connection", "connection", "HTTP status server error", "Network")
MAX_LOCK_BYTES = 10_000_000
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9._, -]*\])?==[A-Za-z0-9.!+_-]+"  # name[extra]==version
    r"(\s*;(?!.*--)[\w\s.<>=!~'\"(),-]*)?"  # ; marker
)
_HASH = re.compile(r"[0-9a-f]{64}")
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)


class Venvs:
    """Environments below a folder, each named by its lock's hash and the interpreter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def ensure(self, lock: bytes, scratch: Path, note: Callable[[str], None], output: Callable[[bytes], None]) -> Path:
        """The environment of a lock; made if there is none, which takes minutes. `scratch` is an empty folder.

        Several processes may ask at once: one makes it, the others wait. Raises Invalid for a lock that cannot be installed,
        Unavailable when a package index does not answer.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        venv = self._folder / lock_key(lock)
        async with _locked(self._folder / f"{venv.name}.lock", note):
            if (venv / _COMPLETE).exists():
                return venv
            note("installing the packages of requirements.lock")
            await asyncio.to_thread(tree.remove, venv)
            await _install(lock, venv, scratch, output)
            await _compile(venv, scratch, output)
            (venv / _COMPLETE).touch()
        return venv


def lock_key(lock: bytes) -> str:
    """Names an environment: the lock's hash, the interpreter's version and the machine."""
    told = b"\x00".join([lock, platform.python_implementation().encode(), platform.python_version().encode(), platform.machine().encode()])
    return hashlib.sha256(told).hexdigest()[:32]


def check_lock(lock: bytes) -> None:
    """Raises Invalid unless a lock holds pinned packages with hashes and nothing else: an option or an address in it could make the
    installer read another file, or another index than the operator's."""
    if len(lock) > MAX_LOCK_BYTES:
        raise Invalid(f"{LOCK} has more than {MAX_LOCK_BYTES} bytes")
    try:
        text = lock.decode()
    except UnicodeDecodeError:
        raise Invalid(f"{LOCK} is not UTF-8") from None
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    start, joined = 0, ""
    for number, line in enumerate(lines, start=1):
        start = start if joined else number
        joined += line.removesuffix("\\") + " "
        if line.endswith("\\") and number < len(lines):
            continue
        requirement, *hashes = re.split(r"\s+--hash=sha256:", joined.strip())
        if requirement and not (_REQUIREMENT.fullmatch(requirement) and all(map(_HASH.fullmatch, hashes))):
            raise Invalid(f"{LOCK}, line {start}: a pinned package is needed, like name==1.0 --hash=sha256:...")
        if requirement and not hashes:
            raise Invalid(f"{LOCK}, line {start}: {requirement[:100]} has no hash")
        joined = ""


def packages(lock: bytes) -> list[str]:
    """The packages that a lock pins, as name==version."""
    return sorted(f"{name.lower()}=={version}" for name, version in _PIN.findall(lock.decode(errors="replace")))


async def _install(lock: bytes, venv: Path, scratch: Path, output: Callable[[bytes], None]) -> None:
    file = scratch / LOCK
    await asyncio.to_thread(_write, file, lock)
    await _uv(output, "venv", "--quiet", "--python", sandbox.BASE_PYTHON, str(venv))
    await _uv(
        output,
        *("pip", "sync", "--quiet", "--require-hashes", "--no-build", "--allow-empty-requirements"),
        *("--python", str(venv / "bin" / "python"), str(file)),
    )


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


async def _compile(venv: Path, scratch: Path, output: Callable[[bytes], None]) -> None:
    """Compiles bytecode in the sandbox; a file that does not compile (some packages ship such) is no failure."""
    python = str(venv / "bin" / "python")
    words = [python, "-m", "compileall", "-q", "-q", "-j", str(os.cpu_count() or 1), str(venv / "lib")]
    visible = [path for path in sandbox.visible_python(venv) if path != venv]
    command = Command(words, {"PATH": os.defpath, "LANG": "C.UTF-8"}, visible=visible, writable=[venv])
    ended = await sandbox.run(command, Limits(4 * 2**30, 2**26, _INSTALL_S), scratch / "compile", output)
    if ended.killed or ended.error or ended.code < 0:
        raise Unavailable(f"the bytecode of the packages could not be compiled: {ended.killed or ended.error or ended.code}")


async def _uv(output: Callable[[bytes], None], *words: str) -> None:
    # Registries and proxies are the operator's to set; nothing of Headrace's own is handed on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    try:
        code, said = await output_of([uv.find_uv_bin(), *words], environment, _INSTALL_S)
    except TimeoutError:
        raise Unavailable(f"the packages were not installed within {_INSTALL_S:g} s") from None
    if said:
        output(said.encode())
    if code != 0:
        text = said.strip()[-1_500:]
        if any(sign in text for sign in FULL):
            raise Unavailable(f"the trainer's disk: the packages of {LOCK} do not fit")
        if any(sign in text for sign in _PASSING):
            raise Unavailable(f"the packages of {LOCK} could not be fetched: {text}")
        raise Invalid(f"the packages of {LOCK} could not be installed: {text}")


@contextlib.asynccontextmanager
async def _locked(file: Path, note: Callable[[str], None]) -> AsyncIterator[None]:
    """Holds a file lock, which the kernel gives back when this process dies."""
    with file.open("w") as opened:
        waited = False
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    note("waiting for another training that installs the same packages")
                waited = True
                await asyncio.sleep(_WAIT_S)
        yield
