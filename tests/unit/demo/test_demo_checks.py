"""What the demo asserts of a rollout and of its client's count ends it when it is not so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.demo.__main__ import DemoFailed, check_ledger, check_stages
from scripts.demo.client import Ledger

ROLLOUT = {"guards": [{"id": "error"}, {"id": "latency_ms>50"}], "reason": "error: the canary is worse, bad are 40.0% of 42"}


def moved(source: str, target: str) -> dict[str, Any]:
    return {"from_state": source, "to_state": target, "evidence_json": ""}


def window(state: str, *, shadow: tuple[int, int] = (0, 0), **bad: int) -> dict[str, Any]:
    compared, errors = shadow
    seen = {"canary": {"units": 9, "bad": bad}, "shadow": {"compared": compared, "errors": errors}}
    return {"from_state": state, "to_state": state, "evidence_json": json.dumps({"window": seen})}


def log(*, shadow_errors: int = 0, compared: int = 200, errors: int = 6) -> list[dict[str, Any]]:
    """The decisions of a rollout; the window that ends a stage is logged before the move, in the state after it."""
    return [
        moved("warming", "shadowing"),
        window("shadowing", shadow=(compared // 2, 0)),
        window("stepping", shadow=(compared // 2, shadow_errors)),
        moved("shadowing", "stepping(0)"),
        window("stepping", error=0),
        window("aborting", error=errors),
        moved("stepping(0)", "aborting"),
        moved("aborting", "rolled_back"),
    ]


def test_a_shadow_that_saw_nothing_and_a_canary_that_did() -> None:
    told = check_stages(ROLLOUT, log())
    assert told == "in the shadow 200 answers compared and none failed; bad in the canary stage: error 6"


@pytest.mark.parametrize(
    ("decisions", "sentence"),
    [
        (log(shadow_errors=1), "seen nothing wrong: 1 errors"),
        (log(compared=0), "must have compared answers"),
        (log(errors=0), "must have seen what it was ended for"),
        ([], "must have compared answers"),
    ],
)
def test_what_must_not_be_ends_the_demo(decisions: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(DemoFailed, match=sentence):
        check_stages(ROLLOUT, decisions)


def test_the_count_is_of_versions_and_of_those_whose_place_was_taken() -> None:
    ledger = Ledger()
    for version, latencies in (("1", [4.0]), ("2", [3.0, 5.0])):
        ledger.latencies_ms[version] += latencies
        ledger.last_request[version] = "r"
    ledger.sent = 3
    ledger.stood_in("2", "v3-g7")
    counted = ledger.as_dict(running=False)
    check_ledger(counted, "1", "2")
    assert (counted["versions"]["2"]["fallbacks"], counted["versions"]["2"]["relieved"]) == (1, 0)
    assert (counted["versions"]["3"]["requests"], counted["versions"]["3"]["relieved"], counted["versions"]["3"]["p99_ms"]) == (0, 1, None)
    with pytest.raises(DemoFailed, match="both versions must have answered"):
        check_ledger(counted, "1", "3")
    ledger.sent += 1
    ledger.fail("503 busy", "2")
    counted = ledger.as_dict(running=False)
    assert (counted["versions"]["2"]["failures"], counted["failures"]) == (1, {"503 busy": 1})
    with pytest.raises(DemoFailed, match="requests failed"):
        check_ledger(counted, "1", "2")
