"""An editor alone makes no gate looser, by whatever sequence of files and deletions; the evaluator's and deployer's own rules judge it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contracts.registry.v1 import service_pb2
from deployer.domain import policy as serving
from evaluator.entrypoints import translate as evaluating
from servicekit.errors import Forbidden

APPROVER: dict[str, Any] = {"user": "app", "roles": ("approver",)}

HEAD = """\
apiVersion: headrace/v1
kind: Delivery
metadata: {name: NAME}
evaluate:
  experiment: EXPERIMENT
  holdout: {dataset: DATASET, version: 1}
"""
STRICT_GATES = """\
  metric: {name: auc, margin: 0.0}
  require: [auc.at_least 0.7, calibration]
promote:
  model: MODEL
  approvals: {production: 2}
"""
NO_GATES = """\
  metric: {name: auc, margin: 1.0}
promote:
  model: MODEL
"""
STRICT_SERVE = "serve: {endpoint: ENDPOINT, rollout: {guards: [{bad: error, margin: 1%, at_most: 2%}]}}\n"
WEAK_SERVE = "serve: {endpoint: ENDPOINT, rollout: {guards: [{bad: error, margin: 90%, at_most: 100%}]}}\n"

EVALUATION = ["evaluate.holdout", "evaluate.metric.margin", "evaluate.require"]
APPROVALS = ["promote.approvals.production"]
GUARDS = ["serve.rollout.guards[0].margin", "serve.rollout.guards[0].at_most"]


def strict(serve: str = STRICT_SERVE, **names: str) -> str:
    return named(HEAD + STRICT_GATES + serve, "frozen", names)


def weak(serve: str = WEAK_SERVE, **names: str) -> str:
    return named(HEAD + NO_GATES + serve, "my-own", names)


def named(text: str, dataset: str, names: dict[str, str]) -> str:
    all_names = {"name": "prod", "experiment": "exp-prod", "model": "fraud", "endpoint": "fraud", "dataset": dataset} | names
    for name, value in all_names.items():
        text = text.replace(name.upper(), value)
    return text


def judged_by_the_deployer(request: service_pb2.ValidateSectionRequest) -> service_pb2.ValidateSectionResponse:
    section = serving.parse(json.loads(request.section_json))
    previous = serving.parse(json.loads(request.previous_json)) if request.previous_json else section
    return service_pb2.ValidateSectionResponse(loosened=[f"serve.{field}" for field in serving.loosened(previous, section)])


@pytest.fixture
async def gated(registry: Any) -> Any:
    """A registry in which `prod` asks for much."""
    registry.peers["evaluate"].judge = evaluating.validated
    registry.peers["serve"].judge = judged_by_the_deployer
    assert (await registry.apply(strict())).outcome == "created"
    return registry


async def delete(registry: Any, name: str) -> None:
    with registry.user("ed", "editor"):
        await registry.stub.DeleteDelivery(service_pb2.DeleteDeliveryRequest(name=name))


async def loosens(registry: Any, yaml: str, fields: list[str]) -> None:
    """An editor is refused for just these fields; nothing is stored."""
    before = await registry.rows("SELECT count(*) FROM delivery_revision")
    assert list((await registry.apply(yaml, dry_run=True)).loosened) == fields
    with pytest.raises(Forbidden) as refused:
        await registry.apply(yaml)
    assert all(field in refused.value.message for field in fields)
    assert await registry.rows("SELECT count(*) FROM delivery_revision") == before


async def test_a_lax_delivery_that_takes_over_a_model_is_held_against_who_had_it(gated: Any) -> None:
    other = {"name": "evil", "experiment": "exp-tmp", "model": "tmp-model"}
    assert (await gated.apply(weak(serve="", **other))).outcome == "created"  # it touches nothing that anybody guards
    await delete(gated, "prod")
    await loosens(gated, weak(name="evil"), EVALUATION + GUARDS + APPROVALS)
    # The same for each of the names alone.
    await loosens(gated, weak(serve="", **other | {"model": "fraud"}), EVALUATION + APPROVALS)
    await loosens(gated, weak(serve="", **other | {"experiment": "exp-prod"}), EVALUATION + APPROVALS)


async def test_a_model_name_never_used_is_no_way_onto_an_endpoint_with_gates(gated: Any) -> None:
    await delete(gated, "prod")
    await loosens(gated, weak(name="fresh", experiment="exp-fresh", model="fresh"), EVALUATION + GUARDS + APPROVALS)
    elsewhere = weak(name="fresh", experiment="exp-fresh", model="fresh", endpoint="fresh")
    assert (await gated.apply(elsewhere)).outcome == "created"
    await loosens(gated, elsewhere.replace("endpoint: fresh", "endpoint: fraud"), EVALUATION + GUARDS + APPROVALS)


async def test_guards_are_not_forgotten_by_a_revision_without_them(gated: Any) -> None:
    assert (await gated.apply(strict(serve=""))).outcome == "changed"
    await loosens(gated, strict(serve=WEAK_SERVE), GUARDS)
    await loosens(gated, strict(serve=WEAK_SERVE, endpoint="another"), GUARDS)
    # Nor by another delivery of the model that leaves them out at first.
    await delete(gated, "prod")
    assert (await gated.apply(strict(serve="", name="second"))).outcome == "created"
    await loosens(gated, strict(serve=WEAK_SERVE, name="second", endpoint="another"), GUARDS)
    assert (await gated.apply(strict(name="second"))).outcome == "changed"


async def test_an_editor_brings_back_what_was_deleted_as_it_was(gated: Any) -> None:
    await delete(gated, "prod")
    back = await gated.apply(strict())
    assert (back.outcome, back.delivery.revision, list(back.loosened)) == ("created", 3, [])
    await delete(gated, "prod")
    renamed = await gated.apply(strict(name="renamed"))
    assert (renamed.outcome, list(renamed.loosened)) == ("created", [])


async def test_an_approver_may_loosen_and_what_counts_from_then_on_is_that(gated: Any) -> None:
    await delete(gated, "prod")
    taken = await gated.apply(weak(name="evil"), **APPROVER)
    assert (taken.outcome, list(taken.loosened)) == ("created", EVALUATION + GUARDS + APPROVALS)
    with gated.user("eve", "viewer"):
        audit = await gated.stub.ListAudit(service_pb2.ListAuditRequest(target="delivery/evil"))
    assert audit.entries[0].actor == "app"
    assert json.loads(audit.entries[0].after_json)["loosened"] == EVALUATION + GUARDS + APPROVALS
    assert list((await gated.apply(weak(name="evil") + "train: {command: [python, train.py]}\n")).loosened) == []
