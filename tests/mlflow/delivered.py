"""A training script as it would be anywhere: it tracks with MLflow, logs an ONNX model, and knows of nothing else."""

from __future__ import annotations

import sys

import mlflow
import onnx

experiment, file = sys.argv[1:]
mlflow.set_experiment(experiment)
with mlflow.start_run() as run:
    mlflow.log_params({"layers": 1, "kind": "logistic"})
    for step in range(5):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    # Its interface has names of its own: in MLflow 3 it is `name`, before it was `artifact_path`.
    place = "name" if int(mlflow.__version__.partition(".")[0]) >= 3 else "artifact_path"
    mlflow.onnx.log_model(onnx.load(file), **{place: "model"}, pip_requirements=["onnxruntime"])
print(run.info.run_id)
