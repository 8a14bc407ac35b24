"""What each Dockerfile installs and copies is enough to run: the same files in a folder of their own, and Python that sees nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.markers import Marker

ROOT = Path(__file__).parents[3]
SERVICES = ("tracker", "registry", "trainer", "evaluator", "deployer", "gateway")


def link_packages(lock: Path, site: Path) -> None:
    """Makes `site` a site-packages with exactly what a lock names, of links into the environment of the tests (with its bytecode)."""
    for name, version, marker in re.findall(r"^([\w.-]+)==([^\s;\\]+)\s*(;[^\\\n]*)?", lock.read_text(), re.MULTILINE):
        if marker and not Marker(marker.removeprefix(";")).evaluate():
            continue
        found = distribution(name)
        assert found.version == version, f"{name}: the environment has {found.version}"
        for file in found.files or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            original, link = Path(str(found.locate_file(file))), site / file
            if not link.parent.exists():
                link.parent.mkdir(parents=True)
                if (bytecode := original.parent / "__pycache__").is_dir() and len(file.parts) > 1:
                    (link.parent / "__pycache__").symlink_to(bytecode)
            if not link.exists():
                link.symlink_to(original)


class Image:
    """What the first stage of a Dockerfile makes, below a folder."""

    def __init__(self, dockerfile: Path, app: Path) -> None:
        self._app = app
        text = dockerfile.read_text()
        for source, target in re.findall(r"^COPY (?!--from)(\S+) (\S+)$", text, re.MULTILINE):
            place = app / (Path(source).name if target == "./" else target.lstrip("/"))
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / source, place)
        lock = re.search(r"--compile-bytecode (\S+)", text)
        assert lock is not None
        link_packages(app / lock[1], app / "site")
        self._path = [app / "site", *app.glob("libs/*/src"), *app.glob("services/*/src")]

    def run(self, *arguments: str, folder: str = ".") -> str:
        """What a Python says that sees the image alone (-S: no site-packages of its own)."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, self._path)), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=self._app / folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_from_its_image(service: str, tmp_path: Path) -> None:
    image = Image(ROOT / "services" / service / "Dockerfile", tmp_path)
    # All that it imports, its settings, and its migrations where it looks for them.
    program = f"""
import runpy, sys
import {service}.bootstrap as bootstrap
print(bootstrap.__file__, getattr(bootstrap, "MIGRATIONS", "-"))
sys.argv = ["{service}", "settings"]
runpy.run_module("{service}", run_name="__main__")
"""
    first, *table = image.run("-c", program).splitlines()
    module, migrations = first.split()
    assert module.startswith(str(tmp_path)), "it is the copy that runs"
    assert migrations == "-" or list((Path(migrations) / "versions").glob("*.py"))
    assert any("HEADRACE_GRPC_ADDRESS" in row for row in table)


def test_the_set_up_job_starts_from_its_image(tmp_path: Path) -> None:
    image = Image(ROOT / "deploy" / "compose" / "Dockerfile", tmp_path)
    assert "--postgres HOST:PORT" in image.run("deploy/compose/init.py", "--help")
    program = "import init; print(*(init.ROOT / 'services' / name / 'migrations' / 'versions' for name in init.SERVICES))"
    folders = image.run("-c", program, folder="deploy/compose").split()
    assert len(folders) == 5
    assert all(list(Path(folder).glob("*.py")) for folder in folders)
