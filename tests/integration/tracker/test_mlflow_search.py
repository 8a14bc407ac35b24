"""Searches and histories on MLflow's wire, by plain HTTP through the gateway's door."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest


async def new_run(door: Any, **fields: Any) -> str:
    made = await door.post("/runs/create", {"experiment_id": "0", **fields})
    return str(made["run"]["info"]["run_id"])


async def get(door: Any, path: str, **query: Any) -> Any:
    answer = await door.call("GET", path, **query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def search(door: Any, **fields: Any) -> list[str]:
    answer = await door.post("/runs/search", {"experiment_ids": ["0"], **fields})
    return [one["info"]["run_id"] for one in answer.get("runs", [])]


async def found_as_got(door: Any, run_id: str) -> None:
    """A search answers a run as `runs/get` does."""
    got = (await get(door, "/runs/get", run_id=run_id))["run"]
    (found,) = (await door.post("/runs/search", {"experiment_ids": ["0"], "filter": f"run_id = '{run_id}'"}))["runs"]
    assert found == got


async def test_a_run_is_found_as_it_is_got_while_it_runs_and_ever_after(door: Any) -> None:
    run_id = await new_run(door, run_name="blue", tags=[{"key": "note", "value": '"é\n'}])
    await found_as_got(door, run_id)
    metrics = [{"key": "loss", "value": value, "timestamp": 5, "step": step} for step, value in ((0, 0.5), (1, "NaN"), (2, 1e-300))]
    batch = {"metrics": [*metrics, {"key": "nan", "value": "NaN", "timestamp": 1, "step": 0}], "params": [{"key": "lr", "value": "0.1"}]}
    await door.post("/runs/log-batch", {"run_id": run_id, **batch})
    dataset = {"name": "d", "digest": "1", "source_type": "local", "source": "s", "schema": "{}"}
    used = {"tags": [{"key": "mlflow.data.context", "value": "train"}], "dataset": dataset}
    await door.post("/runs/log-inputs", {"run_id": run_id, "datasets": [used], "models": [{"model_id": "m-1"}]})
    await found_as_got(door, run_id)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": 1_700_000_000_000})
    await found_as_got(door, run_id)
    # What is kept of a run that has ended follows what is said of it afterwards.
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "note", "value": "later"})
    await found_as_got(door, run_id)
    await door.post("/runs/delete-tag", {"run_id": run_id, "key": "note"})
    await found_as_got(door, run_id)
    await door.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 3.5, "timestamp": 9, "step": 3})
    await found_as_got(door, run_id)
    await door.post("/runs/log-parameter", {"run_id": run_id, "key": "late", "value": "x"})
    await found_as_got(door, run_id)
    await door.post("/runs/update", {"run_id": run_id, "status": "RUNNING"})
    await door.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 4.5, "timestamp": 9, "step": 4})
    await door.post("/runs/update", {"run_id": run_id, "status": "FAILED", "run_name": "green"})
    await found_as_got(door, run_id)


async def test_tags_set_at_once_on_a_run_that_has_ended_are_all_found(door: Any) -> None:
    run_id = await new_run(door)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    tags = [f"tag-{index}" for index in range(12)]
    await asyncio.gather(*(door.post("/runs/set-tag", {"run_id": run_id, "key": key, "value": "x"}) for key in tags))
    await asyncio.gather(*(door.post("/runs/delete-tag", {"run_id": run_id, "key": key}) for key in tags[:6]))
    await found_as_got(door, run_id)
    (found,) = (await door.post("/runs/search", {"experiment_ids": ["0"], "filter": "tags.`tag-7` = 'x'"}))["runs"]
    assert {one["key"] for one in found["data"]["tags"]} >= set(tags[6:])


async def test_filters_orders_views_and_pages(door: Any) -> None:
    runs = [await new_run(door, start_time=1_000 + index, run_name=f"n{index}") for index in range(4)]
    for index, run_id in enumerate(runs[:3]):
        await door.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": [0.2, "NaN", 0.1][index], "timestamp": 1})
        await door.post("/runs/log-parameter", {"run_id": run_id, "key": "lr", "value": str(index)})
    assert await search(door) == runs[::-1]
    assert await search(door, order_by=["metrics.`loss` ASC"]) == [runs[2], runs[0], runs[1], runs[3]]
    assert await search(door, order_by=["metrics.`loss` DESC"]) == [runs[0], runs[2], runs[1], runs[3]]
    assert await search(door, filter="metrics.loss > 0.05 and params.lr = '2'") == [runs[2]]
    assert await search(door, filter="attributes.run_name ILIKE 'N%'", order_by=["start_time"], max_results=2) == runs[:2]
    assert await search(door, filter="params.lr = '; DROP TABLE tracker.run; --'") == []
    await door.post("/runs/delete", {"run_id": runs[3]})
    assert await search(door, run_view_type="DELETED_ONLY") == [runs[3]]
    assert await search(door, run_view_type=3) == runs[::-1]
    assert await search(door, experiment_ids=[]) == []
    first = await door.post("/runs/search", {"experiment_ids": ["0", "0", "99"], "max_results": 2})
    second = await door.post("/runs/search", {"experiment_ids": ["0", "99"], "max_results": 2, "page_token": first["next_page_token"]})
    assert [one["info"]["run_id"] for one in first["runs"] + second["runs"]] == runs[2::-1]
    assert "next_page_token" not in second


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"filter": "params.a = 'b' OR params.c = 'd'"}, "Invalid clause(s) in filter string: 'OR'"),
        ({"filter": "(" * 100_000}, "Invalid clause(s)"),
        ({"filter": "metrics.a LIKE 'b'"}, "Invalid comparator"),
        ({"filter": "name = 'b'"}, "Invalid attribute key"),
        ({"order_by": ["metrics.a", "metrics.a desc"]}, "duplicate"),
        ({"max_results": 50_001}, "max_results"),
        ({"max_results": 0}, "max_results"),
        ({"run_view_type": "SOME"}, "run_view_type"),
        ({"experiment_ids": ["x"]}, "experiment_id"),
        ({"page_token": "eyJvZmZzZXQiOjF9"}, "page token"),
        ({"filter": "run_id = '\\u0000'"}, ""),
    ],
)
async def test_what_is_wrong_with_a_search_is_told(door: Any, fields: dict[str, Any], why: str) -> None:
    if not why:
        fields, why = {"filter": "run_id = '\x00'"}, "character 0"
    answer = await door.call("POST", "/runs/search", {"experiment_ids": ["0"], **fields})
    told = answer.json()
    assert (answer.status_code, told["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert why in told["message"]


async def test_experiments_are_searched_by_get_and_by_post(door: Any) -> None:
    for name in ("alpha", "Beta", "gamma"):
        await door.post("/experiments/create", {"name": name, "tags": [{"key": "team", "value": name[0]}]})

    async def names(**fields: Any) -> list[str]:
        by_post = await door.post("/experiments/search", fields)
        by_get = await get(door, "/experiments/search", **fields)
        assert by_get == by_post
        return [one["name"] for one in by_post["experiments"]]

    assert set(await names()) == {"Default", "alpha", "Beta", "gamma"}
    assert await names(order_by=["name"]) == ["Beta", "Default", "alpha", "gamma"]
    assert await names(filter="name ILIKE '%eta%'") == ["Beta"]
    assert await names(filter="tags.`team` = 'g'") == ["gamma"]
    assert await names(filter="tags.team IS NULL and experiment_id != '5'") == ["Default"]
    assert await names(view_type="DELETED_ONLY") == []
    first = await get(door, "/experiments/search", max_results=3, order_by=["last_update_time DESC"])
    rest = await get(door, "/experiments/search", max_results=3, order_by=["last_update_time DESC"], page_token=first["next_page_token"])
    assert [one["name"] for one in first["experiments"] + rest["experiments"]] == ["gamma", "Beta", "alpha", "Default"]
    assert {pair["key"]: pair["value"] for pair in first["experiments"][0]["tags"]} == {"team": "g"}


async def test_histories_on_the_wire(door: Any) -> None:
    run_id, other = await new_run(door), await new_run(door)
    points = [{"key": "loss", "value": value, "timestamp": 10 + step, "step": step} for step, value in enumerate([0.5, "NaN", 0.25, 4])]
    await door.post("/runs/log-batch", {"run_id": run_id, "metrics": points})
    expected = [{**point, "value": point["value"] if point["value"] != 4 else 4.0} for point in points]
    assert (await get(door, "/metrics/get-history", run_uuid=run_id, metric_key="loss"))["metrics"] == expected
    page = await get(door, "/metrics/get-history", run_id=run_id, metric_key="loss", max_results=3)
    rest = await get(door, "/metrics/get-history", run_id=run_id, metric_key="loss", max_results=3, page_token=page["next_page_token"])
    assert page["metrics"] + rest["metrics"] == expected
    bulk = await get(door, "/metrics/get-history-bulk", run_id=[run_id, other], metric_key="loss")
    assert bulk["metrics"] == [{**point, "run_id": run_id} for point in expected]
    interval = await get(door, "/metrics/get-history-bulk-interval", run_ids=[run_id, other], metric_key="loss", max_results=2)
    assert interval["metrics"] == [{**expected[at], "run_id": run_id} for at in (0, 3)]
    for path, query in (
        ("/metrics/get-history", {"run_id": run_id}),
        ("/metrics/get-history", {"run_id": run_id, "metric_key": "loss", "max_results": 0}),
        ("/metrics/get-history-bulk", {"metric_key": "loss"}),
        ("/metrics/get-history-bulk-interval", {"run_ids": run_id, "metric_key": "loss", "start_step": 3}),
        ("/metrics/get-history-bulk-interval", {"metric_key": "loss"}),
    ):
        answer = await door.call("GET", path, **query)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert (await door.call("GET", "/metrics/get-history", run_id="0" * 32, metric_key="loss")).status_code == 404
