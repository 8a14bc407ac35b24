"""The trainer's gRPC services: who may call what, and each call handed to its use case."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from contracts.registry.v1 import service_pb2 as registry_pb2
from contracts.registry.v1 import service_pb2_grpc as registry_pb2_grpc
from contracts.trainer.v1 import service_pb2 as pb
from contracts.trainer.v1 import service_pb2_grpc
from eventing import dlq_grpc
from servicekit.access import EVERY_ROLE, Rule, current_caller
from servicekit.errors import Invalid, Violation
from servicekit.paging import page_size

from trainer.entrypoints import translate
from trainer.handlers import Trainer

SERVICE = pb.DESCRIPTOR.services_by_name["TrainerService"].full_name
SECTION_SERVICE = registry_pb2.DESCRIPTOR.services_by_name["DeliverySectionService"].full_name
SECTION = "train"
DEAD_LETTERS = dlq_grpc.SERVICE

Context = Any
"""grpc.aio.ServicerContext; the servicers do not look at it."""

_READ = Rule({"gateway"}, EVERY_ROLE)
_WRITE = Rule({"gateway"}, {"editor", "admin"})

ACCESS = {
    f"/{SERVICE}/SubmitTraining": _WRITE,
    f"/{SERVICE}/GetTraining": _READ,
    f"/{SERVICE}/ListTrainings": _READ,
    f"/{SERVICE}/CancelTraining": _WRITE,
    f"/{SERVICE}/StreamLog": _READ,
    f"/{SERVICE}/StartSourceUpload": _WRITE,
    f"/{SECTION_SERVICE}/ValidateSection": Rule({"registry"}),
    **dlq_grpc.ACCESS,
}


class TrainerServicer(service_pb2_grpc.TrainerServiceServicer):
    """headrace.trainer.v1.TrainerService."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def SubmitTraining(self, request: pb.SubmitTrainingRequest, context: Context) -> pb.SubmitTrainingResponse:
        made = await self._trainer.submit(current_caller(), translate.request_of(request), request.request_id)
        return pb.SubmitTrainingResponse(training=translate.training(made))

    async def GetTraining(self, request: pb.GetTrainingRequest, context: Context) -> pb.GetTrainingResponse:
        return pb.GetTrainingResponse(training=translate.training(await self._trainer.get(request.training_id)))

    async def ListTrainings(self, request: pb.ListTrainingsRequest, context: Context) -> pb.ListTrainingsResponse:
        page = await self._trainer.page(request.delivery, request.page_token, request.page_size)
        more = len(page) == page_size(request.page_size)
        token = page[-1].training_id if more else ""
        return pb.ListTrainingsResponse(trainings=[translate.training(one) for one in page], next_page_token=token)

    async def CancelTraining(self, request: pb.CancelTrainingRequest, context: Context) -> pb.CancelTrainingResponse:
        cancelled = await self._trainer.cancel(current_caller(), request.training_id)
        return pb.CancelTrainingResponse(training=translate.training(cancelled))

    async def StreamLog(self, request: pb.StreamLogRequest, context: Context) -> AsyncIterator[pb.StreamLogResponse]:
        async for offset, data in self._trainer.stream_log(request.training_id, request.offset, request.follow):
            yield pb.StreamLogResponse(offset=offset, data=data)

    async def StartSourceUpload(self, request: pb.StartSourceUploadRequest, context: Context) -> pb.StartSourceUploadResponse:
        ticket = await self._trainer.start_source_upload(current_caller(), request.sha256, request.size_bytes)
        return pb.StartSourceUploadResponse(upload_id=ticket.upload_id, url=ticket.url)


class SectionServicer(registry_pb2_grpc.DeliverySectionServiceServicer):
    """headrace.registry.v1.DeliverySectionService for section `train`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def ValidateSection(self, request: registry_pb2.ValidateSectionRequest, context: Context) -> registry_pb2.ValidateSectionResponse:
        if request.section != SECTION:
            raise Invalid("the input is not valid", [Violation("section", f"the trainer knows {SECTION} only")])
        # Nothing in a train section is a gate, so none can be loosened.
        violations = self._trainer.validate_section(request.section_json)
        return registry_pb2.ValidateSectionResponse(violations=[translate.violation(problem) for problem in violations])
