"""A script as a training starts it: MLFLOW_RUN_ID names its run, and its key is the token of that run."""

from __future__ import annotations

import sys

import mlflow
from mlflow.exceptions import MlflowException

with mlflow.start_run(run_id=sys.argv[1]) as run:
    mlflow.log_params({"rate": 0.1})
    mlflow.log_metric("loss", 0.5)
    mlflow.set_tag("note", "mine")
try:
    mlflow.MlflowClient().create_run("0")
except MlflowException as error:
    print(error.error_code)
