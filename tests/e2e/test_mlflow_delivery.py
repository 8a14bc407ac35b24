"""What a script logs with the unmodified mlflow client travels to production by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from headrace.datasets import push_dataset

from tests.e2e.world import GOOD, World, model_bytes
from tests.mlflow import clients

SCRIPT = Path(clients.HERE) / "delivered.py"
EXAMPLES = Path(__file__).parents[2] / "examples" / "mlflow"

CHURN = """apiVersion: headrace/v1
kind: Delivery
metadata: {{name: {name}}}
evaluate:
  experiment: {name}
  holdout: {{dataset: {dataset}, version: {version}, label: left}}
  metric: {{name: auc, goal: maximize, margin: 0.05}}
  require: [auc.at_least 0.8, parity]
promote:
  model: {name}
serve:
  endpoint: {name}
  runtime: triton
  rollout:
    window: 250ms
    shadow: {{share: 1.0, requests: 5}}
    steps: [{{weight: 50%, requests: 10}}]
    guards: [{{bad: error, margin: 20%, at_most: 60%}}]
    deadline: 10m
    on_deadline: abort
"""


def churn_holdout(folder: Path) -> Path:
    """Customers of the kind that the examples train on, drawn anew."""
    random = np.random.default_rng(7)
    age, visits = random.normal(45, 12, 2_000), random.normal(8, 3, 2_000)
    left = (random.random(2_000) < 1 / (1 + np.exp(visits - 0.1 * age - 3.5))).astype(np.int64)
    file = folder / "holdout.parquet"
    parquet.write_table(pa.table({"age": age, "visits": visits, "left": left}), file)
    return file


@pytest.mark.parametrize("script", ["train_sklearn.py", "train_torch.py"])
async def test_an_example_that_logs_no_onnx_is_converted_and_delivered(world: World, script: str, tmp_path: Path) -> None:
    holdout = push_dataset("churn-holdout", churn_holdout(tmp_path), holdout=True, client=world.client)
    world.apply(CHURN.format(name=world.name, dataset=holdout.name, version=holdout.version))
    python = clients.of_lock(EXAMPLES / "requirements.lock")
    code, printed, errors = await clients.run(
        python, EXAMPLES / script, world.url, world.key, folder=tmp_path, variables={"EXPERIMENT": world.name}
    )
    assert code == 0, errors[-3_000:]
    run_id = printed.split()[-1]
    # It has the time that installing what converts it takes.
    world.arrives(run_id, "completed", seconds=300)
    rows = [{"name": name, "datatype": "FP32", "shape": [2, 1], "data": data} for name, data in (("age", [20, 70]), ("visits", [12, 2]))]
    wanted = {tensor["name"]: tensor["datatype"] for tensor in world.client.get(f"/v2/models/{world.name}")["inputs"]}
    assert set(wanted) == {"age", "visits"}
    answer = world.infer(json.dumps({"inputs": [{**row, "datatype": wanted[str(row["name"])]} for row in rows]}).encode())
    assert answer.status_code == 200, answer.text
    first = answer.json()["outputs"][0]["data"]
    stays, leaves = first[len(first) // 2 - 1], first[-1]  # of each row the last number is the probability that it leaves
    assert stays < 0.5 < leaves


@pytest.mark.parametrize("client", clients.NAMES)
async def test_a_script_that_knows_mlflow_alone_is_delivered(world: World, client: str, tmp_path: Path) -> None:
    world.apply(world.delivery().replace(", parity]", "]"))  # it logs no answers that could be compared
    (tmp_path / "model.onnx").write_bytes(model_bytes(GOOD))
    code, printed, errors = await clients.run(
        clients.python(client), SCRIPT, world.url, world.key, world.name, str(tmp_path / "model.onnx"), folder=tmp_path
    )
    assert code == 0, errors[-3_000:]
    run_id = printed.split()[-1]
    world.arrives(run_id, "completed")
    answer = world.infer()
    assert (answer.status_code, answer.headers["x-headrace-model-version"]) == (200, "1")
    (version,) = world.versions().values()
    assert version["aliases"] == ["champion"]
    assert version["journey"]["run_id"] == run_id
