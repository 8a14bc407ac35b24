"""From eval.passed to production and out of it: what events do to versions, once each, with every row in the audit log."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.eventing.v1 import service_pb2 as dlq_pb
from contracts.eventing.v1 import service_pb2_grpc as dlq_grpc
from contracts.registry.v1 import events_pb2, service_pb2
from eventing import topics
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_passed_evaluation_is_registered_promoted_and_goes_live(registry: Any) -> None:
    await registry.apply()
    registry.passes("r1", traceparent=TRACE)
    version = await registry.wait_version(1, "Staging", "rolling out")
    told = (await registry.wait_told("model.promoted"))[0]
    assert [(one.type, one.sequence) for one in registry.told()] == [("model.registered", 1), ("model.promoted", 2)]
    assert told.key == version.ref.model_id
    assert told.traceparent[:36] == TRACE[:36], "one chain is one trace"
    promoted = events_pb2.ModelPromoted.FromString(told.payload)
    assert promoted.model == registry.judgement("r1").candidate
    assert (promoted.endpoint, promoted.champion_version, promoted.journey.delivery_revision) == ("flights", 0, 1)
    assert promoted.promoted_by.startswith("event:eval.passed:")
    assert (version.author, version.report_key, version.evaluation_id) == ("ann", "report.html", "eval-r1-0")
    assert '"commit": "abc"' in version.provenance_json

    registry.deploys("deploy.canary", deployer_pb.DeployCanary(rollout=await registry.rollout(1), weight_bps=500))
    await registry.wait_version(1, "Staging", "rolling out: canary with 5 % of the traffic")
    registry.deploys("deploy.advanced", deployer_pb.DeployAdvanced(rollout=await registry.rollout(1), step=1, weight_bps=2500))
    await registry.wait_version(1, "Staging", "rolling out: step 2 with 25 % of the traffic")
    registry.deploys("deploy.completed", deployer_pb.DeployCompleted(rollout=await registry.rollout(1), first=True))
    live = await registry.wait_version(1, "Production", "in production: the first version")
    assert list(live.aliases) == ["champion"]


async def test_completion_archives_the_champion_before_and_reverting_brings_it_back(registry: Any) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    await registry.live("r2", 2, champion=1)
    old = await registry.version(1)
    assert (old.stage, old.reason, list(old.aliases)) == ("Archived", "replaced by version 2", [])
    archived = events_pb2.ModelArchived.FromString((await registry.wait_told("model.archived"))[0].payload)
    assert (archived.version.version, archived.reason) == (1, "replaced by version 2")
    with registry.user("eve", "viewer"):
        champion = await registry.stub.GetVersion(service_pb2.GetVersionRequest(model="flights", alias="champion"))
        models = await registry.stub.ListModels(service_pb2.ListModelsRequest())
    assert champion.version.ref.version == 2
    assert [(one.name, one.latest_version, one.champion_version) for one in models.models] == [("flights", 2, 2)]

    reverted = deployer_pb.DeployReverted(rollout=await registry.rollout(2), to_version=1, reason="pager")
    registry.deploys("deploy.reverted", reverted)
    assert list((await registry.wait_version(1, "Production", "reverted")).aliases) == ["champion"]
    taken_back = await registry.version(2)
    assert (taken_back.stage, taken_back.reason, list(taken_back.aliases)) == ("Archived", "reverted to version 1: pager", [])


@pytest.mark.parametrize(
    ("cause", "stage", "words"),
    [
        (deployer_pb.END_CAUSE_HARM, "Archived", "worse than the version in production (error +7 %)"),
        (deployer_pb.END_CAUSE_DEADLINE, "Staging", "deadline (error +7 %)"),
        (deployer_pb.END_CAUSE_RUNTIME, "Staging", "runtime"),
        (deployer_pb.END_CAUSE_OPERATOR, "Staging", "stopped by an operator"),
        (deployer_pb.END_CAUSE_INTERFERENCE, "Staging", "interference"),
        (deployer_pb.END_CAUSE_ARTIFACT, "Staging", "artifact"),
        (deployer_pb.END_CAUSE_SUPERSEDED, "Staging", "superseded"),
        (deployer_pb.END_CAUSE_BREACH, "Staging", "the endpoint as a whole was bad"),
    ],
)
async def test_how_a_rollout_ended_decides_where_the_version_stands(registry: Any, cause: int, stage: str, words: str) -> None:
    await registry.apply()
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "rolling out")
    ended = deployer_pb.DeployRolledBack(rollout=await registry.rollout(1), cause=cause, reason="error +7 %")  # type: ignore[arg-type]
    registry.deploys("deploy.rolled_back", ended)
    await registry.wait_version(1, stage, words)
    assert [one.type for one in registry.told() if one.type == "model.archived"] == (["model.archived"] if stage == "Archived" else [])


async def test_a_version_that_the_live_one_supersedes_is_evaluated_again(registry: Any) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    registry.passes("r2", champion=1)
    registry.passes("r3", champion=1)
    await registry.wait_version(3, "Staging", "rolling out")
    registry.deploys("deploy.completed", deployer_pb.DeployCompleted(rollout=await registry.rollout(2)))
    registry.deploys("deploy.superseded", deployer_pb.DeploySuperseded(rollout=await registry.rollout(3), by_version=2))
    await registry.wait_version(3, "Staging", "judged against version 1, but the champion is version 2: evaluated again")
    assert [one.type for one in registry.told()].count("model.reevaluation_requested") == 1


async def test_an_alarm_stands_with_the_version_in_production(registry: Any) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    alarm = deployer_pb.DeployAlarmed(rollout=await registry.rollout(1), reason="error: bad are 9.0% of 400", revertible=False)
    registry.deploys("deploy.alarmed", alarm)
    alarmed = await registry.wait_version(1, "Production", "in production, with an alarm: error: bad are 9.0% of 400")
    assert list(alarmed.aliases) == ["champion"]


async def test_superseded_goes_back_to_staging(registry: Any) -> None:
    await registry.apply()
    registry.passes("r1")
    registry.passes("r2")
    await registry.wait_version(2, "Staging", "rolling out")
    registry.deploys("deploy.superseded", deployer_pb.DeploySuperseded(rollout=await registry.rollout(1), by_version=2))
    await registry.wait_version(1, "Staging", "superseded by version 2")


async def test_events_that_come_again_make_no_second_version(registry: Any) -> None:
    await registry.apply()
    registry.passes("r1", again=3)
    await registry.wait_version(1, "Staging", "rolling out")
    # Another event that says the same: the same evaluation of the same run.
    registry.passes("r1")
    completed = deployer_pb.DeployCompleted(rollout=await registry.rollout(1), first=True)
    registry.deploys("deploy.completed", completed, again=3)
    registry.deploys("deploy.completed", completed)
    await registry.wait_version(1, "Production")
    await registry.caught_up()
    assert [row["number"] for row in await registry.rows("SELECT number FROM model_version")] == [1]
    assert [one.type for one in registry.told()] == ["model.registered", "model.promoted"]
    assert len(await registry.rows("SELECT 1 FROM audit WHERE action = 'version.stage'")) == 1


async def test_a_changed_champion_asks_for_reevaluation_and_the_same_version_goes_on(registry: Any) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    registry.passes("r2", champion=0)  # judged before version 1 was champion
    await registry.wait_version(2, "Staging", "evaluated again")
    again = events_pb2.ModelReevaluationRequested.FromString((await registry.wait_told("model.reevaluation_requested"))[0].payload)
    assert (again.champion_version, again.evaluation_id, again.journey.run_id) == (1, "eval-r2-0", "r2")
    registry.passes("r2", champion=1)
    version = await registry.wait_version(2, "Staging", "rolling out")
    assert version.evaluation_id == "eval-r2-1"
    assert len(await registry.rows("SELECT 1 FROM model_version")) == 2


@pytest.mark.parametrize("kind", ["eval.failed", "eval.skipped"])
async def test_a_version_that_fails_when_evaluated_again_stays_with_the_reason(registry: Any, kind: str) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    registry.passes("r2", champion=0)
    await registry.wait_version(2, "Staging", "evaluated again")
    failed = evaluator_pb.EvalFailed(judgement=registry.judgement("r2", 1), reason="auc fell")
    skipped = evaluator_pb.EvalSkipped(journey=registry.judgement("r2").journey, model="flights", reason="auc fell")
    registry.publish(topics.EVALS, kind, "flights", failed if kind == "eval.failed" else skipped)
    await registry.wait_version(2, "Staging", "auc fell")


async def test_a_candidate_that_never_passed_leaves_nothing(registry: Any) -> None:
    await registry.apply()
    failed = evaluator_pb.EvalFailed(judgement=registry.judgement("r1"), reason="auc fell")
    registry.publish(topics.EVALS, "eval.failed", "flights", failed)
    await registry.caught_up()
    assert await registry.rows("SELECT 1 FROM model") == []


async def test_nothing_is_promoted_by_a_deleted_delivery(registry: Any) -> None:
    await registry.apply()
    with registry.user("ed", "editor"):
        await registry.stub.DeleteDelivery(service_pb2.DeleteDeliveryRequest(name="flight-delays"))
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "the delivery flight-delays was deleted")
    with registry.user("root", "admin"), pytest.raises(Conflict, match="was deleted"):
        await registry.stub.PromoteModel(service_pb2.PromoteModelRequest(model="flights", version=1, override=True))


async def test_a_journey_keeps_the_revision_it_began_with(registry: Any) -> None:
    await registry.apply()
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 1"))
    registry.passes("r1", revision=1)
    await registry.wait_version(1, "Staging", "rolling out")
    registry.passes("r2", revision=2)
    await registry.wait_version(2, "Staging", "waits for 1 approval")
    await registry.apply(registry.DELIVERY.replace("endpoint: flights", "endpoint: planes"), roles=("approver",))
    registry.passes("r3", revision=1)
    await registry.wait_version(3, "Staging", "no longer brings flights to flights")


async def test_what_cannot_be_is_parked_and_can_be_dropped(registry: Any) -> None:
    await registry.apply()
    registry.publish(topics.EVALS, "eval.passed", "flights", b"\xff\xff")
    registry.passes("r1", revision=9)  # parked behind it, and wrong itself: there is no such revision
    registry.passes("r2")
    await registry.caught_up()
    letters = dlq_grpc.DeadLetterServiceStub(registry.channel)
    with registry.user("root", "admin"):
        found = await letters.ListDeadLetters(dlq_pb.ListDeadLettersRequest())
        assert [(one.consumer, one.key, one.sequence) for one in found.dead_letters] == [("registry", "flights", n) for n in (1, 2, 3)]
        for sequence in (1, 2):
            await letters.DropDeadLetter(
                dlq_pb.DropDeadLetterRequest(
                    consumer="registry", topic=topics.EVALS, key="flights", sequence=sequence, reason="was no judgement"
                )
            )
        replayed = await letters.ReplayDeadLetters(dlq_pb.ReplayDeadLettersRequest(consumer="registry", topic=topics.EVALS, key="flights"))
    assert (replayed.applied, replayed.remaining) == (1, 0)
    await registry.wait_version(1, "Staging", "rolling out")
    with registry.user("ed", "editor"), pytest.raises(Forbidden):
        await letters.ReplayDeadLetters(dlq_pb.ReplayDeadLettersRequest(consumer="registry", topic=topics.EVALS, key="flights"))


async def test_a_rollout_of_a_version_nobody_knows_is_parked(registry: Any) -> None:
    await registry.apply()
    unknown = events_pb2.VersionRef(model_id="00000000-0000-7000-8000-000000000001", model="flights", version=1)
    rollout = deployer_pb.RolloutRef(rollout_id="x", endpoint="flights", version=unknown)
    registry.deploys("deploy.completed", deployer_pb.DeployCompleted(rollout=rollout))
    await registry.caught_up()
    rows = await registry.rows("SELECT reason FROM parked_event")
    assert [row["reason"] for row in rows] == ["NotFound: there is no model 00000000-0000-7000-8000-000000000001"]


async def test_promotion_stages_and_aliases_by_hand(registry: Any) -> None:
    await registry.apply()
    await registry.live("r1", 1)
    registry.passes("r2", champion=1)
    await registry.wait_version(2, "Staging", "rolling out")
    ended = deployer_pb.DeployRolledBack(rollout=await registry.rollout(2), cause=deployer_pb.END_CAUSE_DEADLINE)
    registry.deploys("deploy.rolled_back", ended)
    await registry.wait_version(2, "Staging", "deadline")
    stub = registry.stub
    with registry.user("ed", "editor"):
        promoted = await stub.PromoteModel(service_pb2.PromoteModelRequest(model="flights", version=2, reason="again"))
        assert promoted.version.reason == "rolling out"
        with pytest.raises(Conflict, match="abort the rollout"):
            await stub.SetStage(service_pb2.SetStageRequest(model="flights", version=2, stage="Archived"))
        with pytest.raises(Conflict, match="is the champion"):
            await stub.SetStage(service_pb2.SetStageRequest(model="flights", version=1, stage="Archived"))
        with pytest.raises(Invalid):
            await stub.SetStage(service_pb2.SetStageRequest(model="flights", version=1, stage="Prod"))
        with pytest.raises(NotFound):
            await stub.PromoteModel(service_pb2.PromoteModelRequest(model="flights", version=7))
        with pytest.raises(Forbidden, match="admin"):
            await stub.PromoteModel(service_pb2.PromoteModelRequest(model="flights", version=2, override=True))
        # The alias and the stage of the champion are promotion by other names.
        assert (await stub.SetAlias(service_pb2.SetAliasRequest(model="flights", alias="champion", version=2))).version.stage == "Staging"
        staged = await stub.SetStage(service_pb2.SetStageRequest(model="flights", version=2, stage="Production"))
        assert staged.version.reason == "rolling out"
        blue = await stub.SetAlias(service_pb2.SetAliasRequest(model="flights", alias="blue", version=1))
        assert list(blue.version.aliases) == ["champion", "blue"]
        await stub.DeleteAlias(service_pb2.DeleteAliasRequest(model="flights", alias="blue"))
        await stub.DeleteAlias(service_pb2.DeleteAliasRequest(model="flights", alias="blue"))
        with pytest.raises(Conflict):
            await stub.DeleteAlias(service_pb2.DeleteAliasRequest(model="flights", alias="champion"))
    told = await registry.wait_told("model.promoted", 3)
    last = events_pb2.ModelPromoted.FromString(told[-1].payload)
    assert (last.promoted_by, last.champion_version) == ("ed", 1)


async def test_an_admin_passes_the_gates_by_and_it_is_recorded(registry: Any) -> None:
    await registry.apply(registry.DELIVERY.replace("production: 0", "production: 2"))
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "waits for 2 approvals")
    with registry.user("root", "admin"):
        request = service_pb2.PromoteModelRequest(model="flights", version=1, reason="fire", override=True)
        assert (await registry.stub.PromoteModel(request)).version.reason == "rolling out: the gates were passed by"
        audit = await registry.stub.ListAudit(service_pb2.ListAuditRequest(target="model/flights/1", page_size=1))
        approvals = await registry.stub.ListApprovals(service_pb2.ListApprovalsRequest())
    entry = audit.entries[0]
    assert (entry.actor, entry.action, entry.reason) == ("root", "version.promote", "fire")
    assert '"override": true' in entry.after_json
    assert [one.status for one in approvals.approvals] == ["withdrawn"]


async def test_the_audit_log_and_what_a_version_is_cannot_be_rewritten(registry: Any) -> None:
    await registry.apply()
    registry.passes("r1")
    await registry.wait_version(1, "Staging", "rolling out")
    for statement in (
        "UPDATE audit SET actor = 'nobody'",
        "DELETE FROM audit",
        "TRUNCATE audit",
        "UPDATE delivery_revision SET yaml = ''",
        "DELETE FROM delivery_revision",
        "DELETE FROM model_version",
        "UPDATE model_version SET blob_sha256 = 'x'",
        "UPDATE model_version SET author = 'x'",
    ):
        with pytest.raises(asyncpg.PostgresError, match=r"append-only|is refused"):
            await registry.rows(statement)
    actions = [row["action"] for row in await registry.rows("SELECT action FROM audit ORDER BY id")]
    assert actions == ["delivery.apply", "version.register", "version.promote"]


async def test_pages_of_versions_and_of_the_audit_log(registry: Any) -> None:
    await registry.apply()
    for number in range(1, 6):
        registry.passes(f"r{number}")
    await registry.wait_version(5, "Staging", "rolling out")
    with registry.user("eve", "viewer"):
        numbers, token = [], ""
        while True:
            request = service_pb2.ListVersionsRequest(model="flights", page_size=2, page_token=token)
            page = await registry.stub.ListVersions(request)
            numbers += [one.ref.version for one in page.versions]
            token = page.next_page_token
            if not token:
                break
        assert numbers == [5, 4, 3, 2, 1]
        first = await registry.stub.ListAudit(service_pb2.ListAuditRequest(page_size=4))
        rest = await registry.stub.ListAudit(service_pb2.ListAuditRequest(page_token=first.next_page_token))
        assert [entry.id for entry in (*first.entries, *rest.entries)] == list(range(11, 0, -1))
        with pytest.raises(NotFound):
            await registry.stub.ListVersions(service_pb2.ListVersionsRequest(model="unknown"))
        with pytest.raises(Invalid):
            await registry.stub.ListAudit(service_pb2.ListAuditRequest(page_token="x"))
