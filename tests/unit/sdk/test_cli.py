"""The command line: help for everything, errors in a sentence with an exit code, JSON where asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import typer
from headrace.cli import training
from headrace.cli.app import app, main
from headrace.cli.output import fail, table
from headrace.config import NotConfigured, connection
from headrace.http import Client, InvalidInput


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, command in group.commands.items():
        here = (*path, name)
        found += commands(command, here) if hasattr(command, "commands") else [(here, command)]
    return found


ALL = commands(typer.main.get_command(app))


@pytest.mark.parametrize("command", [command for _, command in ALL], ids=[" ".join(path) for path, _ in ALL])
def test_every_command_explains_itself_and_can_print_json(command: Any) -> None:
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []
    assert any("--json" in parameter.opts for parameter in command.params)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["headrace", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No gateway is configured."""
    for name in ("HEADRACE_URL", "HEADRACE_API_KEY", "HEADRACE_TOKEN", "HEADRACE_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_a_gateway_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "models") == 2
    assert "headrace up" in capsys.readouterr().err


def test_an_error_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "models", "--json") == 2
    assert "no gateway" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_server_that_does_not_answer_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HEADRACE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_API_KEY", "k")
    monkeypatch.setattr("headrace.http.time.sleep", lambda _: None)
    assert run(monkeypatch, "models") == 3
    assert "does not answer" in capsys.readouterr().err


def test_what_is_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    fail(InvalidInput("params['lr'] and [red] and [/red] never change"), as_json=False)
    table(["reason"], [["steps[last] is [bold]"]])
    told = capsys.readouterr()
    assert "params['lr'] and [red] and [/red] never change" in told.err
    assert "steps[last] is [bold]" in told.out


def test_the_local_stacks_key_is_sent_to_the_local_stack_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = tmp_path / ".headrace"
    (state / "secrets").mkdir(parents=True)
    (state / "stack.json").write_text('{"gateway_url": "http://127.0.0.1:8080"}')
    (state / "secrets" / "admin-key").write_text("hr_local")
    assert connection().token == "hr_local"
    monkeypatch.setenv("HEADRACE_URL", "http://127.0.0.1:8080/")
    assert connection().token == "hr_local"
    monkeypatch.setenv("HEADRACE_URL", "https://elsewhere.example")
    with pytest.raises(NotConfigured, match=r"no key for https://elsewhere\.example"):
        connection()


@pytest.mark.parametrize("command", ["python train.py", '"python"', "[1]"])
def test_a_command_that_is_no_list_of_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    file = tmp_path / "delivery.yaml"
    file.write_text("metadata: {name: d}")
    assert run(monkeypatch, "run", "-f", str(file), "--command", command) == 2
    assert "must be a JSON list of words" in capsys.readouterr().err


def test_logged_lines_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "kafka.log").write_text("one\n")
    (logs / "s3.log").write_text('{"message": "a | b"}\n')
    assert run(monkeypatch, "logs", "--state-dir", str(tmp_path), "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"name": "kafka", "line": "one"}, {"name": "s3", "line": '{"message": "a | b"}'}]
    assert run(monkeypatch, "logs", "--state-dir", str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines() == ["kafka | one", 's3    | {"message": "a | b"}']


def test_an_unknown_command_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "modles") == 2


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("kind: Delivery", "metadata.name")])
def test_run_with_a_broken_delivery_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "delivery.yaml"
    file.write_text(text)
    assert run(monkeypatch, "run", "-f", str(file)) == 2
    assert message in capsys.readouterr().err


def test_a_source_folder_is_packed_without_what_git_ignores(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / ".gitignore").write_text("*.zip\n")
    for name in ("train.py", "new.py", "flights.zip"):
        (source / name).write_text("x")
    subprocess.run(["git", "-C", tmp_path, "add", "source/train.py"], check=True)
    assert [path.name for path in training._files(source)] == ["new.py", "train.py"]


def test_a_source_folder_with_a_holdout_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "april.parquet").write_bytes(b"the exam")
    digest = hashlib.sha256(b"the exam").hexdigest()
    dataset = {"ref": {"name": "flights-holdout", "version": 3}, "blob": {"sha256": digest, "size_bytes": 8}, "holdout": True}

    class Datasets(Client):
        def __init__(self) -> None:
            """No connection: one answer."""

        def get(self, path: str, **params: Any) -> dict[str, Any]:
            return {"datasets": [dataset]}

    with pytest.raises(InvalidInput, match=r"april\.parquet is version 3 of the holdout flights-holdout"):
        training.upload_source(Datasets(), tmp_path)


def test_a_source_folder_is_packed_the_same_each_time_without_what_does_not_belong(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "train.py").write_text("print(1)")
    (source / "sub" / "data.txt").write_text("x")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    (source / "link").symlink_to("/etc/passwd")
    first, second = tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"
    training._pack(source, training._files(source), first)
    (source / "train.py").touch()
    training._pack(source, training._files(source), second)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert tar.getnames() == ["sub/data.txt", "train.py"]
