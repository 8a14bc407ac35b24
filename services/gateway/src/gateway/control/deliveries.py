"""/api/v1 for deliveries and their journeys: the registry, and what every service knows of a run on its way."""

from __future__ import annotations

from contracts.deployer.v1 import service_pb2 as deployer_pb
from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from contracts.registry.v1 import service_pb2 as pb
from contracts.tracker.v1 import service_pb2 as tracker_pb
from fastapi import APIRouter
from pydantic import BaseModel
from servicekit.errors import NotFound

from gateway.control.pages import rollouts_of, versions_of
from gateway.control.peers import Peers
from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["deliveries"])


class Apply(BaseModel):
    yaml: str
    dry_run: bool = False


@router.post("/deliveries/apply", responses=answers(pb.ApplyDeliveryResponse))
async def apply(body: Apply, peers: PeersOf) -> Json:
    return to_json(await peers.registry.ApplyDelivery(pb.ApplyDeliveryRequest(yaml=body.yaml, dry_run=body.dry_run)))


@router.get("/deliveries", responses=answers(pb.ListDeliveriesResponse))
async def list_deliveries(peers: PeersOf) -> Json:
    return to_json(await peers.registry.ListDeliveries(pb.ListDeliveriesRequest()))


@router.get("/deliveries/{name}", responses=answers(pb.GetDeliveryResponse))
async def get_delivery(name: str, peers: PeersOf, revision: int = 0) -> Json:
    return to_json(await peers.registry.GetDelivery(pb.GetDeliveryRequest(name=name, revision=revision)))


@router.delete("/deliveries/{name}", responses=answers(pb.DeleteDeliveryResponse))
async def delete_delivery(name: str, peers: PeersOf) -> Json:
    return to_json(await peers.registry.DeleteDelivery(pb.DeleteDeliveryRequest(name=name)))


@router.get("/deliveries/{name}/journeys")
async def journeys(name: str, peers: PeersOf, run_id: str = "", limit: int = 20) -> Json:
    """Where the delivery's runs are on their way to production, newest first.

    `state` is training, finished, evaluating, failed, skipped, registering, awaiting_approval, rejected, promoted, archived, or the
    state of the rollout: waiting, preparing, warming, shadowing, stepping, completing, completed, aborting, rolled_back, superseded,
    reverting, reverted.
    """
    delivery = (await peers.registry.GetDelivery(pb.GetDeliveryRequest(name=name))).delivery
    request = evaluator_pb.ListEvaluationsRequest(delivery=name, run_id=run_id, page_size=limit)
    evaluations = list((await peers.evaluator.ListEvaluations(request)).evaluations)
    if not evaluations:
        return {"journeys": [await _before_evaluation(peers, run_id)] if run_id else []}
    by_run = await _versions(peers, delivery.model, {evaluation.judgement.journey.run_id for evaluation in evaluations})
    approvals = (await peers.registry.ListApprovals(pb.ListApprovalsRequest(model=delivery.model))).approvals if by_run else []
    newest = await _rollouts(peers, delivery.endpoint, {version.ref.version for version in by_run.values()})
    waiting = {approval.version.version: approval for approval in reversed(approvals)}
    seen: set[str] = set()
    found = []
    for evaluation in evaluations:  # newest first: of several evaluations of one run, the newest counts
        run = evaluation.judgement.journey.run_id
        if run in seen:
            continue
        seen.add(run)
        version = by_run.get(run)
        number = version.ref.version if version else 0
        found.append(_journey(evaluation, version, newest.get(number), waiting.get(number)))
    return {"journeys": found}


async def _before_evaluation(peers: Peers, run_id: str) -> Json:
    run = (await peers.tracker.GetRun(tracker_pb.GetRunRequest(run_id=run_id))).run
    state = {"RUNNING": "training", "SCHEDULED": "training", "FINISHED": "finished"}.get(run.status, "failed")
    waits = "its model is being converted, or the evaluator has not taken it up yet"
    detail = run.reason or (waits if state == "finished" else run.status.lower())
    return {"run_id": run_id, "state": state, "detail": detail}


async def _versions(peers: Peers, model: str, runs: set[str]) -> dict[str, pb.ModelVersion]:
    """The newest version that each of these runs became, by run."""
    found: dict[str, pb.ModelVersion] = {}
    try:
        async for version in versions_of(peers, model):
            if version.journey.run_id in runs:
                found.setdefault(version.journey.run_id, version)
            if len(found) == len(runs):
                break
    except NotFound:  # no candidate has passed yet
        pass
    return found


async def _rollouts(peers: Peers, endpoint: str, versions: set[int]) -> dict[int, deployer_pb.Rollout]:
    """The newest rollout of each of these versions, by version."""
    found: dict[int, deployer_pb.Rollout] = {}
    if not versions:
        return found
    async for rollout in rollouts_of(peers, endpoint):
        number = rollout.ref.version.version
        if number in versions:
            found.setdefault(number, rollout)
        if len(found) == len(versions):
            break
    return found


def _journey(
    evaluation: evaluator_pb.Evaluation,
    version: pb.ModelVersion | None,
    rollout: deployer_pb.Rollout | None,
    approval: pb.Approval | None,
) -> Json:
    journey: Json = {
        "journey_id": evaluation.judgement.journey.journey_id,
        "run_id": evaluation.judgement.journey.run_id,
        "delivery_revision": evaluation.judgement.journey.delivery_revision,
        "evaluation_id": evaluation.evaluation_id,
        "at": evaluation.created_at.ToJsonString(),
    }
    if evaluation.status != "passed":
        state = {"pending": "evaluating", "running": "evaluating"}.get(evaluation.status, evaluation.status)
        return {**journey, "state": state, "detail": evaluation.reason or f"evaluation {evaluation.status}"}
    if version is None:
        return {**journey, "state": "registering", "detail": "evaluation passed"}
    journey |= {"version": version.ref.version, "stage": version.stage}
    if rollout is not None and not _over_and_done(rollout, evaluation):
        journey["rollout_id"] = rollout.ref.rollout_id
        if rollout.stale:
            return {**journey, "state": "evaluating", "detail": rollout.reason}
        return {**journey, "state": rollout.state, "detail": _rollout_detail(rollout)}
    if approval is not None and approval.status in ("pending", "rejected"):
        state = "awaiting_approval" if approval.status == "pending" else "rejected"
        votes = sum(vote.approve for vote in approval.votes)
        return {**journey, "state": state, "detail": f"{votes} of {approval.needed} approvals (headrace approve {approval.approval_id})"}
    if version.stage == "Archived":
        return {**journey, "state": "archived", "detail": version.reason}
    return {**journey, "state": "promoted", "detail": version.reason}


def _over_and_done(rollout: deployer_pb.Rollout, evaluation: evaluator_pb.Evaluation) -> bool:
    """Whether a rollout's verdict was out of date and the version has been evaluated again since: the next rollout counts."""
    return rollout.stale and rollout.evaluation_id != evaluation.evaluation_id


def _rollout_detail(rollout: deployer_pb.Rollout) -> str:
    parts = [f"{rollout.weight_bps / 100:g} % of the traffic"] if rollout.state == "stepping" else []
    parts += [word for word, on in (("paused", rollout.paused), ("held", rollout.held)) if on]
    return ", ".join([*parts, *([rollout.reason] if rollout.reason else [])])
