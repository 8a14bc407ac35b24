"""MLflow's page comes with the stack, fetched by its lock; who starts a stack without it is told how to get it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gateway.page import VERSION, find
from localstack import mlflow_page
from localstack.cache import Silent
from localstack.errors import StackError


class Told:
    """Progress as the lines that it tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None:
        self.lines.append(f"{name}: {text}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has fetched nothing yet."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "a cache"))
    return tmp_path / "a cache"


def test_the_lock_is_of_the_version_that_the_gateway_is_tried_with() -> None:
    assert re.findall(r"^(\S+)==(\S+)", mlflow_page.lock_file().read_text(), re.M) == [("mlflow", VERSION)]


async def test_the_page_is_fetched_once_with_its_licenses_and_served(cache: Path) -> None:
    assert mlflow_page.installed() is None
    folder = mlflow_page.fetch(Silent())
    assert mlflow_page.installed() == folder
    assert "Apache License" in next((folder.parent / "licenses").rglob("LICENSE.txt")).read_text()
    page = find(str(folder))
    assert page is not None
    answer = await page.answer("index.html", {})
    assert answer is not None
    assert b"<!doctype html" in bytes(answer.body).lower()
    told = Told()
    assert mlflow_page.fetch(told) == folder
    assert told.lines == []
    assert sorted(each.name for each in (cache / "runtimes").iterdir()) == ["lock", folder.parent.name]


def test_without_a_network_the_stack_is_told_how_to_get_it_and_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(StackError, match="could not be fetched"):
        mlflow_page.fetch(Silent())
    told = Told()
    mlflow_page.fetch_if_possible(told)
    assert "run `headrace down` and `headrace up` once online" in told.lines[-1]
    assert mlflow_page.installed() is None
    assert [each.name for each in (cache / "runtimes").iterdir()] == ["lock"]


def test_another_wheel_than_the_locked_one_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = tmp_path / "requirements.lock"
    forged.write_text(f"mlflow=={VERSION} --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(mlflow_page, "lock_file", lambda: forged)
    with pytest.raises(StackError, match=r"(?i)hash"):
        mlflow_page.fetch(Silent())
    assert mlflow_page.installed() is None
