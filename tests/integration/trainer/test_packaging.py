"""Models that MLflow wrote become ONNX in a real sandbox and answer as before; what cannot says why, and gets out of nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from servicekit.errors import Invalid
from trainer.packaging.packager import Package, Packager, requirements
from trainer.runner.sandbox import Limits
from trainer.runner.venv import Venvs, resolve

PINS = ("mlflow==3.17.2", "scikit-learn==1.9.1", "numpy==2.4.6", "pandas==3.1.1", "cloudpickle==3.1.2")

# What a training script would do, without a run: each model in a folder of its own.
SCRIPT = """
import json, os, socket, sys, time
from pathlib import Path
import mlflow, numpy as np, pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

out, pins = Path(sys.argv[1]), sys.argv[2:]
rng = np.random.default_rng(0)
carriers = rng.choice(["AA", "DL", "UA"], 300)
rows = pd.DataFrame({"hour": rng.integers(0, 24, 300), "miles": rng.uniform(100, 3000, 300), "carrier": carriers})
late = np.where(rows.miles + 50 * rows.hour > 2000, "late", "on time")
matrix = rng.normal(size=(300, 3))

class Custom(ClassifierMixin, BaseEstimator):
    def fit(self, rows, labels):
        self.classes_ = np.array([0, 1])
        return self
    def predict(self, rows):
        return np.zeros(len(rows), dtype=int)
    def predict_proba(self, rows):
        return np.full((len(rows), 2), 0.5)

class Acts(Custom):
    "What it does when it is loaded is told by its exception."
    def __init__(self, act=""):
        self.act = act
    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.act == "reach":
            beside = Path(sys.argv[1]).parent
            secrets = [name for name in os.environ if "HEADRACE" in name]
            found = {"beside": sorted(path.name for path in beside.iterdir()), "secrets": secrets}
            try:
                socket.create_connection((os.environ.get("TARGET", "192.0.2.1"), 80), timeout=2)
                found["network"] = True
            except OSError:
                found["network"] = False
            found["writes"] = []
            for place in (sys.argv[1], sys.prefix, "/usr", os.path.dirname(sys.argv[0])):
                try:
                    Path(place, "x").write_text("x")
                    found["writes"].append(place)
                except OSError:
                    pass
            raise RuntimeError(json.dumps(found))
        if self.act == "sleep":
            time.sleep(600)

columns = ColumnTransformer([("n", StandardScaler(), ["hour", "miles"]), ("c", OneHotEncoder(handle_unknown="ignore"), ["carrier"])])
models = {
    "frame": (Pipeline([("columns", columns), ("trees", GradientBoostingClassifier(n_estimators=5))]).fit(rows, late), rows[:20]),
    "plain": (LogisticRegression().fit(rows[["hour", "miles"]], late), rows[["hour", "miles"]][:20]),
    "array": (make_pipeline(StandardScaler(), LinearRegression()).fit(matrix, matrix[:, 0]), matrix[:20]),
    "blind": (LinearRegression().fit(matrix, matrix[:, 0]), None),
    "gaps": (LinearRegression().fit(matrix, matrix[:, 0]), pd.DataFrame({"a": ["x", None], "b": [1.0, 2.0]})),
    "custom": (Custom(), matrix[:20]),
    "reach": (Acts("reach"), matrix[:20]),
    "sleep": (Acts("sleep"), matrix[:20]),
}
for name, (model, example) in models.items():
    mlflow.sklearn.save_model(
        model, str(out / name), serialization_format="cloudpickle", pip_requirements=pins, input_example=example
    )
    answers = model.predict(example).tolist() if example is not None and name in ("frame", "plain", "array") else []
    (out / f"{name}.json").write_text(json.dumps(answers))
"""


@dataclass(frozen=True)
class Workshop:
    """Where models were written, and what converts them."""

    models: Path
    packager: Packager
    scratch: Path

    async def package(self, name: str, flavours: tuple[str, ...] = ("sklearn", "python_function")) -> Package:
        folder = self.scratch / name
        folder.mkdir()
        printed: list[bytes] = []
        return await self.packager.package(self.models / name, flavours, folder, printed.append)

    def answers(self, name: str) -> list[Any]:
        """What the model itself answered where it was made."""
        return list(json.loads((self.models / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of models and of environments; made once, since installing takes a while."""
    folder = tmp_path_factory.mktemp("packaging")
    models, stated = folder / "models", folder / "stated"
    for made in (models, stated, folder / "lock", folder / "venv"):
        made.mkdir()
    (stated / "requirements.txt").write_text("\n".join(PINS))
    venvs = Venvs(folder / "venvs", 10 * 2**30)

    async def environment() -> Path:
        lock = await resolve(requirements(stated, "sklearn"), folder / "lock", _ignored)
        return await venvs.ensure(lock, folder / "venv", lambda line: None, _ignored)

    python = asyncio.run(environment()) / "bin" / "python"
    script = folder / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run([str(python), str(script), str(models), *PINS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    venvs.close()
    return models, folder / "venvs"


@pytest.fixture
async def workshop(written: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[Workshop]:
    models, kept = written
    venvs = Venvs(kept, 10 * 2**30)
    yield Workshop(models, Packager(venvs, Limits(2 * 2**30, 256 * 2**20, 60)), tmp_path)
    venvs.close()


def _ignored(printed: bytes) -> None:
    """What an installer prints is of no interest here."""


async def test_a_pipeline_on_a_data_frame_takes_its_columns_as_they_were(workshop: Workshop) -> None:
    package = await workshop.package("frame")
    kinds = {one["name"]: (one["datatype"], one["shape"]) for one in package.signature["inputs"]}
    assert kinds == {"hour": ("INT64", [-1, 1]), "miles": ("FP64", [-1, 1]), "carrier": ("BYTES", [-1, 1])}
    # What is judged comes first.
    assert [(one["name"], one["datatype"], one["shape"]) for one in package.signature["outputs"]] == [
        ("probabilities", "FP32", [-1, 2]),
        ("label", "BYTES", [-1]),
    ]
    assert package.samples["outputs"]["label"] == workshop.answers("frame")
    assert package.parity["rows"] == 20
    assert b"skl2onnx==" in package.lock
    # The file alone, in another process's runtime, answers so, too.
    types = {"INT64": np.int64, "FP64": np.float64, "BYTES": object}
    feeds = {
        one["name"]: np.array(package.samples["inputs"][one["name"]], dtype=types[one["datatype"]]) for one in package.signature["inputs"]
    }
    session = ort.InferenceSession(package.file.read_bytes(), providers=["CPUExecutionProvider"])
    assert session.run(["label"], feeds)[0].tolist() == workshop.answers("frame")
    assert [output.shape[0] for output in session.get_outputs()] == ["batch", "batch"]


async def test_an_estimator_that_looks_at_no_names_gets_its_columns_joined(workshop: Workshop) -> None:
    package = await workshop.package("plain")
    assert [(one["name"], one["datatype"]) for one in package.signature["inputs"]] == [("hour", "INT64"), ("miles", "FP64")]
    assert package.samples["outputs"]["label"] == workshop.answers("plain")


async def test_a_regression_on_an_array(workshop: Workshop) -> None:
    package = await workshop.package("array")
    assert package.signature["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}]
    (values,) = package.samples["outputs"].values()
    assert [row[0] for row in values] == pytest.approx(workshop.answers("array"), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blind", "without an input example"),
        ("gaps", "its column a holds"),
        ("custom", "cannot be converted from sklearn: .*Custom"),
    ],
)
async def test_what_cannot_be_converted_says_why(workshop: Workshop, name: str, says: str) -> None:
    with pytest.raises(Invalid, match=says):
        await workshop.package(name)


async def test_a_flavour_that_nobody_converts_is_named(workshop: Workshop) -> None:
    with pytest.raises(Invalid, match="it was logged as spark, python_function; what can be converted are sklearn"):
        await workshop.package("array", ("spark", "python_function"))


async def test_what_a_pickle_runs_reaches_nothing(workshop: Workshop) -> None:
    with pytest.raises(Invalid, match="RuntimeError") as refused:
        await workshop.package("reach")
    found = json.loads(refused.value.message.partition("RuntimeError: ")[2])
    assert (found["network"], found["secrets"]) == (False, [])
    # Beside its script it may write: that folder is the sandbox's own, and gone with it.
    assert not {str(workshop.models / "reach"), "/usr"} & set(found["writes"])
    assert len(found["writes"]) <= 1
    # Of the folder that the model lies in it sees nothing else.
    assert found["beside"] == ["reach"]


async def test_what_takes_too_long_is_stopped(written: tuple[Path, Path], tmp_path: Path) -> None:
    models, kept = written
    venvs = Venvs(kept, 10 * 2**30)
    try:
        with pytest.raises(Invalid, match="the conversion was stopped"):
            await Packager(venvs, Limits(2 * 2**30, 256 * 2**20, 5)).package(models / "sleep", ("sklearn",), tmp_path, _ignored)
    finally:
        venvs.close()
