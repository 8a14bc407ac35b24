"""/api/v1 for models, versions, approvals, evaluations and the lineage of a version: the registry and the evaluator."""

from __future__ import annotations

from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from contracts.registry.v1 import service_pb2 as pb
from fastapi import APIRouter
from pydantic import BaseModel, Field

from gateway.control.lineage import lineage_of
from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["models"])


class Promote(BaseModel):
    reason: str = ""
    override: bool = Field(default=False, description="Admins only: pass the gates by. Recorded.")


class Stage(BaseModel):
    stage: str = Field(description="Development, Staging or Archived.")
    reason: str = ""


class Alias(BaseModel):
    version: int


class Vote(BaseModel):
    approve: bool
    comment: str = ""


@router.get("/models", responses=answers(pb.ListModelsResponse))
async def list_models(peers: PeersOf) -> Json:
    return to_json(await peers.registry.ListModels(pb.ListModelsRequest()))


@router.get("/models/{model}/versions", responses=answers(pb.ListVersionsResponse))
async def list_versions(model: str, peers: PeersOf, page_size: int = 100, page_token: str = "") -> Json:
    return to_json(await peers.registry.ListVersions(pb.ListVersionsRequest(model=model, page_size=page_size, page_token=page_token)))


@router.get("/models/{model}/versions/{version}", responses=answers(pb.GetVersionResponse))
async def get_version(model: str, version: int, peers: PeersOf) -> Json:
    return to_json(await peers.registry.GetVersion(pb.GetVersionRequest(model=model, version=version)))


@router.get("/models/{model}/versions/{version}/lineage")
async def get_lineage(model: str, version: int, peers: PeersOf) -> Json:
    """From a version back to its evaluation, run, data and commit."""
    return await lineage_of(peers, model, version)


@router.post("/models/{model}/versions/{version}/promote", responses=answers(pb.PromoteModelResponse))
async def promote(model: str, version: int, body: Promote, peers: PeersOf) -> Json:
    request = pb.PromoteModelRequest(model=model, version=version, reason=body.reason, override=body.override)
    return to_json(await peers.registry.PromoteModel(request))


@router.post("/models/{model}/versions/{version}/stage", responses=answers(pb.SetStageResponse))
async def set_stage(model: str, version: int, body: Stage, peers: PeersOf) -> Json:
    return to_json(await peers.registry.SetStage(pb.SetStageRequest(model=model, version=version, stage=body.stage, reason=body.reason)))


@router.get("/models/{model}/aliases/{alias}", responses=answers(pb.GetVersionResponse))
async def get_alias(model: str, alias: str, peers: PeersOf) -> Json:
    return to_json(await peers.registry.GetVersion(pb.GetVersionRequest(model=model, alias=alias)))


@router.put("/models/{model}/aliases/{alias}", responses=answers(pb.SetAliasResponse))
async def set_alias(model: str, alias: str, body: Alias, peers: PeersOf) -> Json:
    return to_json(await peers.registry.SetAlias(pb.SetAliasRequest(model=model, alias=alias, version=body.version)))


@router.delete("/models/{model}/aliases/{alias}", responses=answers(pb.DeleteAliasResponse))
async def delete_alias(model: str, alias: str, peers: PeersOf) -> Json:
    return to_json(await peers.registry.DeleteAlias(pb.DeleteAliasRequest(model=model, alias=alias)))


@router.get("/approvals", responses=answers(pb.ListApprovalsResponse))
async def list_approvals(peers: PeersOf, status: str = "", model: str = "") -> Json:
    return to_json(await peers.registry.ListApprovals(pb.ListApprovalsRequest(status=status, model=model)))


@router.post("/approvals/{approval_id}/decision", responses=answers(pb.DecideApprovalResponse))
async def decide(approval_id: str, body: Vote, peers: PeersOf) -> Json:
    request = pb.DecideApprovalRequest(approval_id=approval_id, approve=body.approve, comment=body.comment)
    return to_json(await peers.registry.DecideApproval(request))


@router.get("/evaluations", responses=answers(evaluator_pb.ListEvaluationsResponse))
async def list_evaluations(peers: PeersOf, delivery: str = "", run_id: str = "", page_size: int = 100, page_token: str = "") -> Json:
    request = evaluator_pb.ListEvaluationsRequest(delivery=delivery, run_id=run_id, page_size=page_size, page_token=page_token)
    return to_json(await peers.evaluator.ListEvaluations(request))


@router.get("/evaluations/{evaluation_id}", responses=answers(evaluator_pb.GetEvaluationResponse))
async def get_evaluation(evaluation_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.evaluator.GetEvaluation(evaluator_pb.GetEvaluationRequest(evaluation_id=evaluation_id)))


@router.get("/evaluations/{evaluation_id}/report", responses=answers(evaluator_pb.GetReportResponse))
async def get_report(evaluation_id: str, peers: PeersOf, format: str = "html") -> Json:
    return to_json(await peers.evaluator.GetReport(evaluator_pb.GetReportRequest(evaluation_id=evaluation_id, format=format)))
