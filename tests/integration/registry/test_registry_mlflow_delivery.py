"""One truth: what a client registers over MLflow's API and what an evaluation passes are one version, and its champion is promotion."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.registry.v1 import events_pb2
from eventing import topics

LOGGED = "m-0123456789abcdef0123456789abcdef"


async def refused(call: Any, match: str, code: str = "INVALID_PARAMETER_VALUE") -> None:
    with pytest.raises(Exception, match=match) as caught:
        await call
    assert getattr(caught.value, "code", "") == code, caught.value


async def test_an_evaluation_finds_the_version_that_was_registered_of_its_run(registry: Any) -> None:
    zoe = registry.mlflow("zoe")
    await registry.apply()
    await zoe.model()
    await zoe.version("runs:/r1/other")
    await zoe.version("runs:/r1/model", run_id="r1", description="mine", tags=[{"key": "k", "value": "v"}])
    await zoe.version("runs:/r2/model")
    registry.passes("r1")
    await registry.wait_version(2, "Staging", "rolling out")
    found = await zoe.get(2)
    assert (found["current_stage"], found["status_message"], found["description"], found["source"], found["user_id"]) == (
        "Staging", "rolling out", "mine", "runs:/r1/model", "zoe",
    )  # fmt: skip
    seen = await registry.version(2)
    assert (seen.author, seen.evaluation_id, seen.model) == ("ann", "eval-r1-0", registry.judgement("r1").candidate)
    promoted = events_pb2.ModelPromoted.FromString((await registry.wait_told("model.promoted"))[0].payload)
    assert (promoted.version.version, promoted.model) == (2, registry.judgement("r1").candidate)
    assert [(await zoe.get(number))["current_stage"] for number in (1, 3)] == ["None", "None"]
    actions = [row["action"] for row in await registry.rows("SELECT action FROM audit WHERE target = 'model/flights/2' ORDER BY id")]
    assert actions == ["version.register", "version.evaluated", "version.promote"]
    for statement in (
        "UPDATE model_version SET blob_sha256 = 'x' WHERE number = 2",
        "UPDATE model_version SET run_id = 'x' WHERE number = 2",
    ):
        with pytest.raises(asyncpg.PostgresError, match="is refused"):
            await registry.rows(statement)


async def test_a_logged_model_is_known_by_its_id(registry: Any) -> None:
    zoe = registry.mlflow("zoe")
    await registry.apply()
    await zoe.model()
    await zoe.version(f"models:/{LOGGED}", model_id=LOGGED)
    judgement = registry.judgement("r1")
    judgement.candidate.logged_model_id = LOGGED
    registry.publish(topics.EVALS, "eval.passed", "flights", evaluator_pb.EvalPassed(judgement=judgement))
    await registry.wait_version(1, "Staging", "rolling out")
    assert ((await zoe.get(1))["run_id"], (await zoe.get(1))["model_id"]) == ("r1", LOGGED)


async def test_a_client_registers_what_an_evaluation_has_made_already(registry: Any) -> None:
    zoe = registry.mlflow("zoe")
    await registry.apply()
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "rolling out")
    assert ((await zoe.get(1))["source"], (await zoe.get(1))["user_id"]) == ("runs:/r1/model", "ann")
    mine = await zoe.version("mlflow-artifacts:/1/r1/artifacts/model", run_id="r1", description="mine")
    assert (mine["version"], mine["current_stage"], mine["user_id"], mine["description"]) == ("1", "Staging", "zoe", "mine")
    assert (await zoe.version("runs:/r1/model"))["version"] == "2", "registered once more is another version"
    assert (await zoe.version("runs:/r1/other"))["version"] == "3", "another model of the same run"


async def test_a_version_without_an_evaluation_is_not_promoted_and_says_what_is_missing(registry: Any) -> None:
    zoe, root = registry.mlflow("zoe"), registry.mlflow("root", "admin")
    await zoe.model()
    await zoe.version("runs:/r1/model")
    await zoe.version(f"models:/{LOGGED}")
    await refused(zoe.move(1, "Production"), "no delivery brings flights to production")
    await registry.apply()
    await refused(zoe.move(2, "Production"), "names no run")
    await zoe.move(1, "Staging")
    for one in (zoe, root):
        await refused(one.move(1, "Production"), "has passed no evaluation")
        await refused(one("POST", "registered-models/alias", name="flights", alias="champion", version="1"), "has passed no evaluation")
    failed = evaluator_pb.EvalFailed(judgement=registry.judgement("r1"), reason="auc is 0.4")
    registry.publish(topics.EVALS, "eval.failed", "flights", failed)
    await registry.wait_version(1, "Staging", "auc is 0.4")
    await refused(zoe.move(1, "Production"), "has passed no evaluation .*auc is 0.4")
    assert not [one for one in registry.told() if one.type == "model.promoted"]


async def test_the_champion_and_production_are_promotion_with_its_gates(registry: Any) -> None:
    zoe = registry.mlflow("zoe")
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 1"))
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "waits for 1 approval")
    for call in (zoe.move(1, "Production"), zoe("POST", "registered-models/alias", name="flights", alias="champion", version="1")):
        await refused(call, "waits for 1 approval")
    await refused(registry.mlflow("eve", "viewer").move(1, "Production"), "role", "PERMISSION_DENIED")
    await registry.apply(roles=("approver",))
    registry.passes("r2", revision=2)
    await registry.wait_version(2, "Staging", "rolling out")
    for _ in range(2):
        assert (await zoe.move(2, "Production", archive_existing_versions=True))["status_message"] == "rolling out"
        await zoe("POST", "registered-models/alias", name="flights", alias="champion", version="2")
    registry.deploys("deploy.completed", deployer_pb.DeployCompleted(rollout=await registry.rollout(2), first=True))
    await registry.wait_version(2, "Production")
    for _ in range(2):
        live = await zoe.move(2, "Production")
        await zoe("POST", "registered-models/alias", name="flights", alias="champion", version="2")
    assert (live["current_stage"], live["aliases"]) == ("Production", ["champion"])
    model = (await zoe("GET", "registered-models/get", name="flights"))["registered_model"]
    assert model["aliases"] == [{"alias": "champion", "version": "2"}]
    by_alias = await zoe("GET", "registered-models/alias", name="flights", alias="champion")
    assert by_alias["model_version"]["version"] == "2"
    await refused(zoe("DELETE", "registered-models/alias", name="flights", alias="champion"), "goes with the version in production")
    await refused(zoe.move(2, "Archived"), "is the champion")


async def test_what_is_served_or_on_its_way_is_not_deleted(registry: Any) -> None:
    zoe = registry.mlflow("zoe")

    async def delete(version: int) -> None:
        await zoe("DELETE", "model-versions/delete", name="flights", version=str(version))

    await registry.apply()
    await registry.live("r1", 1)
    await registry.live("r2", 2, champion=1)
    registry.passes("r3", champion=2)
    await registry.wait_version(3, "Staging", "rolling out")
    await refused(delete(2), "is in production")
    await refused(delete(1), "may be reverted to it")
    await refused(delete(3), "is rolling out")
    await refused(zoe("DELETE", "registered-models/delete", name="flights"), "the delivery flight-delays delivers flights")
    await refused(zoe("POST", "registered-models/rename", name="flights", new_name="planes"), "the delivery flight-delays delivers flights")
    await zoe.model("planes")
    await refused(zoe("POST", "registered-models/rename", name="planes", new_name="flights"), "the delivery flight-delays delivers flights")
    ended = deployer_pb.DeployRolledBack(rollout=await registry.rollout(3), cause=deployer_pb.END_CAUSE_HARM)
    registry.deploys("deploy.rolled_back", ended)
    await registry.wait_version(3, "Archived")
    await delete(3)
    registry.passes("r3", champion=2, evaluation="again")
    await registry.caught_up()
    assert (await registry.rows("SELECT deleted FROM model_version WHERE number = 3"))[0]["deleted"], "what was deleted stays so"
    with pytest.raises(asyncpg.PostgresError, match="is refused"):
        await registry.rows("UPDATE model_version SET deleted = false")
    reverted = deployer_pb.DeployReverted(rollout=await registry.rollout(2), to_version=1)
    registry.deploys("deploy.reverted", reverted)
    await registry.wait_version(1, "Production", "back in production")
    await delete(2)
    await refused(zoe.get(2), "not found", "RESOURCE_DOES_NOT_EXIST")
    assert len(await registry.rows("SELECT 1 FROM audit WHERE target = 'model/flights/3'")) >= 4


async def test_of_two_transitions_at_once_the_one_that_cannot_be_is_told(registry: Any) -> None:
    ed, zoe = registry.mlflow("ed"), registry.mlflow("zoe")
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 1"))
    await registry.apply(roles=("approver",))
    registry.passes("r1", revision=1)
    await registry.wait_version(1, "Staging", "waits for 1 approval")
    registry.passes("r2", revision=2)
    await registry.wait_version(2, "Staging", "rolling out")
    ended = deployer_pb.DeployRolledBack(rollout=await registry.rollout(2), cause=deployer_pb.END_CAUSE_DEADLINE)
    registry.deploys("deploy.rolled_back", ended)
    await registry.wait_version(2, "Staging", "deadline")
    answers = await asyncio.gather(ed.move(2, "Production"), zoe.move(2, "Archived"), return_exceptions=True)
    lost = [one for one in answers if isinstance(one, Exception)]
    assert [getattr(one, "code", one) for one in lost] == ["INVALID_PARAMETER_VALUE"]
    assert "is rolling out" in str(lost[0]) or "stands in Archived" in str(lost[0])
    [row] = await registry.rows("SELECT stage, rolling_out FROM model_version WHERE number = 2")
    assert (row["stage"], row["rolling_out"]) in (("Staging", True), ("Archived", False))


async def test_a_renamed_model_is_no_deliverys_any_more(registry: Any) -> None:
    zoe = registry.mlflow("zoe")
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 1"))
    registry.passes("r1")
    first = await registry.wait_version(1, "Staging", "waits for 1 approval")
    await registry.apply(registry.DELIVERY.replace("model: flights", "model: planes"), roles=("approver",))
    await zoe("POST", "registered-models/rename", name="flights", new_name="kites")
    renamed = await registry.version(1, "kites")
    assert renamed.ref.model_id == first.ref.model_id
    await refused(
        zoe("POST", "registered-models/alias", name="kites", alias="champion", version="1"),
        "brings flights to production, not kites",
    )
    await zoe("DELETE", "registered-models/delete", name="kites")
    assert [row["status"] for row in await registry.rows("SELECT status FROM approval")] == ["withdrawn"]
