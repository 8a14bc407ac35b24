"""A script as people write them for MLflow: it logs, reads back what it logged, and meets errors. Runs in the clients' environments."""

from __future__ import annotations

import json
import math
import sys

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException


def code_of(call: object, *arguments: object, **named: object) -> str:
    """The error code that a call ends with."""
    try:
        call(*arguments, **named)  # type: ignore[operator]
    except MlflowException as error:
        return str(error.error_code)
    return "none"


client = MlflowClient()
experiment_id = mlflow.create_experiment("wine", tags={"team": "red"})
mlflow.set_experiment("wine")
seen: dict[str, object] = {"version": mlflow.__version__}

with mlflow.start_run(run_name="parent", tags={"kind": "study"}, description="what it is for") as parent:
    mlflow.log_params({"depth": 3, "rate": 0.1})
    for step in range(3):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.log_metrics({"auc": 0.7, "odd": math.nan, "high": math.inf})
    mlflow.set_tags({"a": "1", "b": "2"})
    mlflow.delete_tag("b")
    mlflow.log_input(mlflow.data.from_numpy(np.zeros((4, 2)), name="grapes"), context="training")
    with mlflow.start_run(nested=True, run_name="child") as child:
        mlflow.log_metric("loss", 0.5)
    client.log_batch(
        parent.info.run_id,
        metrics=[Metric(f"m{n}", float(n), 1, 0) for n in range(1_500)],
        params=[Param(f"p{n}", "v") for n in range(150)],
        tags=[RunTag(f"t{n}", "v") for n in range(150)],
    )

found = client.get_run(parent.info.run_id)
assert found.info.status == "FINISHED"
assert found.info.end_time >= found.info.start_time
assert found.info.run_name == "parent"
assert found.data.params["depth"] == "3"
assert found.data.metrics["loss"] == 1 / 3
assert math.isnan(found.data.metrics["odd"])
assert found.data.metrics["high"] == sys.float_info.max
assert len(found.data.metrics) == 4 + 1_500
assert len(found.data.params) == 2 + 150
assert found.data.tags["a"] == "1"
assert found.data.tags["mlflow.note.content"] == "what it is for"
assert "b" not in found.data.tags
(grapes,) = found.inputs.dataset_inputs
assert (grapes.dataset.name, [tag.value for tag in grapes.tags]) == ("grapes", ["training"])
assert client.get_run(child.info.run_id).data.tags["mlflow.parentRunId"] == parent.info.run_id

try:
    with mlflow.start_run() as failing:
        raise KeyError("the script fails")
except KeyError:
    assert client.get_run(failing.info.run_id).info.status == "FAILED"

with mlflow.start_run(run_id=parent.info.run_id):
    assert client.get_run(parent.info.run_id).info.status == "RUNNING"
    mlflow.log_metric("later", 1)
client.update_run(parent.info.run_id, name="renamed")
assert client.get_run(parent.info.run_id).info.run_name == "renamed"

seen["changed param"] = code_of(client.log_param, parent.info.run_id, "depth", 4)
seen["bad key"] = code_of(client.log_metric, parent.info.run_id, "a//b", 1)
seen["no run"] = code_of(client.get_run, "0" * 32)
seen["no tag"] = code_of(client.delete_tag, parent.info.run_id, "b")
seen["same name"] = code_of(client.create_experiment, "wine")
seen["location"] = code_of(client.create_experiment, "elsewhere", artifact_location="s3://other/bucket")
client.delete_run(child.info.run_id)
assert client.get_run(child.info.run_id).info.lifecycle_stage == "deleted"
seen["deleted run"] = code_of(client.log_metric, child.info.run_id, "loss", 1)
client.restore_run(child.info.run_id)
client.log_metric(child.info.run_id, "loss", 0.25, step=1)

client.set_experiment_tag(experiment_id, "note", "x" * 5_000)
client.rename_experiment(experiment_id, "wines")
experiment = client.get_experiment(experiment_id)
assert (experiment.name, experiment.tags["team"], len(experiment.tags["note"])) == ("wines", "red", 5_000)
assert experiment.last_update_time >= experiment.creation_time
assert client.get_experiment_by_name("wine") is None
client.delete_experiment(experiment_id)
assert client.get_experiment(experiment_id).lifecycle_stage == "deleted"
seen["deleted experiment"] = code_of(client.create_run, experiment_id)
client.restore_experiment(experiment_id)
assert client.get_run(parent.info.run_id).info.lifecycle_stage == "active"
seen["parent"] = parent.info.run_id
json.dump(seen, sys.stdout)
