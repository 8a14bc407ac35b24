"""Experiments on MLflow's wire, by plain HTTP through the gateway's door: made once, renamed, deleted and restored with their runs."""

from __future__ import annotations

import asyncio
from typing import Any


async def make(door: Any, name: str, **fields: Any) -> str:
    return str((await door.post("/experiments/create", {"name": name, **fields}))["experiment_id"])


async def get(door: Any, experiment_id: str) -> Any:
    answer = await door.call("GET", "/experiments/get", experiment_id=experiment_id)
    assert answer.status_code == 200, answer.text
    return answer.json()["experiment"]


async def new_run(door: Any, experiment_id: str) -> str:
    return str((await door.post("/runs/create", {"experiment_id": experiment_id}))["run"]["info"]["run_id"])


async def stages(door: Any, runs: list[str]) -> list[str]:
    return [(await door.run(run_id))["info"]["lifecycle_stage"] for run_id in runs]


async def test_an_experiment_is_made_as_asked_and_found_by_name(door: Any) -> None:
    tags = [{"key": "team", "value": "red"}, {"key": "note", "value": "x" * 20_000}]
    experiment_id = await make(door, "größe", tags=tags, artifact_location="")
    found = await get(door, experiment_id)
    created = found.pop("creation_time")
    assert created == found.pop("last_update_time") > 0
    assert sorted(found.pop("tags"), key=lambda tag: str(tag["key"]), reverse=True) == tags
    assert found == {
        "experiment_id": experiment_id,
        "name": "größe",
        "artifact_location": f"mlflow-artifacts:/{experiment_id}",
        "lifecycle_stage": "active",
    }
    by_name = await door.call("GET", "/experiments/get-by-name", key="key-of-vic", experiment_name="größe")
    assert by_name.json()["experiment"]["experiment_id"] == experiment_id
    missing = await door.call("GET", "/experiments/get-by-name", experiment_name="none")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
    assert (await get(door, "0"))["name"] == "Default"


async def test_a_location_is_the_servers_to_choose(door: Any) -> None:
    for location in [
        "file:///etc",
        "/etc/passwd",
        "./mlruns",
        "http://169.254.169.254/latest/meta-data",
        "s3://another/bucket",
        "gs://b",
        "dbfs:/x",
        "runs:/x",
        "mlflow-artifacts:/1",
        "mlflow-artifacts:/../0",
        "mlflow-artifacts://other.example/0",
        " ",
        "x" * 100_000,
    ]:
        status, code, message = await door.refused("/experiments/create", {"name": "mine", "artifact_location": location})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert "artifact_location" in message
        assert len(message) < 1_000
        assert (await door.call("GET", "/experiments/get-by-name", experiment_name="mine")).status_code == 404
    assert await make(door, "mine", artifact_location="mlflow-artifacts:/")


async def test_an_experiment_that_is_described_badly_is_not_made(door: Any) -> None:
    experiment_id = await make(door, "there")
    cases: list[dict[str, Any]] = [
        {},
        {"name": ""},
        {"name": "  "},
        {"name": "n" * 501},
        {"name": "nul\x00"},
        {"name": 7},
        {"name": "x", "tags": [{"key": "k", "value": "v" * 20_001}]},
        {"name": "x", "tags": [{"key": "k" * 251, "value": "v"}]},
        {"name": "x", "tags": [{"value": "v"}]},
        {"name": "x", "tags": [{"key": f"k{n}", "value": ""} for n in range(101)]},
    ]
    for body in cases:
        assert (await door.refused("/experiments/create", body))[:2] == (400, "INVALID_PARAMETER_VALUE")
        assert (await door.call("GET", "/experiments/get-by-name", experiment_name="x")).status_code == 404
        if "tags" not in body:
            renamed = {"experiment_id": experiment_id, **({"new_name": body["name"]} if "name" in body else {})}
            assert (await door.refused("/experiments/update", renamed))[:2] == (400, "INVALID_PARAMETER_VALUE")
        assert (await get(door, experiment_id))["name"] == "there"


async def test_of_two_who_make_the_same_name_one_wins(door: Any) -> None:
    asked = [door.call("POST", "/experiments/create", {"name": "wine"}, key) for key in ("key-of-ada", "key-of-bob") * 4]
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 7
    assert {answer.json().get("error_code") for answer in answers} == {None, "RESOURCE_ALREADY_EXISTS"}


async def test_of_two_who_take_the_same_name_one_wins(door: Any) -> None:
    made = [await make(door, f"e{n}") for n in range(6)]
    asked = [door.call("POST", "/experiments/update", {"experiment_id": one, "new_name": "wine"}) for one in made]
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 5
    names = sorted([(await get(door, one))["name"] for one in made])
    assert names[-1] == "wine"
    assert len(set(names)) == 6
    winner = made[[answer.status_code for answer in answers].index(200)]
    await door.post("/experiments/update", {"experiment_id": winner, "new_name": "wine"})


async def test_an_experiment_takes_its_runs_along(door: Any) -> None:
    experiment_id, other = await make(door, "wine"), await make(door, "beer")
    runs = [await new_run(door, experiment_id) for _ in range(3)]
    elsewhere = await new_run(door, other)
    await door.post("/runs/delete", {"run_id": runs[0]})
    before = (await get(door, experiment_id))["last_update_time"]
    await door.post("/experiments/delete", {"experiment_id": experiment_id})
    found = await get(door, experiment_id)
    assert found["lifecycle_stage"] == "deleted"
    assert found["last_update_time"] >= before
    assert await stages(door, [*runs, elsewhere]) == ["deleted"] * 3 + ["active"]
    for path, body in (
        ("/runs/log-metric", {"run_id": runs[1], "key": "m", "value": 1, "timestamp": 1}),
        ("/runs/create", {"experiment_id": experiment_id}),
        ("/experiments/update", {"experiment_id": experiment_id, "new_name": "ale"}),
        ("/experiments/set-experiment-tag", {"experiment_id": experiment_id, "key": "k", "value": "v"}),
    ):
        status, code, message = await door.refused(path, body)
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert "must be in the 'active' state" in message
    assert (await door.refused("/experiments/delete", {"experiment_id": experiment_id}))[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
    assert (await door.refused("/experiments/create", {"name": "wine"}))[1] == "RESOURCE_ALREADY_EXISTS"
    await door.post("/experiments/restore", {"experiment_id": experiment_id})
    assert await stages(door, runs) == ["active"] * 3
    assert (await door.refused("/experiments/restore", {"experiment_id": experiment_id}))[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
    await door.post("/runs/log-metric", {"run_id": runs[1], "key": "m", "value": 1, "timestamp": 1})


async def test_runs_that_are_made_while_their_experiment_is_deleted_are_deleted_or_refused(door: Any) -> None:
    experiment_id = await make(door, "wine")

    async def try_run() -> str | None:
        answer = await door.call("POST", "/runs/create", {"experiment_id": experiment_id})
        return answer.json()["run"]["info"]["run_id"] if answer.status_code == 200 else None

    made = await asyncio.gather(*(try_run() for _ in range(6)), door.post("/experiments/delete", {"experiment_id": experiment_id}))
    assert set(await stages(door, [one for one in made if isinstance(one, str)])) <= {"deleted"}


async def test_tags_of_an_experiment_are_set_and_deleted(door: Any) -> None:
    experiment_id = await make(door, "wine")
    for value in ("first", "last", "last"):
        await door.post("/experiments/set-experiment-tag", {"experiment_id": experiment_id, "key": "k", "value": value})
    assert (await get(door, experiment_id))["tags"] == [{"key": "k", "value": "last"}]
    await door.post("/experiments/delete-experiment-tag", {"experiment_id": experiment_id, "key": "k"})
    gone = await door.refused("/experiments/delete-experiment-tag", {"experiment_id": experiment_id, "key": "k"})
    assert gone[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
    for body in (
        {"key": "k", "value": "v" * 20_001},
        {"key": "", "value": "v"},
        {"key": "../k", "value": "v"},
        {"key": "k", "value": "\x00"},
    ):
        refused = await door.refused("/experiments/set-experiment-tag", {"experiment_id": experiment_id, **body})
        assert refused[:2] == (400, "INVALID_PARAMETER_VALUE")
    assert (await get(door, experiment_id))["tags"] == []


async def test_an_experiment_that_is_not_there_is_told_so(door: Any) -> None:
    for path in ["update", "delete", "restore", "set-experiment-tag", "delete-experiment-tag"]:
        rest = {"new_name": "x", "key": "k", "value": "v"}
        assert (await door.refused(f"/experiments/{path}", {"experiment_id": "99", **rest}))[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
        for wrong in ("", "one", "-1", "1.0", "9" * 30, "²"):
            refused = await door.refused(f"/experiments/{path}", {"experiment_id": wrong, **rest})
            assert refused[:2] == (400, "INVALID_PARAMETER_VALUE")
            assert "experiment_id" in refused[2]
