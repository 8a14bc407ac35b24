"""The deployer over gRPC: who may call what, and one method each."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import grpc
from contracts.deployer.v1 import service_pb2 as pb
from contracts.deployer.v1 import service_pb2_grpc
from contracts.registry.v1 import service_pb2 as registry
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from eventing import dlq_grpc
from servicekit.access import EVERY_ROLE, AccessTable, Rule, current_caller
from servicekit.errors import Invalid
from servicekit.paging import page_size

from deployer.domain.inputs import Abort, Command, Pause, Resume, Revert
from deployer.entrypoints import translate
from deployer.handlers import Deployer

SERVICE = "headrace.deployer.v1.DeployerService"
SECTIONS = "headrace.registry.v1.DeliverySectionService"
DEAD_LETTERS = dlq_grpc.SERVICE

READERS = Rule(services={"gateway"}, roles=EVERY_ROLE)
OPERATORS = Rule(services={"gateway"}, roles={"editor", "approver", "admin"})

_READS = ("GetEndpoint", "ListEndpoints", "GetRollout", "ListRollouts", "ExplainRollout")
_COMMANDS = ("PauseRollout", "ResumeRollout", "AbortRollout", "RevertRollout")

ACCESS: AccessTable = {
    **{f"/{SERVICE}/{method}": READERS for method in _READS},
    **{f"/{SERVICE}/{method}": OPERATORS for method in _COMMANDS},
    f"/{SECTIONS}/ValidateSection": Rule(services={"registry"}),
    **dlq_grpc.ACCESS,
}

Context = grpc.aio.ServicerContext[Any, Any]


class DeployerServicer(service_pb2_grpc.DeployerServiceServicer):
    """Implements DeployerService. Errors are raised; the server's interceptor turns them into statuses."""

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer

    async def GetEndpoint(self, request: pb.GetEndpointRequest, context: Context) -> pb.GetEndpointResponse:
        return pb.GetEndpointResponse(endpoint=translate.endpoint(await self._deployer.endpoint(request.name)))

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Context) -> pb.ListEndpointsResponse:
        return pb.ListEndpointsResponse(endpoints=[translate.endpoint(record) for record in await self._deployer.endpoints()])

    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.GetRolloutResponse:
        return pb.GetRolloutResponse(rollout=translate.rollout(await self._deployer.rollout(_id(request.rollout_id))))

    async def ListRollouts(self, request: pb.ListRolloutsRequest, context: Context) -> pb.ListRolloutsResponse:
        size = page_size(request.page_size)
        before = _id(request.page_token) if request.page_token else ""
        found = await self._deployer.rollouts(request.endpoint, size + 1, before)
        page = found[:size]
        token = page[-1].rollout.id if len(found) > size else ""
        return pb.ListRolloutsResponse(rollouts=[translate.rollout(record) for record in page], next_page_token=token)

    async def ExplainRollout(self, request: pb.ExplainRolloutRequest, context: Context) -> pb.ExplainRolloutResponse:
        size = page_size(request.page_size)
        record, found = await self._deployer.explain(_id(request.rollout_id), _sequence(request.page_token), size + 1)
        page = found[:size]
        token = str(page[-1].sequence) if len(found) > size else ""
        decisions = [translate.decision(row) for row in page]
        return pb.ExplainRolloutResponse(rollout=translate.rollout(record), decisions=decisions, next_page_token=token)

    async def PauseRollout(self, request: pb.PauseRolloutRequest, context: Context) -> pb.PauseRolloutResponse:
        return pb.PauseRolloutResponse(rollout=await self._command(request.rollout_id, Pause(_why("paused", request.reason))))

    async def ResumeRollout(self, request: pb.ResumeRolloutRequest, context: Context) -> pb.ResumeRolloutResponse:
        return pb.ResumeRolloutResponse(rollout=await self._command(request.rollout_id, Resume(current_caller().name)))

    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Context) -> pb.AbortRolloutResponse:
        return pb.AbortRolloutResponse(rollout=await self._command(request.rollout_id, Abort(_why("aborted", request.reason))))

    async def RevertRollout(self, request: pb.RevertRolloutRequest, context: Context) -> pb.RevertRolloutResponse:
        # The endpoint's revision is filled in under its lock.
        return pb.RevertRolloutResponse(rollout=await self._command(request.rollout_id, Revert(_why("reverted", request.reason), 0)))

    async def _command(self, rollout_id: str, command: Command) -> pb.Rollout:
        return translate.rollout(await self._deployer.command(_id(rollout_id), command))


class SectionServicer(registry_grpc.DeliverySectionServiceServicer):
    """Validates the serve section of a delivery for the registry."""

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer

    async def ValidateSection(self, request: registry.ValidateSectionRequest, context: Context) -> registry.ValidateSectionResponse:
        if request.section != "serve":
            raise Invalid(f"the deployer knows the section serve, not {request.section!r}")
        try:
            loosened = self._deployer.validate(_json(request.section_json), _json(request.previous_json))
        except Invalid as invalid:
            if not invalid.violations:
                raise
            violations = [registry.FieldViolation(field=v.field, message=v.message) for v in invalid.violations]
            return registry.ValidateSectionResponse(violations=violations)
        return registry.ValidateSectionResponse(loosened=loosened)


def _sequence(page_token: str) -> int:
    """The last decision of the page before; a page token that is none of ours is refused."""
    if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) <= 18):
        raise Invalid(f"{page_token!r} is not a page token of this list")
    return int(page_token or 0)


def _id(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise Invalid(f"{text!r} is not the id of a rollout") from error


def _why(done: str, reason: str) -> str:
    by = f"{done} by {current_caller().name}"
    return f"{by}: {reason}" if reason else by


def _json(text: str) -> Any:
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise Invalid(f"not JSON: {error}") from error
