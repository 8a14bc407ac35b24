"""Who may call what of MLflow's API at the tracker, from the table of its endpoints itself: a new one cannot be forgotten."""

from __future__ import annotations

import re
from typing import Any

import httpx
from contracts.tracker.v1 import service_pb2 as pb
from servicekit import access
from servicekit.access import Caller
from servicekit.rest import Endpoint

EDITOR = Caller("gateway", "ada", frozenset({"editor"}))


def calls(running: Any) -> list[tuple[Endpoint, str]]:
    """Every method of every endpoint."""
    return [(endpoint, method) for endpoint in running.endpoints for method in endpoint.methods]


def filled(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


async def status(running: Any, method: str, path: str, headers: dict[str, str], body: Any = None) -> int:
    async with httpx.AsyncClient(base_url=f"http://{running.http}") as client:
        query = body if method == "GET" else None
        content = {"json": body} if method != "GET" and body is not None else {}
        return (await client.request(method, filled(path), headers=headers, params=query, **content)).status_code


def gateway(running: Any, caller: Caller) -> dict[str, str]:
    return {"authorization": f"Bearer {running.tokens['gateway']}", **dict(access.identity_metadata(caller))}


async def test_every_route_asks_for_a_service_and_a_person_who_may(running: Any) -> None:
    nobody = Caller("gateway", "nobody", frozenset())
    viewer = Caller("gateway", "vic", frozenset({"viewer"}))
    script = Caller("gateway", "run:" + "0" * 32, frozenset(), "0" * 32, 1)
    assert len(calls(running)) >= 50
    for endpoint, method in calls(running):
        where = f"{method} {endpoint.path}"
        bare = await status(running, method, endpoint.path, {})
        assert bare == 401, where
        for wrong in ("Bearer gateway.wrong", f"Bearer {running.tokens['mallory']}", "Basic YTpi", f"bearer{running.tokens['gateway']}"):
            assert await status(running, method, endpoint.path, {"authorization": wrong}) == 401, where
        for service in ("trainer", "evaluator"):
            other = {"authorization": f"Bearer {running.tokens[service]}", **dict(access.identity_metadata(viewer))}
            assert await status(running, method, endpoint.path, other) == 403, where
        alone = {"authorization": f"Bearer {running.tokens['gateway']}"}
        assert await status(running, method, endpoint.path, alone) == 403, where
        assert await status(running, method, endpoint.path, gateway(running, nobody)) == 403, where
        if "viewer" not in endpoint.rule.roles:
            assert await status(running, method, endpoint.path, gateway(running, viewer), {}) == 403, where
        if not endpoint.rule.runs:
            assert await status(running, method, endpoint.path, gateway(running, script), {}) == 403, where


async def test_whoever_only_looks_changes_nothing(running: Any) -> None:
    changing = {"POST", "PUT", "PATCH", "DELETE"}
    # The page reads by POST too, and asks for what there is none of.
    reads = (
        "search",
        r"get-history\S*",
        r"search-\S+",
        "presigned-download-url",
        "graphql",
        "gateway-proxy",
        "traces/metrics",
        "ui-telemetry",
    )
    looking = re.compile(f"/({'|'.join(reads)})$")
    for endpoint, method in calls(running):
        if method in changing and not looking.search(endpoint.path):
            assert endpoint.rule.roles == {"editor", "admin"}, f"{method} {endpoint.path}"


async def test_the_page_has_what_clients_have(running: Any) -> None:
    def below(prefix: str) -> set[tuple[str, str]]:
        return {(method, one.path.removeprefix(prefix)) for one, method in calls(running) if one.path.startswith(prefix)}

    clients = below("/api/2.0/mlflow/")
    assert ("POST", "runs/create") in clients
    assert clients <= below("/ajax-api/2.0/mlflow/")


async def test_a_run_token_is_good_for_its_own_run_only(running: Any) -> None:
    stub = running.stub("trainer")
    own, other = [(await stub.CreateRun(pb.CreateRunRequest(experiment_id=0, user="ada"))).run.run_id for _ in range(2)]
    script = Caller("gateway", f"run:{own}", frozenset(), own, 0)
    fields = {
        "run_id": other,
        "run_uuid": other,
        "run_ids": other,
        "key": "k",
        "metric_key": "k",
        "value": "1",
        "timestamp": 1,
        "status": "FINISHED",
        "max_results": 10,
        "models": [{"model_id": "m-1", "step": 0}],
        "params": [{"key": "k", "value": "v"}],
        "model_json": '{"artifact_path": "m", "flavors": {}, "utc_time_created": "", "run_id": ""}',
    }
    texts = {key: value for key, value in fields.items() if isinstance(value, str | int)}
    about_runs = re.compile(r"/api/2\.0/mlflow/(runs|metrics)/[\w-]+")
    met = 0
    for endpoint, method in calls(running):
        if endpoint.rule.runs and about_runs.fullmatch(endpoint.path):
            body = texts if method == "GET" else fields
            assert await status(running, method, endpoint.path, gateway(running, script), body) == 403, endpoint.path
            met += 1
    assert met >= 10
    async with httpx.AsyncClient(base_url=f"http://{running.http}") as client:
        answer = await client.get("/api/2.0/mlflow/runs/get", params={"run_id": other}, headers=gateway(running, EDITOR))
    found = answer.json()["run"]
    assert found["info"]["status"] == "RUNNING"
    assert found["data"] == {"metrics": [], "params": [], "tags": []}
    assert found["outputs"] == {"model_outputs": []}
