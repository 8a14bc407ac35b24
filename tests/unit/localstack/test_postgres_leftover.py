"""What a killed PostgreSQL leaves: a lock file that names a process which nobody has reaped yet."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from localstack import postgres
from localstack.postgres import Postgres
from localstack.process import is_zombie


@pytest.fixture
def zombie() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended and that nobody has waited for."""
    with subprocess.Popen(["/bin/true"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        while not is_zombie(process.pid):
            pass
        yield process


@pytest.fixture
def pid_file(tmp_path: Path, zombie: subprocess.Popen[bytes]) -> Path:
    file = tmp_path / "postmaster.pid"
    file.write_text(f"{zombie.pid}\n{tmp_path}\n")
    return file


def test_one_that_is_reaped_meanwhile_is_waited_for(pid_file: Path, zombie: subprocess.Popen[bytes]) -> None:
    reaper = threading.Timer(0.1, zombie.wait)
    reaper.start()
    Postgres._end_leftover(pid_file)
    assert not is_zombie(zombie.pid)
    assert pid_file.exists()  # PostgreSQL itself sees that nobody runs
    reaper.join()


def test_one_that_nobody_reaps_gives_up_its_lock_file(pid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_REAPED_S", 0.1)
    Postgres._end_leftover(pid_file)
    assert not pid_file.exists()


def test_but_not_while_a_backend_of_it_is_left(pid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_REAPED_S", 0.1)
    waits = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(waits, cwd=pid_file.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as backend:
        assert backend.stdout is not None
        backend.stdout.readline()
        Postgres._end_leftover(pid_file)
        assert pid_file.exists()
        backend.communicate()
