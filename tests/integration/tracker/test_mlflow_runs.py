"""Runs on MLflow's wire, by plain HTTP through the gateway's door: made, ended and reopened with the right events, deleted, restored."""

from __future__ import annotations

import asyncio
from typing import Any

from contracts.tracker.v1 import events_pb2
from contracts.tracker.v1 import service_pb2 as pb
from servicekit import db
from sqlalchemy import text

MISSING = "0" * 32


async def events(door: Any, run_id: str) -> list[tuple[str, int, bytes]]:
    """What the outbox holds for a run, in order."""
    engine = db.create_engine(door.running.settings.database_url)
    async with engine.connect() as conn:
        rows = await conn.execute(
            text("SELECT type, sequence, payload FROM tracker.outbox WHERE key = :key ORDER BY sequence"), {"key": run_id}
        )
        found = [(row.type, row.sequence, bytes(row.payload)) for row in rows]
    await engine.dispose()
    return found


async def kinds(door: Any, run_id: str) -> list[tuple[str, int]]:
    return [(kind, sequence) for kind, sequence, _ in await events(door, run_id)]


async def new_run(door: Any, key: str = "key-of-ada", **fields: Any) -> str:
    made = await door.post("/runs/create", {"experiment_id": "0", **fields}, key)
    return str(made["run"]["info"]["run_id"])


async def trained_run(door: Any) -> tuple[str, str]:
    """A run that a training started, and its token."""
    source = pb.CreateRunRequest().source
    source.training_id = "training-1"
    made = await door.running.stub("trainer").CreateRun(pb.CreateRunRequest(experiment_id=0, user="ada", source=source, fencing_token=1))
    return made.run.run_id, made.run_token


async def test_a_run_is_made_as_a_client_describes_it_and_by_whom_the_key_says(door: Any) -> None:
    tags = [
        {"key": "mlflow.user", "value": "root"},
        {"key": "mlflow.source.name", "value": "train.py"},
        {"key": "mlflow.source.git.commit", "value": "c0ffee"},
        {"key": "note", "value": "first"},
        {"key": "note", "value": "second"},
    ]
    asked = {"experiment_id": "0", "user_id": "mallory", "run_name": "blue", "start_time": 1_700_000_000_000, "tags": tags}
    made = (await door.post("/runs/create", asked))["run"]
    run_id = made["info"]["run_id"]
    assert made["info"] == {
        "run_id": run_id,
        "run_uuid": run_id,
        "run_name": "blue",
        "experiment_id": "0",
        "user_id": "ada",
        "status": "RUNNING",
        "start_time": 1_700_000_000_000,
        "artifact_uri": f"mlflow-artifacts:/0/{run_id}/artifacts",
        "lifecycle_stage": "active",
    }
    assert {tag["key"]: tag["value"] for tag in made["data"]["tags"]} == {
        "mlflow.user": "root",
        "mlflow.source.name": "train.py",
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.runName": "blue",
        "note": "second",
    }
    assert await door.run(run_id) == made
    child = await new_run(door, tags=[{"key": "mlflow.parentRunId", "value": run_id}, {"key": "mlflow.runName", "value": "green"}])
    assert (await door.run(child))["info"]["run_name"] == "green"
    for one in (run_id, child):
        await door.post("/runs/update", {"run_id": one, "status": "FINISHED"})
    told = [events_pb2.RunFinished.FromString((await events(door, one))[1][2]) for one in (run_id, child)]
    assert (told[0].source.commit, told[0].source.command, told[0].run_name, told[0].user) == ("c0ffee", "train.py", "blue", "ada")
    assert [one.parent_run_id for one in told] == ["", run_id]


async def test_a_run_has_a_name_that_its_tag_says_too(door: Any) -> None:
    run_id = await new_run(door)

    async def names() -> tuple[str, str]:
        run = await door.run(run_id)
        return run["info"]["run_name"], {tag["key"]: tag["value"] for tag in run["data"]["tags"]}["mlflow.runName"]

    name, tag = await names()
    assert name == tag != ""
    answer = await door.post("/runs/update", {"run_id": run_id, "run_name": "by update"})
    assert answer["run_info"]["run_name"] == "by update"
    assert await names() == ("by update", "by update")
    await door.post("/runs/set-tag", {"run_uuid": run_id, "key": "mlflow.runName", "value": "by tag"})
    assert await names() == ("by tag", "by tag")
    await door.post("/runs/log-batch", {"run_id": run_id, "tags": [{"key": "mlflow.runName", "value": "by batch"}]})
    assert await names() == ("by batch", "by batch")
    both = {"experiment_id": "0", "run_name": "one", "tags": [{"key": "mlflow.runName", "value": "other"}]}
    status, code, message = await door.refused("/runs/create", both)
    assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
    assert "different values" in message


async def test_an_end_is_told_once_however_often_it_is_said(door: Any) -> None:
    run_id = await new_run(door)
    end = {"run_id": run_id, "status": "FINISHED", "end_time": 1_800_000_000_000}
    answers = await asyncio.gather(*(door.post("/runs/update", end) for _ in range(8)))
    assert {answer["run_info"]["status"] for answer in answers} == {"FINISHED"}
    assert {answer["run_info"]["end_time"] for answer in answers} == {1_800_000_000_000}
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": 1_800_000_000_500, "run_name": "late"})
    info = (await door.run(run_id))["info"]
    assert (info["run_name"], info["end_time"]) == ("late", 1_800_000_000_500)
    assert await kinds(door, run_id) == [("run.started", 1), ("run.finished", 2)]


async def test_a_run_that_goes_on_after_its_end_ends_again_as_the_next_event(door: Any) -> None:
    run_id = await new_run(door)
    await door.post("/runs/update", {"run_id": run_id, "status": "FAILED"})
    again = await door.post("/runs/update", {"run_id": run_id, "status": "RUNNING"})
    assert again["run_info"]["status"] == "RUNNING"
    assert "end_time" not in again["run_info"]
    assert await kinds(door, run_id) == [("run.started", 1), ("run.failed", 2)]
    await door.post("/runs/log-metric", {"run_id": run_id, "key": "later", "value": 1.0, "timestamp": 1})
    await door.post("/runs/update", {"run_id": run_id, "status": 3})
    assert await kinds(door, run_id) == [("run.started", 1), ("run.failed", 2), ("run.finished", 3)]
    told = events_pb2.RunFinished.FromString((await events(door, run_id))[2][2])
    assert dict(told.metrics) == {"later": 1.0}
    # From one end to another is an end too, without a RUNNING between them.
    await door.post("/runs/update", {"run_id": run_id, "status": "KILLED"})
    assert await kinds(door, run_id) == [("run.started", 1), ("run.failed", 2), ("run.finished", 3), ("run.failed", 4)]
    scheduled = await door.post("/runs/update", {"run_id": run_id, "status": "SCHEDULED"})
    assert scheduled["run_info"]["status"] == "SCHEDULED"


async def test_a_reopened_run_does_not_expire_by_the_lease_that_it_had(door: Any) -> None:
    stub = door.running.stub("trainer")
    made = await stub.CreateRun(pb.CreateRunRequest(experiment_id=0, user="ada", lease_seconds=1))
    run_id = made.run.run_id
    await stub.FinishRun(pb.FinishRunRequest(run_id=run_id, status="FINISHED"))
    await door.post("/runs/update", {"run_id": run_id, "status": "RUNNING"})
    engine = db.create_engine(door.running.settings.database_url)
    async with engine.connect() as conn:
        row = (await conn.execute(text("SELECT lease_seconds, lease_expires_at FROM tracker.run WHERE run_id = :id"), {"id": run_id})).one()
    await engine.dispose()
    assert tuple(row) == (0, None)


async def test_the_trainer_alone_ends_the_run_of_a_training(door: Any) -> None:
    run_id, token = await trained_run(door)
    said = await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": 5, "run_name": "mine"}, token)
    assert (said["run_info"]["status"], said["run_info"]["run_name"]) == ("RUNNING", "mine")
    status, code, message = await door.refused("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    assert (status, code) == (403, "PERMISSION_DENIED")
    assert "cancel the training" in message
    assert "cancel training" in (await door.refused("/runs/delete", {"run_id": run_id}))[2]
    assert "training" in (await door.refused("/experiments/delete", {"experiment_id": "0"}))[2]
    # The source is what the trainer says.
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "mlflow.source.git.commit", "value": "forged"}, token)
    await door.running.stub("trainer").FinishRun(pb.FinishRunRequest(run_id=run_id, status="FINISHED", fencing_token=1))
    assert events_pb2.RunFinished.FromString((await events(door, run_id))[1][2]).source.commit == ""
    await door.post("/runs/delete", {"run_id": run_id})
    assert (await door.run(run_id))["info"]["lifecycle_stage"] == "deleted"


async def test_a_run_token_ends_its_run_and_does_not_reopen_it(door: Any) -> None:
    made = await door.running.stub("trainer").CreateRun(pb.CreateRunRequest(experiment_id=0, user="ada"))
    run_id, token = made.run.run_id, made.run_token
    for _ in range(2):
        await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": 7}, token)
    for status in ("RUNNING", "FAILED"):
        assert (await door.refused("/runs/update", {"run_id": run_id, "status": status}, token))[0] == 400
    assert (await door.refused("/runs/update", {"run_id": run_id, "run_name": "late"}, token))[0] == 400
    assert await kinds(door, run_id) == [("run.started", 1), ("run.finished", 2)]
    other = await new_run(door)
    assert (await door.refused("/runs/update", {"run_id": other, "status": "FINISHED"}, token))[:2] == (403, "PERMISSION_DENIED")


async def test_a_deleted_run_takes_nothing_until_it_is_restored(door: Any) -> None:
    run_id = await new_run(door)
    await door.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 1, "timestamp": 1})
    for _ in range(2):
        await door.post("/runs/delete", {"run_id": run_id})
    assert (await door.run(run_id))["info"]["lifecycle_stage"] == "deleted"
    dataset = {"name": "d", "digest": "1", "source_type": "local", "source": "{}"}
    bodies: dict[str, dict[str, Any]] = {
        "log-metric": {"key": "loss", "value": 2, "timestamp": 2},
        "log-parameter": {"key": "lr", "value": "1"},
        "log-batch": {"params": [{"key": "lr", "value": "1"}]},
        "set-tag": {"key": "a", "value": "b"},
        "delete-tag": {"key": "mlflow.runName"},
        "update": {"status": "FINISHED"},
        "log-inputs": {"datasets": [{"dataset": dataset}]},
        "outputs": {"models": [{"model_id": "m-1", "step": 0}]},
        "log-model": {"model_json": '{"artifact_path": "m", "flavors": {}, "utc_time_created": "", "run_id": ""}'},
    }
    for path, body in bodies.items():
        status, code, message = await door.refused(f"/runs/{path}", {"run_id": run_id, **body})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE"), path
        assert "must be in the 'active' state" in message
    assert await kinds(door, run_id) == [("run.started", 1)]
    for _ in range(2):
        await door.post("/runs/restore", {"run_id": run_id})
    await door.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 2, "timestamp": 2, "step": 1})
    run = await door.run(run_id)
    assert run["info"]["lifecycle_stage"] == "active"
    assert run["data"]["metrics"] == [{"key": "loss", "value": 2.0, "timestamp": 2, "step": 1}]
    assert run["data"]["params"] == []


async def test_a_run_that_is_not_there_is_told_so(door: Any) -> None:
    for path in ["update", "delete", "restore", "log-metric", "log-parameter", "set-tag", "delete-tag", "log-batch"]:
        body = {"key": "k", "value": "1", "timestamp": 1, "status": "FINISHED"}
        assert (await door.refused(f"/runs/{path}", {"run_id": MISSING, **body}))[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
        status, code, message = await door.refused(f"/runs/{path}", body)
        assert (status, code, message) == (400, "INVALID_PARAMETER_VALUE", "Missing value for required parameter 'run_id'.")


async def test_a_run_that_is_described_badly_is_not_made(door: Any) -> None:
    for body, what in [
        ({"experiment_id": "99"}, "there is no experiment 99"),
        ({"experiment_id": "one"}, "experiment_id"),
        ({"experiment_id": "-1"}, "experiment_id"),
        ({"experiment_id": "9" * 40}, "experiment_id"),
        ({"experiment_id": "٣"}, "experiment_id"),
        ({"run_name": "n" * 501}, "name"),
        ({"run_name": "nul\x00"}, "name"),
        ({"start_time": -1}, "started_ms"),
        ({"start_time": 2**63}, "started_ms"),
        ({"start_time": "soon"}, "start_time"),
        ({"tags": [{"key": "k" * 251, "value": "v"}]}, "tags"),
        ({"tags": [{"key": "", "value": "v"}]}, "tags"),
        ({"tags": [{"key": f"k{n}", "value": "v"} for n in range(101)]}, "at most 100"),
        ({"tags": "many"}, "tags"),
    ]:
        status, code, message = await door.refused("/runs/create", body)
        assert (status, code) in ((400, "INVALID_PARAMETER_VALUE"), (404, "RESOURCE_DOES_NOT_EXIST"))
        assert what in message
        engine = db.create_engine(door.running.settings.database_url)
        async with engine.connect() as conn:
            assert (await conn.execute(text("SELECT count(*) FROM tracker.run"))).scalar_one() == 0
        await engine.dispose()


async def test_a_run_that_is_changed_badly_stays_as_it_is(door: Any) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"status": "DONE"}, "status"),
        ({"status": 6}, "status"),
        ({"status": True}, "status"),
        ({"status": "FINISHED", "end_time": -1}, "end_time"),
        ({"status": "FINISHED", "end_time": 10**18}, "end_time"),
        ({"run_name": "n" * 501}, "run_name"),
    ]
    for body, what in cases:
        run_id = await new_run(door)
        before = await door.run(run_id)
        status, code, message = await door.refused("/runs/update", {"run_id": run_id, **body})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert what in message
        assert await door.run(run_id) == before


async def test_inputs_and_outputs_are_kept_once(door: Any) -> None:
    run_id = await new_run(door)
    dataset = {"name": "wine", "digest": "abc", "source_type": "http", "source": "http://169.254.169.254/", "schema": "{}", "profile": "p"}
    other = {"name": "wine", "digest": "def", "source_type": "local", "source": "file:///etc/passwd"}
    context = [{"key": "mlflow.data.context", "value": "training"}]
    asked = {
        "run_id": run_id,
        "datasets": [{"dataset": dataset, "tags": context}, {"dataset": other}, {"dataset": {**dataset, "profile": "another"}}],
        "models": [{"model_id": "m-1"}],
    }
    for _ in range(2):
        await door.post("/runs/log-inputs", asked)
        await door.post("/runs/outputs", {"run_id": run_id, "models": [{"model_id": "m-2", "step": 3}, {"model_id": "m-2", "step": 4}]})
    run = await door.run(run_id)
    assert run["inputs"] == {
        "dataset_inputs": [{"tags": context, "dataset": dataset}, {"tags": [], "dataset": other}],
        "model_inputs": [{"model_id": "m-1"}],
    }
    assert run["outputs"] == {"model_outputs": [{"model_id": "m-2", "step": 3}, {"model_id": "m-2", "step": 4}]}
    second = await new_run(door)
    await door.post("/runs/log-inputs", {"run_id": second, "datasets": [{"dataset": {**dataset, "source": "elsewhere"}}]})
    assert (await door.run(second))["inputs"]["dataset_inputs"][0]["dataset"] == dataset


async def test_inputs_that_are_described_badly_are_refused_whole(door: Any) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("log-inputs", {"datasets": [{"tags": []}]}, "datasets[0].dataset.name"),
        ("log-inputs", {"datasets": [{"dataset": {"name": "d" * 501, "digest": "1", "source_type": "s", "source": "s"}}]}, "name"),
        ("log-inputs", {"datasets": [{"dataset": {"name": "d", "digest": "1" * 37, "source_type": "s", "source": "s"}}]}, "digest"),
        ("log-inputs", {"datasets": [{"dataset": {"name": "d", "digest": "1", "source_type": "s", "source": "s" * 65_536}}]}, "source"),
        ("log-inputs", {"datasets": [{"dataset": {"name": "d\x00", "digest": "1", "source_type": "s", "source": "s"}}]}, "name"),
        (
            "log-inputs",
            {
                "datasets": [
                    {"dataset": {"name": "d", "digest": "1", "source_type": "s", "source": "s"}, "tags": [{"key": "k", "value": "v" * 501}]}
                ]
            },
            "tags",
        ),
        ("log-inputs", {"models": [{"model_id": ""}]}, "models[0].model_id"),
        ("outputs", {"models": []}, "models"),
        ("outputs", {"models": [{"model_id": "m" * 251}]}, "models[0].model_id"),
        ("outputs", {"models": [{"model_id": "m", "step": 2**63}]}, "step"),
        ("outputs", {"models": [{"model_id": f"m{n}"} for n in range(1_001)]}, "at most 1000"),
        ("log-model", {}, "model_json"),
        ("log-model", {"model_json": "{"}, "not a valid JSON"),
        ("log-model", {"model_json": "[" * 100_000}, "not a valid JSON"),
        ("log-model", {"model_json": "[]"}, "mandatory fields"),
        ("log-model", {"model_json": '{"artifact_path": "m"}'}, "flavors, utc_time_created, run_id"),
    ]
    for path, body, what in cases:
        run_id = await new_run(door)
        status, code, message = await door.refused(f"/runs/{path}", {"run_id": run_id, **body})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert what in message
        run = await door.run(run_id)
        assert run["inputs"] == {"dataset_inputs": [], "model_inputs": []}
        assert run["outputs"] == {"model_outputs": []}


async def test_the_models_of_older_clients_are_a_list_in_a_tag(door: Any) -> None:
    run_id = await new_run(door)
    models = [f'{{"artifact_path": "m{n}", "flavors": {{}}, "utc_time_created": "now", "run_id": "{run_id}"}}' for n in range(2)]
    for model in (models[0], models[0], models[1]):
        await door.post("/runs/log-model", {"run_id": run_id, "model_json": model})
    tags = {tag["key"]: tag["value"] for tag in (await door.run(run_id))["data"]["tags"]}
    assert tags["mlflow.log-model.history"].count("artifact_path") == 2
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "mlflow.log-model.history", "value": "no list"})
    assert "delete it first" in (await door.refused("/runs/log-model", {"run_id": run_id, "model_json": models[0]}))[2]
