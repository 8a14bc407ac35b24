"""What a person then finds at MLflow's page: two runs, their models, a registered version. Runs in the clients' environments."""

from __future__ import annotations

import json
import sys

import mlflow
from mlflow import MlflowClient

name = sys.argv[1]
client = MlflowClient()
if len(sys.argv) > 2:  # what the page has changed, read back
    version = client.get_model_version_by_alias(name, "blue")
    print(json.dumps({"version": version.version, "tags": version.tags}))
    sys.exit()
experiment = mlflow.create_experiment(name)
mlflow.set_experiment(name)
runs = []
for number in range(2):
    with mlflow.start_run(run_name=f"{name}-run-{number}") as run:
        mlflow.log_param("depth", 3 + number)
        for step in range(5):
            mlflow.log_metric("loss", 1 / (step + 1 + number), step=step)
        mlflow.log_text("hello from the script", "notes/hello.txt")
        made = mlflow.initialize_logged_model(name=f"{name}-model-{number}")
        mlflow.finalize_logged_model(made.model_id, "READY")
        runs.append(run.info.run_id)
schema = '[{"name": "hour_of_day", "type": "long", "required": true}]'
client.log_text(runs[0], f"flavors: {{python_function: {{}}}}\nsignature:\n  inputs: '{schema}'\n", "notes/MLmodel")
client.create_registered_model(name)
client.create_model_version(name, f"runs:/{runs[0]}/notes", runs[0])
print(json.dumps({"experiment": experiment, "runs": runs}))
