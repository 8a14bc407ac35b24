"""What runs log on MLflow's wire, by plain HTTP through the gateway's door: values and sizes at their limits, and all beyond them."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import Any

import pytest
from servicekit import db
from servicekit.access import Caller
from servicekit.errors import Conflict, Forbidden
from sqlalchemy import text
from tracker.domain.run import Metric, Status
from tracker.handlers import NewRun, end_run

HUGE = sys.float_info.max


async def new_run(door: Any) -> str:
    return str((await door.post("/runs/create", {"experiment_id": "0"}))["run"]["info"]["run_id"])


async def data(door: Any, run_id: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Metrics, params and tags of a run by key, without the tag that holds its name."""
    found = (await door.run(run_id))["data"]
    metrics, params, tags = ({one["key"]: one["value"] for one in found[kind]} for kind in ("metrics", "params", "tags"))
    del tags["mlflow.runName"]
    return metrics, params, tags


async def test_every_number_is_a_metric(door: Any) -> None:
    for value, kept in [
        (b"0", 0.0),
        (b"-1.5", -1.5),
        (b'"2.5"', 2.5),
        (b"1e308", 1e308),
        (b'"NaN"', "NaN"),
        (b"NaN", "NaN"),
        (b'"Infinity"', HUGE),
        (b"-Infinity", -HUGE),
        (b"12345678901234567890", 12345678901234567890.0),
    ]:
        run_id = await new_run(door)
        body = b'{"run_id":"%s","key":"m","value":%s,"timestamp":1,"step":%d}' % (run_id.encode(), value, -(2**63))
        for _ in range(2):
            await door.post("/runs/log-metric", body)
        assert (await door.run(run_id))["data"]["metrics"] == [{"key": "m", "value": kept, "timestamp": 1, "step": -(2**63)}]
        assert [point.run_id for point in await points(door)].count(run_id) == 1


async def points(door: Any, table: str = "metric_point") -> list[Any]:
    engine = db.create_engine(door.running.settings.database_url)
    async with engine.connect() as conn:
        found = list(await conn.execute(text(f"SELECT * FROM tracker.{table}")))
    await engine.dispose()
    return found


async def test_a_metric_that_is_none_is_refused(door: Any) -> None:
    for point, what in [
        (b'"value":1,"timestamp":1', "'key'"),
        (b'"key":"m","timestamp":1', "'value'"),
        (b'"key":"m","value":null,"timestamp":1', "'value'"),
        (b'"key":"m","value":1', "'timestamp'"),
        (b'"key":"m","value":true,"timestamp":1', "'value'"),
        (b'"key":"m","value":"high","timestamp":1', "'value'"),
        (b'"key":"m","value":1e999,"timestamp":1', "'value'"),
        (b'"key":"m","value":' + b"9" * 400 + b',"timestamp":1', "'value'"),
        (b'"key":"m","value":1,"timestamp":-1', "timestamp"),
        (b'"key":"m","value":1,"timestamp":9223372036854775808', "timestamp"),
        (b'"key":"m","value":1,"timestamp":1.5', "'timestamp'"),
        (b'"key":"m","value":1,"timestamp":1,"step":9223372036854775808', "step"),
        (b'"key":"m","value":1,"timestamp":1,"step":' + b"9" * 400, "step"),
        (b'"key":"' + b"m" * 251 + b'","value":1,"timestamp":1', "key"),
        (b'"key":"../m","value":1,"timestamp":1', "key"),
        (b'"key":"m\\u0000","value":1,"timestamp":1', "key"),
        (b'"key":"\\ud800","value":1,"timestamp":1', "UTF-8"),
        (b'"key":"\xff","value":1,"timestamp":1', "UTF-8"),
        (b'"key":"m","value":1,"timestamp":1,"model_id":"' + b"m" * 251 + b'"', "model_id"),
    ]:
        run_id = await new_run(door)
        status, code, message = await door.refused("/runs/log-metric", b'{"run_id":"%s",%s}' % (run_id.encode(), point))
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert what in message
        assert await points(door) == []


async def test_a_metric_may_be_about_a_model_and_a_data_set(door: Any) -> None:
    run_id = await new_run(door)
    point = {"key": "auc", "value": 0.7, "timestamp": 5, "step": 2, "model_id": "m-1", "dataset_name": "wine", "dataset_digest": "abc"}
    for _ in range(2):
        await door.post("/runs/log-metric", {"run_id": run_id, **point})
        await door.post("/runs/log-batch", {"run_id": run_id, "metrics": [point, {**point, "model_id": ""}]})
    (row,) = await points(door, "model_metric")
    assert (row.model_id, row.key, row.value, row.run_id, row.dataset_name) == ("m-1", "auc", 0.7, run_id, "wine")
    assert len(await points(door)) == 1


async def test_a_batch_at_its_limits_is_taken_and_beyond_them_refused_whole(door: Any) -> None:
    run_id = await new_run(door)
    metrics = [{"key": f"m{n}", "value": n, "timestamp": 1} for n in range(800)]
    params = [{"key": f"p{n}", "value": "v"} for n in range(100)]
    tags = [{"key": f"t{n}", "value": "v"} for n in range(100)]
    await door.post("/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params, "tags": tags})
    assert [len(kind) for kind in await data(door, run_id)] == [800, 100, 100]
    await door.post("/runs/log-batch", {"run_id": run_id})
    other = await new_run(door)
    many = [{"key": f"m{n}", "value": n, "timestamp": 1} for n in range(1_001)]
    for batch, what in (
        ({"metrics": [*metrics, metrics[0]], "params": params, "tags": tags}, "1001"),
        ({"metrics": many}, "at most 1000"),
        ({"params": [*params, {"key": "one", "value": "more"}]}, "at most 100"),
        ({"tags": [*tags, {"key": "one", "value": "more"}]}, "at most 100"),
        ({"metrics": [{**metrics[0], "key": ""}], "params": params}, "metrics[0].key"),
        ({"params": params[:2], "tags": [{"key": "a//b", "value": ""}]}, "tags"),
        ({"metrics": metrics[:2], "params": [{"key": "nul", "value": "\x00"}]}, "params"),
        ({"metrics": {"key": "m"}}, "metrics"),
    ):
        status, code, message = await door.refused("/runs/log-batch", {"run_id": other, **batch})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
        assert what in message
    assert await data(door, other) == ({}, {}, {})


async def test_a_param_never_changes_and_is_there_once_in_a_batch(door: Any) -> None:
    run_id = await new_run(door)
    for _ in range(2):
        await door.post("/runs/log-parameter", {"run_id": run_id, "key": "lr", "value": "0.1"})
    status, code, message = await door.refused("/runs/log-parameter", {"run_id": run_id, "key": "lr", "value": "0.2"})
    assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
    assert "'0.1'" in message
    metric = {"key": "m", "value": 1, "timestamp": 1}
    changed = [{"key": "new", "value": "1"}, {"key": "lr", "value": "0.3"}]
    assert "never changes" in (await door.refused("/runs/log-batch", {"run_id": run_id, "metrics": [metric], "params": changed}))[2]
    twice = [{"key": "a", "value": "1"}, {"key": "a", "value": "1"}]
    assert "Duplicate parameter keys" in (await door.refused("/runs/log-batch", {"run_id": run_id, "params": twice}))[2]
    assert await data(door, run_id) == ({}, {"lr": "0.1"}, {})


async def test_texts_of_any_language_are_kept_and_long_values_are_cut_as_mlflow_cuts_them(door: Any) -> None:
    run_id = await new_run(door)
    await door.post("/runs/log-parameter", {"run_id": run_id, "key": "größe/日本語", "value": "𝔸" * 6_001})
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "k" * 250, "value": "ü" * 8_001})
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "empty"})
    tags = [{"key": "t", "value": "first"}, {"key": "t", "value": "last"}]
    await door.post("/runs/log-batch", {"run_id": run_id, "params": [{"key": "p", "value": "x" * 6_001}], "tags": tags})
    _, params, kept = await data(door, run_id)
    assert params == {"größe/日本語": "𝔸" * 6_000, "p": "x" * 6_000}
    assert kept == {"k" * 250: "ü" * 8_000, "empty": "", "t": "last"}
    # Said again it is the same value, so a client may try again.
    await door.post("/runs/log-parameter", {"run_id": run_id, "key": "p", "value": "x" * 6_001})


async def test_a_tag_that_is_deleted_is_gone(door: Any) -> None:
    parent = await new_run(door)
    run_id = await new_run(door)
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "mlflow.parentRunId", "value": parent})
    assert {row.parent_run_id for row in await points(door, "run")} == {"", parent}
    await door.post("/runs/delete-tag", {"run_id": run_id, "key": "mlflow.parentRunId"})
    status, code, message = await door.refused("/runs/delete-tag", {"run_id": run_id, "key": "mlflow.parentRunId"})
    assert (status, code) == (404, "RESOURCE_DOES_NOT_EXIST")
    assert "No tag with name" in message
    assert (await data(door, run_id))[2] == {}
    assert [row.parent_run_id for row in await points(door, "run")] == ["", ""]
    # Also of a run that has ended.
    await door.post("/runs/set-tag", {"run_id": run_id, "key": "note", "value": "x"})
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    await door.post("/runs/delete-tag", {"run_id": run_id, "key": "note"})
    assert (await data(door, run_id))[2] == {}


async def test_a_body_of_another_shape_is_refused(door: Any) -> None:
    for body in [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b'{"run_id": 7}',
        b'{"run_id": ["a"]}',
        b'{"run_id": {"a": 1}}',
        b"[" * 200_000,
    ]:
        # An empty object, or none, describes a run well enough to make one.
        last = "delete" if body[:1] in (b"", b"{") else "create"
        for path in ("log-metric", "log-batch", "set-tag", "update", last):
            status, code, _ = await door.refused(f"/runs/{path}", body)
            assert (status, code) == (400, "INVALID_PARAMETER_VALUE"), path


async def test_null_is_a_field_left_out(door: Any) -> None:
    made = await door.post("/runs/create", {"experiment_id": None, "run_name": None, "tags": None, "start_time": None})
    run_id = made["run"]["info"]["run_id"]
    await door.post("/runs/update", {"run_id": run_id, "run_uuid": None, "status": None, "end_time": None, "run_name": "x"})
    info = (await door.run(run_id))["info"]
    assert (info["experiment_id"], info["status"], info["run_name"]) == ("0", "RUNNING", "x")


async def test_only_json_is_read_and_only_so_much(door: Any) -> None:
    run_id = await new_run(door)
    headers = {"authorization": "Bearer key-of-ada", "content-type": "text/plain"}
    body = b'{"run_id": "%s", "key": "k", "value": "v"}' % run_id.encode()
    answer = await door.client.post("/api/2.0/mlflow/runs/set-tag", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    status, _, message = await door.refused("/runs/set-tag", b'{"run_id": "%s", "value": "%s"}' % (run_id.encode(), b"x" * 9_000_000))
    assert status in (400, 413)
    assert "bytes" in message
    assert (await data(door, run_id))[2] == {}


async def test_what_is_not_served_is_a_404_that_is_not_json(door: Any) -> None:
    for method, path in (("GET", "/nothing"), ("POST", "/runs/get"), ("GET", "/runs/create"), ("POST", "/traces")):
        answer = await door.call(method, path, {} if method == "POST" else None)
        assert answer.status_code == 404
        assert not answer.headers["content-type"].startswith("application/json")


async def test_the_server_says_what_it_can_do(door: Any) -> None:
    headers = {"authorization": "Bearer key-of-vic"}
    version = await door.client.get("/version", headers=headers)
    assert version.text.split(".")[:2] == ["3", "3"]
    assert (await door.client.get("/health", headers=headers)).text == "OK"
    told = [(await door.client.get(f"/{prefix}/3.0/mlflow/server-info", headers=headers)).json() for prefix in ("api", "ajax-api")]
    assert told[0] == told[1]
    assert told[0]["multipart_uploads_enabled"] is True
    assert told[0]["workspaces_enabled"] is False


async def test_a_metric_that_is_not_a_number_does_not_hide_the_later_one(door: Any) -> None:
    run_id = await new_run(door)
    for step, value in ((2, 0.5), (1, math.nan), (3, math.nan), (4, 0.25)):
        body = {"run_id": run_id, "key": "m", "value": "NaN" if math.isnan(value) else value, "timestamp": 1, "step": step}
        await door.post("/runs/log-metric", body)
    assert (await door.run(run_id))["data"]["metrics"] == [{"key": "m", "value": 0.25, "timestamp": 1, "step": 4}]


async def test_a_point_waits_for_an_end_and_comes_after_it(stored: Any, editor: Caller) -> None:
    view, _ = await stored.tracker.create_run(editor, NewRun(0))
    run_id = view.run.run_id
    script = Caller("gateway", f"run:{run_id}", frozenset(), run_id, 0)
    async with stored.store.transaction() as work:
        run = await work.runs.lock(run_id)
        late = [asyncio.create_task(stored.tracker.log_metric(who, run_id, Metric("m", 1.0, 1, 0))) for who in (editor, script)]
        waiting = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        async with asyncio.timeout(60):
            while True:
                if (await stored.rows(waiting))[0].n == 2:
                    break
                await asyncio.sleep(0.01)
        await end_run(work, run, Status.FINISHED, 5, "")
    by_person, by_token = await asyncio.gather(*late, return_exceptions=True)
    assert by_person is None
    assert isinstance(by_token, Conflict)
    assert "has ended" in by_token.message


async def test_a_point_of_an_older_attempt_is_refused(stored: Any, trainer: Caller) -> None:
    views = [await stored.tracker.create_run(trainer, NewRun(0, request_id="job:1", fencing_token=fence)) for fence in (5, 6)]
    run_id = views[0][0].run.run_id
    older, newer = (Caller("gateway", f"run:{run_id}", frozenset(), run_id, fence) for fence in (5, 6))
    await stored.tracker.log_metric(newer, run_id, Metric("m", 1.0, 1, 0))
    with pytest.raises(Conflict, match="newer attempt"):
        await stored.tracker.log_metric(older, run_id, Metric("m", 2.0, 1, 1))
    other, _ = await stored.tracker.create_run(trainer, NewRun(0))
    with pytest.raises(Forbidden):
        await stored.tracker.log_metric(newer, other.run.run_id, Metric("m", 2.0, 1, 1))
    with pytest.raises(Forbidden):
        await stored.tracker.log_metric(Caller("gateway", "vic", frozenset({"viewer"})), run_id, Metric("m", 2.0, 1, 1))
    assert len(await stored.rows("SELECT 1 FROM tracker.metric_point")) == 1


async def test_a_point_is_stored_though_the_connection_for_it_has_died(door: Any) -> None:
    run_id = await new_run(door)
    body = {"run_id": run_id, "key": "m", "value": 1, "timestamp": 1}
    await door.post("/runs/log-metric", body)
    engine = db.create_engine(door.running.settings.database_url)
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with engine.connect() as conn:
        assert len(list(await conn.execute(text(kill)))) > 1
    await engine.dispose()
    await door.post("/runs/log-metric", {**body, "step": 1})
    await door.post("/runs/log-metric", {**body, "step": 2})
    assert len(await points(door)) == 3
