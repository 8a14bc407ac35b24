"""A store of experiments as somebody who uses MLflow has it: `make NAME` makes one, `tell NAME` prints all that it holds, ids left out."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, ViewType

LOGGED_MODELS = int(mlflow.__version__.split(".")[0]) >= 3
OURS = ("headrace.", "mlflow.parentRunId")


def make(client: MlflowClient, name: str) -> None:
    experiment = client.create_experiment(name, tags={"team": "é\nx"})
    run = client.create_run(experiment, run_name="parent", tags={"a": "b", "text": "ü\nline 2"}, start_time=1_600_000_000_000)
    run_id = run.info.run_id
    for start in (0, 1_000, 2_000):
        client.log_batch(run_id, [Metric("loss", 1 / (step + 1), 1_600_000_000_000 + step, step) for step in range(start, start + 1_000)])
    client.log_batch(
        run_id,
        [Metric("n/an", float("nan"), 1, 0), Metric("big", 1e300, 1, 0), Metric("below", -2.5, 2, -3), Metric("acc", 0.5, 5, 1)],
        [Param("p/q", "v w\nx"), Param("lr", "0.1")],
    )
    files = Path("files")
    (files / "d").mkdir(parents=True)
    (files / "x.txt").write_text("hello")
    (files / "d" / "ü y.bin").write_bytes(bytes(range(256)) * 1_000)
    client.log_artifacts(run_id, str(files), "model")
    read = Dataset("ds", "abc123", "local", '{"uri": "file:///x"}', schema='{"a": 1}', profile='{"n": 2}')
    client.log_inputs(run_id, [DatasetInput(read, [InputTag("mlflow.data.context", "train")])])
    child = client.create_run(experiment, run_name="child", tags={"mlflow.parentRunId": run_id}, start_time=1_600_000_000_001)
    client.set_terminated(child.info.run_id, "FAILED", end_time=1_600_000_000_500)
    deleted = client.create_run(experiment, run_name="deleted", start_time=1_600_000_000_002)
    client.log_metric(deleted.info.run_id, "m", 1.0, 3, 4)
    client.delete_run(deleted.info.run_id)
    if LOGGED_MODELS:
        from mlflow.entities import LoggedModelOutput

        model = client.create_logged_model(experiment, "model", run_id, {"t": "1"}, {"k": "v"}, "agent")
        about = {"model_id": model.model_id, "dataset_name": "ds", "dataset_digest": "abc123", "run_id": run_id}
        # Step 0: MLflow's file store reads no other of a point that is about a data set.
        client.log_batch(run_id, [Metric("judged", 0.5, 5, 0, **about)])
        client.log_model_artifacts(model.model_id, str(files))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 2)])
    client.set_terminated(run_id, "FINISHED", end_time=1_600_000_009_999)
    client.create_registered_model(name, tags={"z": "1"}, description="what it is")
    version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run_id, tags={"q": "w"}, description="the first")
    client.set_registered_model_alias(name, "best", version.version)
    gone = client.create_experiment(f"{name}-gone")
    client.set_terminated(client.create_run(gone, run_name="of-gone", start_time=1_600_000_000_003).info.run_id, end_time=1_600_000_000_004)
    client.delete_experiment(gone)


def tell(client: MlflowClient, name: str) -> dict[str, Any]:
    told = {}
    for wanted in (name, f"{name}-gone"):
        experiment = client.get_experiment_by_name(wanted)
        runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL) if wanted == name else []
        tags = {key: value for key, value in experiment.tags.items() if not key.startswith(OURS)}
        told[wanted] = {"stage": experiment.lifecycle_stage, "tags": tags, "runs": {run.info.run_name: of_run(client, run) for run in runs}}
        if LOGGED_MODELS and wanted == name:
            told["models"] = {one.name: of_model(client, one) for one in client.search_logged_models([experiment.experiment_id])}
    registered = client.get_registered_model(name)
    versions = {}
    for one in client.search_model_versions(f"name = '{name}'"):
        tags = {key: value for key, value in one.tags.items() if not key.startswith(OURS)}
        source = one.source.rpartition("artifacts")[2]
        versions[int(one.version)] = [one.description, tags, source, client.get_run(one.run_id).info.run_name]
    aliases = {alias: int(version) for alias, version in registered.aliases.items()}
    told["registered"] = {"description": registered.description, "tags": registered.tags, "aliases": aliases, "versions": versions}
    return told


def of_run(client: MlflowClient, run: Any) -> dict[str, Any]:
    info, data = run.info, run.data
    history = {
        key: sorted(repr((m.step, m.timestamp, m.value)) for m in client.get_metric_history(info.run_id, key)) for key in data.metrics
    }
    parent = data.tags.get("mlflow.parentRunId")
    # Who made a run is who brought it.
    tags = {key: value for key, value in data.tags.items() if not key.startswith(OURS)}
    datasets = [
        [
            one.dataset.name,
            one.dataset.digest,
            one.dataset.source,
            one.dataset.schema,
            one.dataset.profile,
            {t.key: t.value for t in one.tags},
        ]
        for one in run.inputs.dataset_inputs
    ]
    outputs = [one.step for one in run.outputs.model_outputs] if LOGGED_MODELS and run.outputs else []
    return {
        "info": [info.status, info.start_time, info.end_time or None, info.lifecycle_stage],
        "params": data.params,
        "tags": tags,
        "history": history,
        "parent": parent and client.get_run(parent).info.run_name,
        "datasets": datasets,
        "outputs": outputs,
        "files": files_of(lambda path: client.list_artifacts(info.run_id, path), f"runs:/{info.run_id}"),
    }


def of_model(client: MlflowClient, model: Any) -> dict[str, Any]:
    metrics = sorted([m.key, m.value, m.step, m.timestamp, m.dataset_name, m.dataset_digest] for m in model.metrics or [])
    tags = {key: value for key, value in model.tags.items() if not key.startswith(OURS)}
    where = model.artifact_location
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files = files_of(get_artifact_repository(where).list_artifacts, where)
    return {"tags": tags, "params": model.params, "type": model.model_type, "status": str(model.status), "metrics": metrics, "files": files}


def files_of(listed: Any, where: str) -> dict[str, Any]:
    found, folders = {}, [None]
    while folders:
        for one in listed(folders.pop()):
            if one.is_dir:
                folders.append(one.path)
            else:
                local = mlflow.artifacts.download_artifacts(f"{where}/{one.path}")
                found[one.path] = hashlib.sha256(Path(local).read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    asked, name = sys.argv[1:]
    if asked == "make":
        make(MlflowClient(), name)
    else:
        print(json.dumps(tell(MlflowClient(), name), sort_keys=True))
