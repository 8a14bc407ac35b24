"""Which service leaves which span for one run of the chain, and on which topic: held against the spans that were received."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from localstack.layout import Stack

from tests.e2e.trainings import delivery_that_trains, ended, make_source, submit
from tests.e2e.world import GOOD, World, eventually, model_bytes, request_body

# service x span x topic: "" where a span has nothing to do with Kafka.
Row = tuple[str, str, str]
LOGGED: list[Row] = [
    ("gateway", "POST /api/v1/runs/{run_id}/finish", ""),
    ("gateway", "headrace.tracker.v1.TrackerService/FinishRun", ""),
    ("tracker", "headrace.tracker.v1.TrackerService/FinishRun", ""),
]
"""Of a run that a script by hand began and finished."""

TRAINED: list[Row] = [
    ("gateway", "POST /api/v1/trainings", ""),
    ("gateway", "headrace.trainer.v1.TrainerService/SubmitTraining", ""),
    ("trainer", "headrace.trainer.v1.TrainerService/SubmitTraining", ""),
    ("trainer", "send headrace.jobs", "headrace.jobs"),
    ("trainer", "job training", ""),
    ("trainer", "training attempt", ""),
    ("trainer", "headrace.tracker.v1.TrackerService/CreateRun", ""),
    ("tracker", "headrace.tracker.v1.TrackerService/CreateRun", ""),
    ("trainer", "headrace.tracker.v1.TrackerService/FinishRun", ""),
    ("tracker", "headrace.tracker.v1.TrackerService/FinishRun", ""),
]
"""Of a run that the trainer made."""

DELIVERED: list[Row] = [
    ("tracker", "send headrace.runs", "headrace.runs"),
    ("evaluator", "process headrace.runs", "headrace.runs"),
    ("evaluator", "send headrace.evals", "headrace.evals"),
    ("registry", "process headrace.evals", "headrace.evals"),
    ("registry", "send headrace.models", "headrace.models"),
    ("deployer", "process headrace.models", "headrace.models"),
    ("deployer", "send headrace.deploys", "headrace.deploys"),
    ("registry", "process headrace.deploys", "headrace.deploys"),
    ("evaluator", "process headrace.deploys", "headrace.deploys"),
]
"""Of every run's way from its end to production."""

EXPECTED = [("logged", *row) for row in LOGGED + DELIVERED] + [("trained", *row) for row in TRAINED + DELIVERED]
CANARY_ROW = 0.123456789
"""A value that is in a payload, and must be in no span."""


@dataclass(frozen=True)
class Chain:
    """A delivery, one run that travelled all its way, and one prediction by what it delivered."""

    world: World
    run: str
    request_id: str


@pytest.fixture(scope="module")
def chains(system: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Chain]]:
    """One chain from a run by hand, one from a training."""
    made = {}
    for how in ("logged", "trained"):
        world = World(system, f"spans-of-a-run-that-is-{how}")
        if how == "logged":
            world.apply()
            run = world.finish_run(model_bytes(GOOD, seed=1))
        else:
            world.apply(delivery_that_trains(world))
            training = ended(world, submit(world, make_source(tmp_path_factory.mktemp("spans"))))
            assert training["status"] == "succeeded", training
            run = training["run_id"]
        world.arrives(run, "completed")
        made[how] = Chain(world, run, world.infer(request_body(CANARY_ROW)).headers["x-request-id"])
    yield made
    for chain in made.values():
        chain.world.close()


def spans_of(system: Stack, **query: str) -> list[dict[str, Any]]:
    answer = httpx.get(
        f"{system.addresses.otlp}/spans",
        params=query,
        headers={"authorization": f"Bearer {system.addresses.traces_secret}"},
        trust_env=False,
    )
    answer.raise_for_status()
    return list(answer.json()["spans"])


def topic_of(span: dict[str, Any]) -> str:
    return str(span["attributes"].get("messaging.destination.name", ""))


@pytest.fixture(scope="module")
def spans(system: Stack, chains: dict[str, Chain]) -> dict[str, list[dict[str, Any]]]:
    """The spans of each chain, once all that are expected have arrived, and all that others name as their cause; after half a
    minute those that are there, so that a test can say what is missing."""
    found = {}
    deadline = time.monotonic() + 30
    for how, chain in chains.items():
        expected = {(service, name, topic) for one, service, name, topic in EXPECTED if one == how}
        while True:
            found[how] = spans_of(system, run_id=chain.run)
            told = {(span["service"], span["name"], topic_of(span)) for span in found[how]}
            if (expected <= told and not without_cause(found[how])) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    return found


def causes_of(span: dict[str, Any]) -> set[tuple[str, str]]:
    parent = {(span["trace_id"], span["parent_id"])} if span["parent_id"] else set()
    return parent | {(link["trace_id"], link["span_id"]) for link in span["links"]}


def without_cause(spans: list[dict[str, Any]]) -> list[str]:
    """Spans that name causes, none of which is known."""
    known = {(span["trace_id"], span["span_id"]) for span in spans}
    return [f"{span['service']} {span['name']}" for span in spans if causes_of(span) and known.isdisjoint(causes_of(span))]


@pytest.mark.parametrize(
    ("how", "service", "name", "topic"), EXPECTED, ids=[f"{how}: {service} {name}" for how, service, name, _ in EXPECTED]
)
def test_the_span_was_received(spans: dict[str, list[dict[str, Any]]], how: str, service: str, name: str, topic: str) -> None:
    told = {(span["service"], span["name"], topic_of(span)) for span in spans[how]}
    assert (service, name, topic) in told, sorted(told)


@pytest.mark.parametrize(("how", "first"), [("logged", LOGGED[0]), ("trained", TRAINED[0])])
def test_the_chain_hangs_together(spans: dict[str, list[dict[str, Any]]], how: str, first: Row) -> None:
    """The request that began it all is a root, only requests are, and every other span is reached by parents and links."""
    assert without_cause(spans[how]) == []
    roots = {(span["service"], span["name"]) for span in spans[how] if not causes_of(span)}
    assert first[:2] in roots
    assert {service for service, _ in roots} == {"gateway"}, roots


@pytest.mark.parametrize("how", ["logged", "trained"])
def test_a_prediction_reaches_triton_in_one_trace(system: Stack, chains: dict[str, Chain], how: str) -> None:
    def complete() -> list[dict[str, Any]]:
        found = spans_of(system, request_id=chains[how].request_id)
        return found if {"gateway", "triton"} <= {span["service"] for span in found} else []

    found = eventually(complete, 30, "spans of gateway and Triton")
    assert len({span["trace_id"] for span in found}) == 1


@pytest.mark.parametrize("how", ["logged", "trained"])
def test_nothing_of_a_payload_a_path_or_a_secret_is_in_a_span(
    system: Stack, chains: dict[str, Chain], spans: dict[str, list[dict[str, Any]]], how: str
) -> None:
    text = json.dumps([*spans[how], *spans_of(system, request_id=chains[how].request_id)])
    assert str(CANARY_ROW) not in text
    assert chains[how].run not in " ".join(span["name"] for span in spans[how])
    assert "url.path" not in text
    assert "url.query" not in text
    addresses = system.addresses
    secrets = [addresses.admin_key, addresses.s3_secret_key, addresses.triton_secret, addresses.run_token_secret, addresses.traces_secret]
    for secret in [*secrets, *addresses.tokens.values(), *system.passwords.values()]:
        assert secret not in text
