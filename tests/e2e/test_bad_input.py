"""What a user gets wrong, seen from outside: a clear error, and nothing changed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from headrace.config import Connection
from headrace.http import Client, InvalidInput
from headrace.runs import start_run
from localstack.layout import Stack

from tests.e2e.world import GOOD, World, eventually, model_bytes, request_body


def applied(world: World) -> list[str]:
    return [delivery["name"] for delivery in world.client.get("/api/v1/deliveries")["deliveries"]]


@pytest.mark.parametrize(
    ("wrong", "right", "field"),
    [
        ("metric: {name: auc, goal: maximise}", "metric: {name: auc, goal: maximize, margin: 0.01}", "evaluate.metric.goal"),
        ("weight: 10 apples", "weight: 10%", "serve.rollout.steps[0].weight"),
        ("runtim: triton", "runtime: triton", "serve.runtim"),
        ("production: many", "production: 0", "promote.approvals.production"),
        ("bad: eror", "bad: error", "serve.rollout.guards[0].bad"),
    ],
)
def test_a_malformed_delivery_names_line_and_field_and_changes_nothing(world: World, wrong: str, right: str, field: str) -> None:
    text = world.delivery().replace(right, wrong)
    line = next(number for number, row in enumerate(text.splitlines(), 1) if wrong in row)
    with pytest.raises(InvalidInput) as caught:
        world.apply(text)
    named = {violation["field"]: violation.get("line") for violation in caught.value.violations}
    assert field in named, named
    assert named[field] == line
    assert world.name not in applied(world)


def test_a_file_that_is_not_yaml_names_the_line(world: World) -> None:
    with pytest.raises(InvalidInput) as caught:
        world.apply("apiVersion: headrace/v1\nkind: [Delivery\n")
    assert [violation["line"] for violation in caught.value.violations] == [3], "the list that was begun ends where the file does"
    assert world.name not in applied(world)


def test_a_second_delivery_may_not_claim_the_same_endpoint(world: World) -> None:
    world.apply()
    other = world.delivery(endpoint=world.name).replace(f"name: {world.name}}}", f"name: {world.name}-2}}", 1)
    other = other.replace(f"experiment: {world.name}", f"experiment: {world.name}-2").replace(
        f"model: {world.name}", f"model: {world.name}-2"
    )
    with pytest.raises(InvalidInput) as caught:
        world.apply(other)
    told = {violation["field"]: violation["message"] for violation in caught.value.violations}
    assert world.name in told["serve.endpoint"], "it says who has it"
    assert f"{world.name}-2" not in applied(world)


@pytest.fixture(scope="module")
def served(system: Stack) -> Iterator[World]:
    """An endpoint with one version, for tests that only ask it things."""
    world = World(system, "bad-input-served")
    world.apply()
    world.arrives(world.finish_run(model_bytes(GOOD)), "completed")
    yield world
    world.close()


@pytest.mark.parametrize(("key", "status"), [("", 401), ("hr_unknown_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 401)])
def test_no_key_no_answer_in_the_protocols_own_form(served: World, key: str, status: int) -> None:
    answer = served.infer(key=key)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"], str)


def test_a_key_for_another_endpoint_is_refused(served: World) -> None:
    secret = served.client.post("/api/v1/keys", {"subject": "app", "inference_endpoints": ["elsewhere"]})["secret"]
    answer = eventually(lambda: (got := served.infer(key=secret)).status_code != 401 and got, 10)
    assert answer.status_code == 403
    assert isinstance(answer.json()["error"], str)
    refused = httpx.get(f"{served.url}/api/v1/models", headers={"authorization": f"Bearer {secret}"}, trust_env=False)
    assert refused.status_code == 403, "a key for inference opens nothing else"


def test_an_oversized_body_is_413(served: World) -> None:
    assert served.infer(b" " * (9 * 1024 * 1024)).status_code == 413


def wrong(change: dict[str, object]) -> bytes:
    body = json.loads(request_body())
    body["inputs"][0] |= change
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        wrong({"shape": [1, 2], "data": [1.0, 2.0]}),
        wrong({"datatype": "INT64", "data": [1]}),
        wrong({"name": "x9"}),
        wrong({"data": ["text"]}),
        wrong({"data": [None]}),
        wrong({"shape": [2, 1], "data": [1.0, 2.0]}),
    ],
    ids=["half", "list", "shape", "datatype", "name", "text", "null", "rows"],
)
def test_wrong_tensors_are_the_callers_fault(served: World, body: bytes) -> None:
    answer = served.infer(body)
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)
    assert served.infer().status_code == 200, "the next request is served"


@pytest.mark.parametrize(
    "path", ["/v2/repository/index", "/v2/models/x/load", "/v2/systemsharedmemory/status", "/v2/logging", "/v2/trace/setting"]
)
def test_administration_of_the_runtime_is_never_public(served: World, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, f"{served.url}{path}", headers={"authorization": f"Bearer {served.key}"}, trust_env=False)
        assert answer.status_code == 404


def test_a_run_that_is_no_candidate_is_skipped_with_the_reason(world: World) -> None:
    world.apply()
    with start_run(world.name, client=Client(Connection(world.url, world.key))) as run:
        run.log_metric("loss", 1.0)
    assert "model" in world.arrives(run.id, "skipped")["detail"]
