"""What the environment of a conversion is made of, and that nothing a converter leaves is believed but its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from servicekit.errors import Invalid
from trainer.packaging import packager


def requirements(folder: Path, text: str, flavour: str = "sklearn") -> list[str]:
    (folder / "requirements.txt").write_text(text)
    return packager.requirements(folder, flavour)


def test_a_model_s_own_versions_and_the_converters(tmp_path: Path) -> None:
    found = requirements(
        tmp_path, "mlflow==3.17.2\n# by hand\nscikit-learn==1.9.1  # of the run\n\ntorch==2.13.0+cu130\nuvicorn[standard]==0.54.0\n"
    )
    assert found[:4] == ["mlflow-skinny==3.17.2", "scikit-learn==1.9.1", "torch==2.13.0", "uvicorn[standard]==0.54.0"]
    assert [name.partition(">")[0] for name in found[4:]] == ["onnx", "onnxruntime", "skl2onnx"]


def test_mlflow_is_there_also_when_the_model_does_not_name_it(tmp_path: Path) -> None:
    assert "mlflow-skinny" in requirements(tmp_path, "xgboost==3.2.0\n", "xgboost")


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.com/simple",
        "-r other.txt",
        "thing @ https://example.com/thing.whl",
        "git+https://example.com/thing",
        "./thing",
        "thing>=1",
        "thing",
        "thing==1.*",
        "thing==1 ; python_version > '3'",
    ],
)
def test_what_is_no_version_of_a_package_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(Invalid, match=r"requirements\.txt, line 2: a version of a package is needed"):
        requirements(tmp_path, f"scikit-learn==1.9.1\n{line}\n")


def test_a_model_without_requirements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="says what it needs"):
        packager.requirements(tmp_path, "sklearn")
    with pytest.raises(Invalid, match="says what it needs"):
        requirements(tmp_path, "#" * (packager.MAX_REQUIREMENTS_BYTES + 1))


GOOD: dict[str, dict[str, str]] = {"signature": {}, "samples": {}, "parity": {}}


@pytest.mark.parametrize(
    ("left", "code", "says"),
    [
        (None, 0, "exit code 0"),
        ("{}", 1, "exit code 1"),
        ("{", 0, "not JSON"),
        ("[" * 100_000, 0, "not JSON"),
        ("[]", 0, "no signature"),
        (json.dumps({**GOOD, "samples": 1}), 0, "no signature"),
        (json.dumps({"refused": "it has no counterpart"}), 3, "it has no counterpart"),
        (json.dumps(GOOD), 0, r"no model\.onnx"),
    ],
)
def test_what_a_converter_left_is_looked_at(tmp_path: Path, left: str | None, code: int, says: str) -> None:
    if left is not None:
        (tmp_path / "package.json").write_text(left)
    with pytest.raises(Invalid, match=says):
        packager._told(tmp_path, code)


def test_a_link_is_no_file_that_came_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(json.dumps(GOOD))
    (tmp_path / "package.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Invalid, match="exit code 0"):
        packager._told(tmp_path, 0)
    (tmp_path / "package.json").unlink()
    (tmp_path / "package.json").write_text(json.dumps(GOOD))
    (tmp_path / "model.onnx").symlink_to("/etc/passwd")
    with pytest.raises(Invalid, match=r"no model\.onnx"):
        packager._told(tmp_path, 0)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert packager._told(tmp_path, 0) == GOOD
