"""What the documents name exists: files and folders, modules and what is in them, and what links lead to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGES = {
    folder.name: folder for folder in (*ROOT.glob("libs/*/src/*"), *ROOT.glob("services/*/src/*")) if (folder / "__init__.py").exists()
}
TOPICS = "headrace"
"""Names under it are topics and metadata of files, more often than modules."""

CODE = re.compile(r"```.*?```|`([^`\n]+)`", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)")
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
SUFFIXES = (".py", ".md", ".toml", ".yml", ".yaml", ".json", ".proto", ".lock")
DOTTED = re.compile(r"([a-z_]+(?:\.\w+)+)(\(.*\))?")


def spans(document: Path) -> list[str]:
    """The pieces of code within the text of a document; blocks of code are for the reader's own shell."""
    return [found[1] for found in CODE.finditer(document.read_text()) if found[1]]


def named_files(document: Path) -> Iterator[str]:
    for span in spans(document):
        if FILE.fullmatch(span) and (span.endswith(SUFFIXES) or span.partition("/")[0] in top_folders()):
            yield span


@cache
def top_folders() -> frozenset[str]:
    return frozenset(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))


@cache
def sources() -> tuple[str, ...]:
    """Every file of the packages, and of the examples, by its path."""
    return tuple(str(path) for folder in (*PACKAGES.values(), ROOT / "examples", ROOT / "tests") for path in folder.rglob("*.*"))


def exists(name: str) -> bool:
    """A path from the top, or the end of the path of a source: `gateway/server.py`, `server.py`."""
    return (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in sources())


def module(name: str) -> tuple[Path, list[str]] | None:
    """The module that a dotted name leads to, and what of the name is left; None when the name is not one of ours."""
    first, *rest = name.split(".")
    if first not in PACKAGES or first == TOPICS:
        return None
    path = PACKAGES[first]
    while rest and (path / rest[0]).is_dir():
        path /= rest.pop(0)
    if rest and (file := path / f"{rest[0]}.py").exists():
        return file, rest[1:]
    return path / "__init__.py", rest


def defines(file: Path, names: list[str]) -> bool:
    """Whether a module has a class, function, method or variable of this name, or passes one on."""
    nodes: list[ast.stmt] = ast.parse(file.read_text()).body
    for name in names:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                nodes = node.body
                break
            if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                break
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                break
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                break
        else:
            return False
    return True


def is_a_text_of(package: str, name: str) -> bool:
    """Whether a package's sources hold it as a text: names of metrics look like those of modules."""
    return any(f'"{name}"' in path.read_text() for path in PACKAGES[package].rglob("*.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_what_a_document_names_exists(document: Path) -> None:
    missing = [name for name in named_files(document) if not exists(name)]
    for span in spans(document):
        if (dotted := DOTTED.fullmatch(span)) and (found := module(dotted[1])):
            file, rest = found
            if not defines(file, rest) and not is_a_text_of(dotted[1].partition(".")[0], dotted[1]):
                missing.append(span)
    for target in LINK.findall(document.read_text()):
        if "://" not in target and not target.startswith("mailto:") and not (document.parent / target).exists():
            missing.append(target)
    assert not missing


@pytest.mark.parametrize(
    "name", ["eventing.relay.Relay.start_over", "eventing.relays", "gateway.control.runs.finish", "tracker.handlers.Tracker.x"]
)
def test_a_name_that_does_not_exist_is_noticed(name: str) -> None:
    found = module(name)
    assert found is not None
    assert not defines(*found)
    assert not exists(name.replace(".", "/") + ".py")


def test_there_is_something_to_look_at() -> None:
    architecture = ROOT / "docs" / "architecture.md"
    assert len([span for span in spans(architecture) if (dotted := DOTTED.fullmatch(span)) and module(dotted[1])]) > 10
    assert len(list(named_files(architecture))) > 10
