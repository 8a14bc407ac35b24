"""Asks the services that own the sections of a delivery file, over gRPC."""

from __future__ import annotations

import grpc
from contracts.registry.v1 import service_pb2, service_pb2_grpc

from registry.ports import SectionVerdict

VALIDATE = "/headrace.registry.v1.DeliverySectionService/ValidateSection"
"""Idempotent: may be tried again."""

DEADLINE_S = 5.0


class GrpcSectionValidator:
    """Implements ports.SectionValidator."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = service_pb2_grpc.DeliverySectionServiceStub(channel)

    async def validate(self, delivery: str, section: str, section_json: str, previous_json: str) -> SectionVerdict:
        request = service_pb2.ValidateSectionRequest(
            delivery=delivery, section=section, section_json=section_json, previous_json=previous_json
        )
        response = await self._stub.ValidateSection(request, timeout=DEADLINE_S)
        problems = tuple((violation.field, violation.message) for violation in response.violations)
        return SectionVerdict(problems, tuple(response.loosened))
