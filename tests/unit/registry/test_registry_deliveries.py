"""Delivery files: the head, the section promote, claims, revisions, and what counts as a change or as looser."""

from __future__ import annotations

from datetime import UTC, datetime
from textwrap import dedent

import pytest
from registry.domain import deliveries
from registry.domain.deliveries import Claim, DeliveryFile, read
from registry.domain.errors import Problem

NOW = datetime(2026, 1, 1, tzinfo=UTC)

FLIGHTS = dedent("""\
    apiVersion: headrace/v1
    kind: Delivery
    metadata: {name: flight-delays}
    train:
      command: [python, train.py]
    evaluate:
      experiment: flight-delays
      metric: {name: auc, goal: maximize, margin: 0.0}
    promote:
      model: flight-delays
      approvals: {production: 1}
    serve:
      endpoint: flights
      rollout:
        window: 1s
    """)


def good(text: str) -> DeliveryFile:
    file, problems = read(text)
    assert problems == []
    return file


def wrong(text: str) -> list[Problem]:
    return read(text)[1]


def test_a_good_file() -> None:
    file = good(FLIGHTS)
    assert (file.name, file.experiment, file.model, file.endpoint, file.approvals) == (
        "flight-delays",
        "flight-delays",
        "flight-delays",
        "flights",
        1,
    )
    assert set(file.sections) == {"train", "evaluate", "promote", "serve"}
    assert file.sections["serve"] == '{"endpoint": "flights", "rollout": {"window": "1s"}}'
    assert file.claims == (Claim("experiment", "flight-delays"), Claim("model", "flight-delays"), Claim("endpoint", "flights"))


def test_train_and_serve_may_be_left_out() -> None:
    file = good(FLIGHTS[: FLIGHTS.index("serve:")].replace("train:\n  command: [python, train.py]\n", ""))
    assert set(file.sections) == {"evaluate", "promote"}
    assert [claim.kind for claim in file.claims] == ["experiment", "model"]


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "says"),
    [
        ("headrace/v1", "headrace/v2", 1, "apiVersion", "must be headrace/v1"),
        ("apiVersion: headrace/v1\n", "", 1, "apiVersion", "missing"),
        ("kind: Delivery", "kind: Pod", 2, "kind", "must be Delivery"),
        ("{name: flight-delays}", "{name: Flight_Delays}", 3, "metadata.name", "lower-case"),
        ("{name: flight-delays}", "{}", 3, "metadata.name", "missing"),
        ("{name: flight-delays}", "{name: 7}", 3, "metadata.name", "quotes"),
        ("{name: flight-delays}", "flight-delays", 3, "metadata", "mapping"),
        ("{name: flight-delays}", "{name: x, labels: {a: b}}", 3, "metadata.labels", "unknown field; known are name"),
        ("serve:", "server:", 12, "server", "did you mean serve?"),
        ("  experiment: flight-delays\n", "", 6, "evaluate.experiment", "missing"),
        ("experiment: flight-delays", "experiment: ''", 7, "evaluate.experiment", "empty"),
        ("experiment: flight-delays", 'experiment: " x"', 7, "evaluate.experiment", "printable"),
        ("  model: flight-delays\n", "", 9, "promote.model", "missing"),
        ("  model: flight-delays", "  model: a/b", 10, "promote.model", "letters, digits"),
        ("{production: 1}", "{production: -1}", 11, "promote.approvals.production", "from 0 to 10"),
        ("{production: 1}", "{production: true}", 11, "promote.approvals.production", "from 0 to 10"),
        ("{production: 1}", "{production: 11}", 11, "promote.approvals.production", "from 0 to 10"),
        ("{production: 1}", "{staging: 1}", 11, "promote.approvals.staging", "known are production"),
        ("{production: 1}", "2", 11, "promote.approvals", "mapping like"),
        ("  endpoint: flights\n", "", 12, "serve.endpoint", "missing"),
        ("approvals:", "aprovals:", 11, "promote.aprovals", "did you mean approvals?"),
    ],
)
def test_a_wrong_file_names_line_and_field(old: str, new: str, line: int, field: str, says: str) -> None:
    assert old in FLIGHTS
    found = {problem.field: problem for problem in wrong(FLIGHTS.replace(old, new, 1))}
    assert found[field].line == line
    assert says in found[field].message


def test_a_section_that_is_missing_or_no_mapping_is_one_problem() -> None:
    without = FLIGHTS[: FLIGHTS.index("promote:")] + FLIGHTS[FLIGHTS.index("serve:") :]
    assert [(p.field, p.message) for p in wrong(without)] == [("promote", "missing")]
    assert [p.field for p in wrong(FLIGHTS.replace("serve:\n  endpoint: flights\n  rollout:\n    window: 1s", "serve: 5"))] == ["serve"]


def test_everything_wrong_is_told_at_once() -> None:
    text = (
        FLIGHTS.replace("kind: Delivery", "kind: X").replace("production: 1", "production: x").replace("endpoint: flights", "endpoint: ''")
    )
    assert [problem.field for problem in wrong(text)] == ["kind", "promote.approvals.production", "serve.endpoint"]


def test_comments_order_and_layout_are_no_change() -> None:
    revision = deliveries.revise(good(FLIGHTS), None, "ann", NOW)
    again = FLIGHTS.replace("kind: Delivery\n", "").replace("apiVersion", "# hello\nkind: Delivery\napiVersion")
    assert deliveries.same(good(again), revision)
    assert not deliveries.same(good(FLIGHTS.replace("1s", "2s")), revision)
    assert not deliveries.same(good(FLIGHTS.replace("production: 1", "production: 2")), revision)
    assert not deliveries.same(good(FLIGHTS), deliveries.delete(revision, "ann", NOW))


def test_fewer_approvals_are_looser() -> None:
    before = deliveries.revise(good(FLIGHTS), None, "ann", NOW)
    assert deliveries.loosened(good(FLIGHTS.replace("production: 1", "production: 0")), [before]) == ["promote.approvals.production"]
    assert deliveries.loosened(good(FLIGHTS.replace("production: 1", "production: 2")), [before]) == []
    assert deliveries.loosened(good(FLIGHTS), []) == []
    # One that was stricter is enough, whichever of them it is.
    lax = deliveries.revise(good(FLIGHTS.replace("production: 1", "production: 0")), None, "eve", NOW)
    assert deliveries.loosened(good(FLIGHTS.replace("production: 1", "production: 0")), [lax, before]) == ["promote.approvals.production"]


def test_revisions_count_on_through_a_deletion() -> None:
    first = deliveries.revise(good(FLIGHTS), None, "ann", NOW)
    gone = deliveries.delete(first, "bob", NOW)
    back = deliveries.revise(good(FLIGHTS), gone, "ann", NOW)
    assert [first.revision, gone.revision, back.revision] == [1, 2, 3]
    assert gone.deleted
    assert gone.claims == ()
    assert gone.sections == first.sections
    assert back.claims == good(FLIGHTS).claims


def test_the_difference_is_a_unified_diff() -> None:
    before = deliveries.revise(good(FLIGHTS), None, "ann", NOW)
    changed = deliveries.difference(good(FLIGHTS.replace("window: 1s", "window: 2s")), before)
    assert "-    window: 1s\n+    window: 2s\n" in changed
    assert changed.startswith("--- flight-delays (revision 1)\n+++ flight-delays (new)\n")
    assert deliveries.difference(good(FLIGHTS), before) == ""
    assert deliveries.difference(good(FLIGHTS), None).count("\n+") == FLIGHTS.count("\n") + 1  # the lines, and the +++ above them


def test_a_taken_claim_names_its_holder_and_its_line() -> None:
    held = {Claim("endpoint", "flights"): "other", Claim("model", "flight-delays"): "third"}
    found = deliveries.taken(good(FLIGHTS).document, held)
    assert [(p.line, p.field, p.message) for p in found] == [
        (13, "serve.endpoint", "the endpoint flights belongs to the delivery other"),
        (10, "promote.model", "the model flight-delays belongs to the delivery third"),
    ]
