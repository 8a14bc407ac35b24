"""The registry's gRPC services: who may call what, and each call handed to its use case."""

from __future__ import annotations

from typing import Any

from contracts.registry.v1 import service_pb2 as pb
from contracts.registry.v1 import service_pb2_grpc
from eventing import dlq_grpc
from servicekit.access import EVERY_ROLE, AccessTable, Rule, current_caller
from servicekit.paging import page_size

from registry.entrypoints import translate
from registry.handlers.access import Access
from registry.handlers.audit import AuditTrail
from registry.handlers.deliveries import Deliveries
from registry.handlers.versions import Versions

REGISTRY = pb.DESCRIPTOR.services_by_name["RegistryService"].full_name
ACCESS_SERVICE = pb.DESCRIPTOR.services_by_name["AccessService"].full_name
DEAD_LETTERS = dlq_grpc.SERVICE

Context = Any
"""grpc.aio.ServicerContext; the servicers do not look at it."""

# A token that is good for one run has no business here.
_READ = Rule({"gateway"}, EVERY_ROLE)
_CHANGE = Rule({"gateway"}, {"editor", "approver", "admin"})
_APPROVE = Rule({"gateway"}, {"approver"})
_ADMIN = Rule({"gateway"}, {"admin"})

RULES: dict[str, dict[str, Rule]] = {
    REGISTRY: {
        "ApplyDelivery": _CHANGE,
        "GetDelivery": _READ,
        "ListDeliveries": _READ,
        "DeleteDelivery": _CHANGE,
        "ListModels": _READ,
        "ListVersions": _READ,
        "GetVersion": _READ,
        "PromoteModel": _CHANGE,
        "SetStage": _CHANGE,
        "SetAlias": _CHANGE,
        "DeleteAlias": _CHANGE,
        "ListApprovals": _READ,
        "DecideApproval": _APPROVE,
        "ListAudit": _READ,
    },
    ACCESS_SERVICE: {"CreateApiKey": _ADMIN, "ListApiKeys": _ADMIN, "RevokeApiKey": _ADMIN},
}

ACCESS: AccessTable = {
    **{f"/{service}/{method}": rule for service, methods in RULES.items() for method, rule in methods.items()},
    **dlq_grpc.ACCESS,
}


class RegistryServicer(service_pb2_grpc.RegistryServiceServicer):
    """headrace.registry.v1.RegistryService."""

    def __init__(self, deliveries: Deliveries, versions: Versions, trail: AuditTrail) -> None:
        self._deliveries = deliveries
        self._versions = versions
        self._trail = trail

    async def ApplyDelivery(self, request: pb.ApplyDeliveryRequest, context: Context) -> pb.ApplyDeliveryResponse:
        return translate.applied(await self._deliveries.apply(current_caller(), request.yaml, request.dry_run))

    async def GetDelivery(self, request: pb.GetDeliveryRequest, context: Context) -> pb.GetDeliveryResponse:
        return pb.GetDeliveryResponse(delivery=translate.delivery(await self._deliveries.get(request.name, request.revision)))

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: Context) -> pb.ListDeliveriesResponse:
        return pb.ListDeliveriesResponse(deliveries=[translate.delivery(one) for one in await self._deliveries.all()])

    async def DeleteDelivery(self, request: pb.DeleteDeliveryRequest, context: Context) -> pb.DeleteDeliveryResponse:
        await self._deliveries.delete(current_caller(), request.name)
        return pb.DeleteDeliveryResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[translate.model(one) for one in await self._versions.models()])

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        found = await self._versions.page(request.model, translate.place(request.page_token), request.page_size)
        more = len(found) == page_size(request.page_size) and found[-1].version.number > 1
        token = str(found[-1].version.number) if more else ""
        return pb.ListVersionsResponse(versions=[translate.version(one) for one in found], next_page_token=token)

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(version=translate.version(await self._versions.get(request.model, request.version, request.alias)))

    async def PromoteModel(self, request: pb.PromoteModelRequest, context: Context) -> pb.PromoteModelResponse:
        view = await self._versions.promote(current_caller(), request.model, request.version, request.reason, request.override)
        return pb.PromoteModelResponse(version=translate.version(view))

    async def SetStage(self, request: pb.SetStageRequest, context: Context) -> pb.SetStageResponse:
        view = await self._versions.set_stage(current_caller(), request.model, request.version, request.stage, request.reason)
        return pb.SetStageResponse(version=translate.version(view))

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        view = await self._versions.set_alias(current_caller(), request.model, request.alias, request.version)
        return pb.SetAliasResponse(version=translate.version(view))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        await self._versions.delete_alias(current_caller(), request.model, request.alias)
        return pb.DeleteAliasResponse()

    async def ListApprovals(self, request: pb.ListApprovalsRequest, context: Context) -> pb.ListApprovalsResponse:
        found = await self._versions.approvals(request.status, request.model)
        return pb.ListApprovalsResponse(approvals=[translate.approval(one) for one in found])

    async def DecideApproval(self, request: pb.DecideApprovalRequest, context: Context) -> pb.DecideApprovalResponse:
        approval_id = translate.identifier(request.approval_id, "approval_id")
        decided = await self._versions.decide(current_caller(), approval_id, request.approve, request.comment)
        return pb.DecideApprovalResponse(approval=translate.approval(decided))

    async def ListAudit(self, request: pb.ListAuditRequest, context: Context) -> pb.ListAuditResponse:
        rows = await self._trail.page(request.target, translate.place(request.page_token), page_size(request.page_size))
        token = str(rows[-1].id) if len(rows) == page_size(request.page_size) else ""
        return pb.ListAuditResponse(entries=[translate.audit(row) for row in rows], next_page_token=token)


class AccessServicer(service_pb2_grpc.AccessServiceServicer):
    """headrace.registry.v1.AccessService."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Context) -> pb.CreateApiKeyResponse:
        expires_at = translate.time_of(request, "expires_at")
        key, secret = await self._access.create(current_caller(), request.subject, request.roles, request.inference_endpoints, expires_at)
        return pb.CreateApiKeyResponse(key=translate.api_key(key), secret=secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        return pb.ListApiKeysResponse(keys=[translate.api_key(key) for key in await self._access.all()])

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: Context) -> pb.RevokeApiKeyResponse:
        return pb.RevokeApiKeyResponse(key=translate.api_key(await self._access.revoke(current_caller(), request.key_id)))
