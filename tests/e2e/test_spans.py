"""Which service leaves which span for one run of the chain, and on which topic: held against the spans that were received."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from localstack.layout import Stack

from tests.e2e.world import GOOD, World, eventually, model_bytes, request_body

# service x span x topic: "" where a span has nothing to do with Kafka.
EXPECTED = [
    ("gateway", "headrace.tracker.v1.TrackerService/FinishRun", ""),
    ("tracker", "headrace.tracker.v1.TrackerService/FinishRun", ""),
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
CANARY_ROW = 0.123456789
"""A value that is in a payload, and must be in no span."""


@pytest.fixture(scope="module")
def chain(system: Stack) -> Iterator[tuple[World, str, str]]:
    """One run of the chain, and one prediction by what it delivered: the world, the run's id, the request's id."""
    world = World(system, "spans-of-a-chain")
    world.apply()
    run = world.finish_run(model_bytes(GOOD, seed=1))
    world.arrives(run, "completed")
    request_id = world.infer(request_body(CANARY_ROW)).headers["x-request-id"]
    yield world, run, request_id
    world.close()


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
def spans(system: Stack, chain: tuple[World, str, str]) -> list[dict[str, Any]]:
    """Every span of the chain, once the last of them has arrived."""
    _, run, _ = chain

    def complete() -> list[dict[str, Any]]:
        found = spans_of(system, run_id=run)
        told = {(span["service"], topic_of(span)) for span in found}
        return found if {("registry", "headrace.deploys"), ("evaluator", "headrace.deploys")} <= told else []

    return list(eventually(complete, 30, "spans of the chain"))


@pytest.mark.parametrize(("service", "name", "topic"), EXPECTED, ids=[f"{service}: {name}" for service, name, _ in EXPECTED])
def test_the_span_was_received(spans: list[dict[str, Any]], service: str, name: str, topic: str) -> None:
    told = {(span["service"], span["name"], topic_of(span)) for span in spans}
    assert (service, name, topic) in told, sorted(told)


def test_the_chain_hangs_together(spans: list[dict[str, Any]]) -> None:
    """From the run's end every service's part is reached by parents and links."""
    known = {(span["trace_id"], span["span_id"]) for span in spans}
    for service in ("evaluator", "registry", "deployer"):
        processed = [span for span in spans if span["service"] == service and span["name"].startswith("process")]
        assert processed
        for span in processed:
            causes = [(span["trace_id"], span["parent_id"]), *((link["trace_id"], link["span_id"]) for link in span["links"])]
            assert known.intersection(causes), f"{service} {span['name']} has no known cause"


def test_a_prediction_reaches_triton_in_one_trace(system: Stack, chain: tuple[World, str, str]) -> None:
    _, _, request_id = chain

    def complete() -> list[dict[str, Any]]:
        found = spans_of(system, request_id=request_id)
        return found if {"gateway", "triton"} <= {span["service"] for span in found} else []

    found = eventually(complete, 30, "spans of gateway and Triton")
    assert len({span["trace_id"] for span in found}) == 1


def test_nothing_of_a_payload_or_a_secret_is_in_a_span(system: Stack, chain: tuple[World, str, str], spans: list[dict[str, Any]]) -> None:
    _, _, request_id = chain
    text = json.dumps([*spans, *spans_of(system, request_id=request_id)])
    assert str(CANARY_ROW) not in text
    addresses = system.addresses
    secrets = [addresses.admin_key, addresses.s3_secret_key, addresses.triton_secret, addresses.run_token_secret, addresses.traces_secret]
    for secret in [*secrets, *addresses.tokens.values(), *system.passwords.values()]:
        assert secret not in text
