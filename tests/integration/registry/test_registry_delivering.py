"""Delivery files applied over gRPC: what is wrong is told by line and field and changes nothing, what is right is stored and told once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from contracts.registry.v1 import events_pb2, service_pb2
from eventing import topics
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, TooLarge, Unavailable

APPROVER: dict[str, Any] = {"user": "app", "roles": ("approver",)}


async def counts(registry: Any) -> list[int]:
    """Rows of every table that an apply may write."""
    tables = ("delivery", "delivery_revision", "claim", "audit", "outbox")
    return [(await registry.rows(f"SELECT count(*) FROM {table}"))[0][0] for table in tables]


async def refused(registry: Any, yaml: str, error: type[Exception] = Invalid, **how: Any) -> Any:
    """Applies a file that must be refused, and sees that nothing changed."""
    before = await counts(registry)
    with pytest.raises(error) as caught:
        await registry.apply(yaml, **how)
    assert await counts(registry) == before
    return caught.value


def delete(name: str) -> service_pb2.DeleteDeliveryRequest:
    return service_pb2.DeleteDeliveryRequest(name=name)


async def test_a_file_is_stored_told_and_read_again(registry: Any) -> None:
    applied = await registry.apply()
    assert (applied.outcome, applied.delivery.revision, applied.delivery.applied_by) == ("created", 1, "ed")
    assert applied.diff.count("\n+") == registry.DELIVERY.count("\n") + 1
    told = (await registry.wait_told("delivery.applied", topic=topics.DELIVERIES))[0]
    snapshot = events_pb2.DeliveryApplied.FromString(told.payload)
    assert (told.key, told.sequence, snapshot.revision, snapshot.deleted) == ("flight-delays", 1, 1, False)
    assert snapshot.serve_json == '{"endpoint": "flights", "rollout": {"steps": [{"weight": "5%"}, {"weight": "50%"}]}}'
    assert (snapshot.experiment, snapshot.model, snapshot.endpoint) == ("flight-delays", "flights", "flights")
    with registry.user("eve", "viewer"):
        got = await registry.stub.GetDelivery(service_pb2.GetDeliveryRequest(name="flight-delays"))
        assert got.delivery.yaml == registry.DELIVERY
        assert got.delivery.train_json == '{"command": ["python", "train.py"]}'
        listed = await registry.stub.ListDeliveries(service_pb2.ListDeliveriesRequest())
        assert [one.name for one in listed.deliveries] == ["flight-delays"]
        with pytest.raises(NotFound):
            await registry.stub.GetDelivery(service_pb2.GetDeliveryRequest(name="flight-delays", revision=2))


async def test_the_same_file_again_changes_nothing(registry: Any) -> None:
    await registry.apply()
    before = await counts(registry)
    again = await registry.apply("# only a comment\n" + registry.DELIVERY)
    assert (again.outcome, again.delivery.revision, again.diff) == ("unchanged", 1, "")
    assert await counts(registry) == before


async def test_a_changed_file_is_the_next_revision(registry: Any) -> None:
    await registry.apply()
    changed = await registry.apply(registry.DELIVERY.replace("50%", "25%"))
    assert (changed.outcome, changed.delivery.revision) == ("changed", 2)
    assert "-      - {weight: 50%}\n+      - {weight: 25%}\n" in changed.diff
    told = await registry.wait_told("delivery.applied", 2, topics.DELIVERIES)
    assert [one.sequence for one in told] == [1, 2]
    assert [request.previous_json for request in registry.peers["serve"].asked] == ["", told_serve(told[0])]
    with registry.user("eve", "viewer"):
        first = await registry.stub.GetDelivery(service_pb2.GetDeliveryRequest(name="flight-delays", revision=1))
    assert first.delivery.yaml == registry.DELIVERY


def told_serve(told: Any) -> str:
    return events_pb2.DeliveryApplied.FromString(told.payload).serve_json


async def test_a_dry_run_changes_nothing(registry: Any) -> None:
    before = await counts(registry)
    applied = await registry.apply(dry_run=True)
    assert (applied.outcome, applied.delivery.revision) == ("created", 1)
    assert applied.diff
    assert await counts(registry) == before
    await refused(registry, registry.DELIVERY.replace("kind: Delivery", "kind: X"), dry_run=True)


@pytest.mark.parametrize(
    ("old", "new", "line", "field"),
    [
        ("kind: Delivery", "kind: Service", 2, "kind"),
        ("serve:", "sevre:", 11, "sevre"),
        ("  endpoint: flights", "  endpoint: [flights", 13, "serve.endpoint[0]"),
        ("  model: flights", "  model: *flights", 9, "promote.model"),
        ("  model: flights", "  model: flights\n  model: flights", 10, "promote.model"),
        ("apiVersion: headrace/v1", "apiVersion: !!python/name:os.system headrace/v1", 1, "apiVersion"),
    ],
)
async def test_a_malformed_or_unknown_file_names_line_and_field(registry: Any, old: str, new: str, line: int, field: str) -> None:
    error = await refused(registry, registry.DELIVERY.replace(old, new, 1))
    assert (line, field) in [(violation.line, violation.field) for violation in error.violations]
    assert [violation.line for violation in error.violations] == sorted(violation.line for violation in error.violations)


async def test_what_peers_find_is_told_with_its_line_beside_our_own(registry: Any) -> None:
    def found(field: str, message: str) -> service_pb2.FieldViolation:
        return service_pb2.FieldViolation(field=field, message=message)

    registry.peers["serve"].violations = [
        found("serve.rollout.steps[1].weight", "must be below 50%"),
        found("serve.rollout.deadline", "missing"),
        found("rollout.guards", "missing"),  # counted from the section
    ]
    registry.peers["evaluate"].violations = [found("evaluate.metric", "missing")]
    error = await refused(registry, registry.DELIVERY.replace("production: 0", "production: x"))
    assert [(v.line, v.field, v.message) for v in error.violations] == [
        (6, "evaluate.metric", "missing"),
        (10, "promote.approvals.production", "must be a whole number from 0 to 10"),
        (13, "serve.rollout.deadline", "missing"),
        (13, "serve.rollout.guards", "missing"),
        (16, "serve.rollout.steps[1].weight", "must be below 50%"),
    ]
    registry.peers["serve"].violations, registry.peers["evaluate"].violations = [], []
    assert (await registry.apply()).outcome == "created"


async def test_only_sections_that_are_there_are_validated(registry: Any) -> None:
    await registry.apply(registry.DELIVERY[: registry.DELIVERY.index("serve:")])
    assert len(registry.peers["evaluate"].asked) == 1
    assert registry.peers["serve"].asked == []


async def test_a_peer_that_is_away_stops_a_good_file_and_not_the_report_of_a_wrong_one(registry: Any) -> None:
    await registry.servers["serve"].stop(0)
    await refused(registry, registry.DELIVERY, Unavailable)
    registry.peers["train"].violations = [service_pb2.FieldViolation(field="train.command", message="is empty")]
    error = await refused(registry, registry.DELIVERY, Invalid)
    assert [(v.line, v.field) for v in error.violations] == [(5, "train.command")]


async def test_a_second_file_cannot_claim_the_same(registry: Any) -> None:
    await registry.apply()
    second = registry.DELIVERY.replace("{name: flight-delays}", "{name: other}")
    error = await refused(registry, second)
    assert [(v.line, v.field, v.message) for v in error.violations] == [
        (7, "evaluate.experiment", "the experiment flight-delays belongs to the delivery flight-delays"),
        (9, "promote.model", "the model flights belongs to the delivery flight-delays"),
        (12, "serve.endpoint", "the endpoint flights belongs to the delivery flight-delays"),
    ]
    only_endpoint = second.replace("experiment: flight-delays", "experiment: other").replace("model: flights", "model: other")
    error = await refused(registry, only_endpoint)
    assert [(v.line, v.field) for v in error.violations] == [(12, "serve.endpoint")]
    assert (await registry.apply(only_endpoint.replace("endpoint: flights", "endpoint: other"))).outcome == "created"


async def test_two_who_claim_the_same_at_once(registry: Any) -> None:
    files = [registry.DELIVERY.replace("{name: flight-delays}", f"{{name: d{n}}}") for n in range(6)]
    outcomes = await asyncio.gather(*(registry.apply(file) for file in files), return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 1
    assert all(isinstance(outcome, Invalid) for outcome in outcomes if isinstance(outcome, Exception))
    assert len(await registry.rows("SELECT 1 FROM claim")) == 3


async def test_two_who_change_the_same_delivery_at_once(registry: Any) -> None:
    await registry.apply()
    files = [registry.DELIVERY.replace("50%", f"{30 + n}%") for n in range(3)]
    outcomes = await asyncio.gather(*(registry.apply(file) for file in files), return_exceptions=True)
    assert all(isinstance(outcome, Conflict) or getattr(outcome, "outcome", "") == "changed" for outcome in outcomes)
    changed = sum(not isinstance(outcome, Exception) for outcome in outcomes)
    told = await registry.wait_told("delivery.applied", 1 + changed, topics.DELIVERIES)
    assert [one.sequence for one in told] == list(range(1, 2 + changed))


async def test_loosening_a_gate_needs_an_approver_and_is_recorded(registry: Any) -> None:
    strict = registry.DELIVERY.replace("production: 0", "production: 2")
    await registry.apply(strict)
    registry.peers["evaluate"].loosened = ["evaluate.metric.margin"]
    error = await refused(registry, registry.DELIVERY, Forbidden)
    assert "evaluate.metric.margin, promote.approvals.production" in error.message
    preview = await registry.apply(registry.DELIVERY, dry_run=True)
    assert list(preview.loosened) == ["evaluate.metric.margin", "promote.approvals.production"]
    assert (await registry.apply(registry.DELIVERY, **APPROVER)).outcome == "changed"
    with registry.user("eve", "viewer"):
        audit = await registry.stub.ListAudit(service_pb2.ListAuditRequest(target="delivery/flight-delays"))
    assert audit.entries[0].actor == "app"
    assert '"loosened": ["evaluate.metric.margin", "promote.approvals.production"]' in audit.entries[0].after_json


async def test_a_deleted_delivery_frees_its_claims_but_not_its_gates(registry: Any) -> None:
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 2"))
    with registry.user("ed", "editor"):
        await registry.stub.DeleteDelivery(delete("flight-delays"))
        await registry.stub.DeleteDelivery(delete("flight-delays"))
        with pytest.raises(NotFound):
            await registry.stub.DeleteDelivery(delete("never"))
        with pytest.raises(NotFound):
            await registry.stub.GetDelivery(service_pb2.GetDeliveryRequest(name="flight-delays"))
    told = await registry.wait_told("delivery.applied", 2, topics.DELIVERIES)
    gone = events_pb2.DeliveryApplied.FromString(told[-1].payload)
    assert (gone.deleted, gone.revision, gone.serve_json, gone.endpoint) == (True, 2, "", "flights")
    # The same model under another name, with fewer approvals: looser than what it was.
    renamed = registry.DELIVERY.replace("{name: flight-delays}", "{name: other}")
    await refused(registry, renamed, Forbidden)
    await refused(registry, registry.DELIVERY, Forbidden)
    assert (await registry.apply(renamed, **APPROVER)).outcome == "created"


async def test_a_deleted_delivery_comes_back_with_the_next_revision(registry: Any) -> None:
    await registry.apply()
    with registry.user("ed", "editor"):
        await registry.stub.DeleteDelivery(delete("flight-delays"))
    back = await registry.apply()
    assert (back.outcome, back.delivery.revision) == ("created", 3)
    told = await registry.wait_told("delivery.applied", 3, topics.DELIVERIES)
    assert [one.sequence for one in told] == [1, 2, 3]


async def test_a_file_that_is_too_large(registry: Any) -> None:
    await refused(registry, registry.DELIVERY + "# " + "x" * 70_000, TooLarge)


async def test_viewers_and_other_services_apply_nothing(registry: Any) -> None:
    await refused(registry, registry.DELIVERY, Forbidden, user="eve", roles=("viewer",))
    await refused(registry, registry.DELIVERY, Forbidden, user="run", roles=())
