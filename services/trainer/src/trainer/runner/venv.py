"""The environment of a training: what the source's own lock file says, installed once per lock and kept while there is room.

Only wheels are installed, so that nothing of a package runs outside of the sandbox: a source distribution would run its build, and even
compiling bytecode would run a package's .pth files, so that is done in the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import uv
from servicekit import trees
from servicekit.errors import Invalid, Unavailable

from trainer.runner import sandbox
from trainer.runner.child import output_of
from trainer.runner.disk import FULL
from trainer.runner.sandbox import Command, Limits

LOCK = "requirements.lock"
_COMPLETE = ".headrace-complete"
_NAME = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger(__name__)
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
    """Environments below a folder, each named by its lock's hash and the interpreter. Those of most use are kept.

    Beside each is a lock file: who installs or removes it has it alone, who uses it shares it with others that do. The kernel gives
    it back when a process dies.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: above it the environments that were not used for longest are removed, never one in use."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._used: dict[str, int] = {}

    def close(self) -> None:
        """Uses none of them any more. May be repeated."""
        while self._used:
            os.close(self._used.popitem()[1])

    async def ensure(self, lock: bytes, scratch: Path, note: Callable[[str], None], output: Callable[[bytes], None]) -> Path:
        """The environment of a lock; made if there is none, which takes minutes. `scratch` is an empty folder. It stays until `close`.

        Several processes may ask at once: one makes it, the others wait. Raises Invalid for a lock that cannot be installed,
        Unavailable when a package index does not answer.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        venv = self._folder / lock_key(lock)
        if venv.name in self._used:
            return venv
        held = os.open(_lock_file(venv), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            await _lock(held, fcntl.LOCK_SH, note)
            while not (venv / _COMPLETE).exists():
                await _lock(held, fcntl.LOCK_EX, note)
                if not (venv / _COMPLETE).exists():
                    note("installing the packages of requirements.lock")
                    await asyncio.to_thread(trees.remove, venv)
                    await _install(lock, venv, scratch, output)
                    await _compile(venv, scratch, output)
                    (venv / _COMPLETE).write_text(str(await asyncio.to_thread(_size, venv)))
                # The kernel lets go of one lock before it gives the other: the environment may be removed in between.
                await _lock(held, fcntl.LOCK_SH, note)
            (venv / _COMPLETE).touch()
        except BaseException:
            os.close(held)
            raise
        self._used[venv.name] = held
        await asyncio.to_thread(self._make_room)
        return venv

    def _make_room(self) -> None:
        """Removes environments until the others fit. Blocks."""
        kept = sorted((path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)), key=_last_use)
        sizes = {path: _known_size(path) for path in kept}
        for path in kept:
            if sum(sizes.values()) <= self._max_bytes:
                return
            if path.name not in self._used and _remove_unused(path):
                del sizes[path]


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


async def resolve(requirements: Sequence[str], scratch: Path, output: Callable[[bytes], None]) -> bytes:
    """A lock, with hashes, of the newest wheels that meet the requirements on this interpreter. `scratch` is an empty folder. Takes
    seconds. Raises Invalid when nothing meets them all, Unavailable when a package index does not answer."""
    asked, lock = scratch / "requirements.in", scratch / LOCK
    await asyncio.to_thread(_write, asked, "\n".join(requirements).encode())
    await _uv(
        output,
        *("pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate", "--only-binary", ":all:"),
        *("--python", sandbox.BASE_PYTHON, "--output-file", str(lock), str(asked)),
    )
    return await asyncio.to_thread(lock.read_bytes)


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


def _lock_file(venv: Path) -> Path:
    return venv.with_name(f"{venv.name}.lock")


async def _lock(held: int, how: int, note: Callable[[str], None]) -> None:
    """Locks an open lock file, or changes how it is locked."""
    waited = False
    while True:
        try:
            fcntl.flock(held, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not waited:
                note("waiting for another training that installs the same packages")
            waited = True
            await asyncio.sleep(_WAIT_S)


def _remove_unused(venv: Path) -> bool:
    """Removes an environment and says so; False when somebody uses or installs it. Blocks."""
    held = os.open(_lock_file(venv), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (venv / _COMPLETE).unlink(missing_ok=True)  # first: what is half removed is installed anew
        trees.remove(venv)
    except BlockingIOError:
        return False
    finally:
        os.close(held)
    _log.info("removed the environment %s to make room", venv.name)
    return True


def _last_use(venv: Path) -> float:
    """What was never complete is of no use to anybody."""
    try:
        return (venv / _COMPLETE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _known_size(venv: Path) -> int:
    """Bytes on the disk, as they were written down when it was complete; else they are counted."""
    try:
        return int((venv / _COMPLETE).read_text())
    except (FileNotFoundError, ValueError):
        return _size(venv)


def _size(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total
