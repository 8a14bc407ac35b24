"""The evaluator's gRPC services: evaluations and their reports, and the validation of a delivery's section `evaluate`."""

from __future__ import annotations

from typing import Any

from contracts.evaluator.v1 import service_pb2 as pb
from contracts.evaluator.v1 import service_pb2_grpc
from contracts.registry.v1 import service_pb2 as registry_pb
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from eventing import dlq_grpc
from servicekit.access import EVERY_ROLE, Rule
from servicekit.paging import page_size

from evaluator.entrypoints import translate
from evaluator.handlers import Evaluations, Holdouts

SERVICE = pb.DESCRIPTOR.services_by_name["EvaluatorService"].full_name
SECTIONS = registry_pb.DESCRIPTOR.services_by_name["DeliverySectionService"].full_name
DEAD_LETTERS = dlq_grpc.SERVICE

Context = Any
"""grpc.aio.ServicerContext; the servicers do not look at it."""


ACCESS = {
    **{f"/{SERVICE}/{method}": Rule({"gateway"}, EVERY_ROLE) for method in ("GetEvaluation", "ListEvaluations", "GetReport")},
    f"/{SECTIONS}/ValidateSection": Rule({"registry"}),
    **dlq_grpc.ACCESS,
}


class EvaluatorServicer(service_pb2_grpc.EvaluatorServiceServicer):
    """headrace.evaluator.v1.EvaluatorService."""

    def __init__(self, evaluations: Evaluations) -> None:
        self._evaluations = evaluations

    async def GetEvaluation(self, request: pb.GetEvaluationRequest, context: Context) -> pb.GetEvaluationResponse:
        return pb.GetEvaluationResponse(evaluation=translate.evaluation(await self._evaluations.get(request.evaluation_id)))

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Context) -> pb.ListEvaluationsResponse:
        size = page_size(request.page_size)
        before = translate.page_place(request.page_token)
        page = await self._evaluations.page(request.delivery, request.run_id, before, size + 1)
        more = len(page) > size
        return pb.ListEvaluationsResponse(
            evaluations=[translate.evaluation(one) for one in page[:size]],
            next_page_token=translate.page_token(page[size - 1].evaluation_id) if more else "",
        )

    async def GetReport(self, request: pb.GetReportRequest, context: Context) -> pb.GetReportResponse:
        url, sha256 = await self._evaluations.report(request.evaluation_id, request.format or "html")
        return pb.GetReportResponse(url=url, sha256=sha256)


class SectionServicer(registry_grpc.DeliverySectionServiceServicer):
    """headrace.registry.v1.DeliverySectionService for the section `evaluate`."""

    def __init__(self, holdouts: Holdouts) -> None:
        self._holdouts = holdouts

    async def ValidateSection(self, request: registry_pb.ValidateSectionRequest, context: Context) -> registry_pb.ValidateSectionResponse:
        answer = translate.validated(request)
        if answer.violations:
            return answer
        return translate.refused(await self._holdouts.wrong_with(translate.holdout_of(request))) or answer
