"""Child processes: known by pid and start time, stopped with all they forked, and dead when we are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from localstack import process
from localstack.errors import Missing

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def shell(script: str, tmp_path: Path, mark: str = "unit") -> process.Child:
    return process.spawn("shell", ["sh", "-c", script], log=tmp_path / "log", env=ENVIRONMENT, mark=mark)


def test_what_it_forked_is_stopped_with_it(tmp_path: Path) -> None:
    child = shell("sleep 300 & echo $!; wait", tmp_path)
    until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    grandchild = process.identify(int((tmp_path / "log").read_text()))
    assert grandchild is not None
    child.stop(5)
    assert child.exit_code() == -signal.SIGTERM
    until(lambda: not grandchild.alive())


def test_one_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    child = shell("trap '' TERM; echo up; while :; do sleep 1; done", tmp_path)
    until(lambda: (tmp_path / "log").read_text() == "up\n")
    child.stop(0.2)
    assert child.exit_code() == -signal.SIGKILL


def test_a_recycled_pid_is_another_process() -> None:
    me = process.identify(os.getpid())
    assert me is not None
    assert me.alive()
    assert not process.ProcessId(me.pid, me.started - 1).alive()


def test_children_die_with_us_even_when_we_are_killed(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from localstack import process
log, env = pathlib.Path({str(tmp_path / "log")!r}), {ENVIRONMENT!r}
child = process.spawn("sleep", ["sleep", "300"], log=log, env=env, mark="unit")
print(child.pid, flush=True)
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = process.identify(int(parent.stdout.readline()))
        assert child is not None
        parent.kill()
    until(lambda: not child.alive())


def test_stragglers_are_found_by_the_mark_of_their_stack(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}"
    # The second one left the group of its parent, as a daemon does.
    child = shell("setsid sleep 300 & sleep 300", tmp_path, mark)
    until(lambda: len(list(process.marked(mark))) >= 3)
    assert process.sweep(mark) >= 3
    assert list(process.marked(mark)) == []
    child.stop(1)


def test_a_log_keeps_its_newer_half(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    line = b"x" * 1023 + b"\n"
    log.write_bytes(b"first\n" + line * 33 * 1024 + b"last\n")
    process.trim_log(log)
    kept = log.read_bytes()
    assert len(kept) <= 16 * 1024 * 1024
    assert kept.startswith(b"xxx")
    assert process.tail(log, 1) == "last"


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match="util-linux"):
        process.spawn("x", ["true"], log=tmp_path / "log", env={}, mark="unit")
