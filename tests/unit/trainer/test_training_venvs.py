"""Which environments are kept: those in use, and those used last as long as there is room."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer.runner import venv as venv_module
from trainer.runner.venv import Venvs, lock_key

A, B, C = b"a==1", b"b==1", b"c==1"
SIZE = 1_000_000


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was installed, in order: here an installation is one file of `SIZE` bytes."""
    made: list[bytes] = []

    async def install(lock: bytes, venv: Path, scratch: Path, output: Any) -> None:
        made.append(lock)
        os.makedirs(venv)
        (venv / "package").write_bytes(os.urandom(SIZE))

    async def compile_nothing(venv: Path, scratch: Path, output: Any) -> None:
        assert (venv / "package").exists()

    monkeypatch.setattr(venv_module, "_install", install)
    monkeypatch.setattr(venv_module, "_compile", compile_nothing)
    return made


async def use(venvs: Venvs, lock: bytes, folder: Path, note: Callable[[str], None] = lambda _: None) -> Path:
    return await venvs.ensure(lock, folder / "scratch", note, lambda _: None)


def aged(folder: Path, lock: bytes, hours: int) -> None:
    """The environment was last used so long ago."""
    file = folder / lock_key(lock) / ".headrace-complete"
    then = file.stat().st_mtime - hours * 3600
    os.utime(file, (then, then))


async def test_what_was_not_used_for_longest_makes_room(installed: list[bytes], tmp_path: Path) -> None:
    for lock in (A, B, A):  # A again: it is used last
        venvs = Venvs(tmp_path, 2 * SIZE + SIZE // 2)
        path = await use(venvs, lock, tmp_path)
        assert path == tmp_path / lock_key(lock)
        venvs.close()
        aged(tmp_path, lock, {A: 2, B: 3}[lock])
    assert installed == [A, B]
    venvs = Venvs(tmp_path, 2 * SIZE + SIZE // 2)
    await use(venvs, C, tmp_path)
    venvs.close()
    assert [(tmp_path / lock_key(lock)).exists() for lock in (A, B, C)] == [True, False, True]


async def test_what_is_in_use_is_never_removed(installed: list[bytes], tmp_path: Path) -> None:
    first, second, third = (Venvs(tmp_path, 1) for _ in range(3))
    used = await use(first, A, tmp_path)
    aged(tmp_path, A, 5)
    await use(second, B, tmp_path)
    assert (used / "package").stat().st_size == SIZE
    first.close()
    await use(third, B, tmp_path)  # two may use the same
    assert not used.exists()
    second.close()
    await use(second, C, tmp_path)
    assert (tmp_path / lock_key(B) / "package").exists()
    second.close()
    third.close()
    assert installed == [A, B, C]


async def test_what_was_left_half_installed_goes_first(installed: list[bytes], tmp_path: Path) -> None:
    left = tmp_path / ("0" * 32)
    left.mkdir()
    (left / "package").write_bytes(os.urandom(SIZE))
    venvs = Venvs(tmp_path, SIZE + SIZE // 2)
    await use(venvs, A, tmp_path)
    venvs.close()
    assert not left.exists()


async def test_several_at_once_install_it_once(installed: list[bytes], tmp_path: Path) -> None:
    several = [Venvs(tmp_path, 1) for _ in range(4)]
    async with asyncio.timeout(30):
        await asyncio.gather(*(use(one, A, tmp_path) for one in several))
    for one in several:
        one.close()
    assert installed == [A]
