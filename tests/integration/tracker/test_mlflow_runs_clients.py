"""Unmodified MLflow clients, the newest and the last before MLflow 3, against the tracker behind the gateway's door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from contracts.tracker.v1 import service_pb2 as pb

from tests.mlflow import clients

SCRIPTS = Path(clients.__file__).parent


@pytest.fixture(scope="session", params=clients.NAMES)
def interpreter(request: pytest.FixtureRequest) -> Path:
    return clients.python(request.param)


async def test_a_script_logs_and_reads_back_what_it_logged(door: Any, interpreter: Path, tmp_path: Path) -> None:
    code, output, errors = await clients.run(interpreter, SCRIPTS / "runs.py", door.url, "key-of-ada", folder=tmp_path)
    assert code == 0, errors
    seen = json.loads(output[output.index("{") :])
    parent = seen.pop("parent")
    assert seen.pop("version") in ("3.17.2", "2.22.0")
    assert seen == {
        "changed param": "INVALID_PARAMETER_VALUE",
        "bad key": "INVALID_PARAMETER_VALUE",
        "no run": "RESOURCE_DOES_NOT_EXIST",
        "no tag": "RESOURCE_DOES_NOT_EXIST",
        "same name": "RESOURCE_ALREADY_EXISTS",
        "location": "INVALID_PARAMETER_VALUE",
        "deleted run": "INVALID_PARAMETER_VALUE",
        "deleted experiment": "INVALID_PARAMETER_VALUE",
    }
    assert (await door.run(parent))["info"]["user_id"] == "ada"


async def test_a_script_of_a_training_logs_with_its_token_and_does_not_end_its_run(door: Any, interpreter: Path, tmp_path: Path) -> None:
    stub = door.running.stub("trainer")
    request = pb.CreateRunRequest(experiment_id=0, user="ada", fencing_token=1)
    request.source.training_id = "training-1"
    made = await stub.CreateRun(request)
    run_id = made.run.run_id
    code, output, errors = await clients.run(interpreter, SCRIPTS / "training.py", door.url, made.run_token, run_id, folder=tmp_path)
    assert code == 0, errors
    assert output.strip().endswith("PERMISSION_DENIED")
    run = await door.run(run_id)
    assert run["info"]["status"] == "RUNNING"
    assert [one["value"] for one in run["data"]["metrics"]] == [0.5]
    await stub.FinishRun(pb.FinishRunRequest(run_id=run_id, status="FINISHED", fencing_token=1))


async def test_a_script_without_a_key_is_told_so(door: Any, interpreter: Path, tmp_path: Path) -> None:
    code, _, errors = await clients.run(interpreter, SCRIPTS / "runs.py", door.url, "a key that nobody has", folder=tmp_path)
    assert code != 0
    assert "UNAUTHENTICATED: this API key is not known" in errors
