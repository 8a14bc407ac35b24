"""/api/v1 for endpoints and rollouts: the deployer."""

from __future__ import annotations

from contracts.deployer.v1 import service_pb2 as pb
from fastapi import APIRouter
from pydantic import BaseModel

from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["rollouts"])


class Why(BaseModel):
    reason: str = ""


@router.get("/endpoints", responses=answers(pb.ListEndpointsResponse))
async def list_endpoints(peers: PeersOf) -> Json:
    return to_json(await peers.deployer.ListEndpoints(pb.ListEndpointsRequest()))


@router.get("/endpoints/{name}", responses=answers(pb.GetEndpointResponse))
async def get_endpoint(name: str, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.GetEndpoint(pb.GetEndpointRequest(name=name)))


@router.get("/rollouts", responses=answers(pb.ListRolloutsResponse))
async def list_rollouts(peers: PeersOf, endpoint: str = "", page_size: int = 100, page_token: str = "") -> Json:
    return to_json(await peers.deployer.ListRollouts(pb.ListRolloutsRequest(endpoint=endpoint, page_size=page_size, page_token=page_token)))


@router.get("/rollouts/{rollout_id}", responses=answers(pb.GetRolloutResponse))
async def get_rollout(rollout_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.GetRollout(pb.GetRolloutRequest(rollout_id=rollout_id)))


@router.get("/rollouts/{rollout_id}/explain", responses=answers(pb.ExplainRolloutResponse))
async def explain_rollout(rollout_id: str, peers: PeersOf, page_size: int = 100, page_token: str = "") -> Json:
    request = pb.ExplainRolloutRequest(rollout_id=rollout_id, page_size=page_size, page_token=page_token)
    return to_json(await peers.deployer.ExplainRollout(request))


@router.post("/rollouts/{rollout_id}/pause", responses=answers(pb.PauseRolloutResponse))
async def pause_rollout(rollout_id: str, body: Why, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.PauseRollout(pb.PauseRolloutRequest(rollout_id=rollout_id, reason=body.reason)))


@router.post("/rollouts/{rollout_id}/resume", responses=answers(pb.ResumeRolloutResponse))
async def resume_rollout(rollout_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.ResumeRollout(pb.ResumeRolloutRequest(rollout_id=rollout_id)))


@router.post("/rollouts/{rollout_id}/abort", responses=answers(pb.AbortRolloutResponse))
async def abort_rollout(rollout_id: str, body: Why, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.AbortRollout(pb.AbortRolloutRequest(rollout_id=rollout_id, reason=body.reason)))


@router.post("/rollouts/{rollout_id}/revert", responses=answers(pb.RevertRolloutResponse))
async def revert_rollout(rollout_id: str, body: Why, peers: PeersOf) -> Json:
    return to_json(await peers.deployer.RevertRollout(pb.RevertRolloutRequest(rollout_id=rollout_id, reason=body.reason)))
