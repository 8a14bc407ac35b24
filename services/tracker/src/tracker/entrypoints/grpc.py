"""The tracker's gRPC service: who may call what, and each call handed to its use case."""

from __future__ import annotations

from typing import Any

from contracts.tracker.v1 import service_pb2 as pb
from contracts.tracker.v1 import service_pb2_grpc
from opentelemetry import trace
from servicekit.access import EVERY_ROLE, Rule, current_caller
from servicekit.moments import moment
from servicekit.paging import page_size

from tracker.conversions import Conversions
from tracker.deliverables import Deliverables
from tracker.domain.run import Metric
from tracker.entrypoints import translate
from tracker.experiments import Experiments
from tracker.handlers import Tracker

SERVICE = pb.DESCRIPTOR.services_by_name["TrackerService"].full_name

Context = Any
"""grpc.aio.ServicerContext; the servicer does not look at it."""

_WRITERS = frozenset({"editor", "admin"})

# What a run token may do is held to its own run by the use cases.
_READ = Rule({"gateway"}, EVERY_ROLE, runs=True)
_WRITE = Rule({"gateway"}, _WRITERS, runs=True)
_WRITE_TRAINED = Rule({"gateway", "trainer"}, _WRITERS, runs=True)

_RULES = {
    "CreateExperiment": Rule({"gateway", "trainer"}, _WRITERS),
    "GetExperiment": Rule({"gateway", "trainer"}, EVERY_ROLE, runs=True),
    "ListExperiments": _READ,
    "CreateRun": Rule({"gateway", "trainer"}, _WRITERS),
    "GetRun": Rule({"gateway", "trainer"}, EVERY_ROLE, runs=True),
    "ListRuns": Rule({"gateway"}, EVERY_ROLE),
    "LogBatch": _WRITE,
    "FinishRun": _WRITE_TRAINED,
    "RenewLease": _WRITE_TRAINED,
    "GetMetricHistory": _READ,
    "StartUpload": _WRITE_TRAINED,
    "CompleteUpload": _WRITE_TRAINED,
    "ListArtifacts": _READ,
    "GetDownload": Rule({"gateway", "evaluator"}, EVERY_ROLE, runs=True),
    "LogModel": _WRITE,
    "LogInputs": _WRITE,
    "RegisterDataset": Rule({"gateway"}, _WRITERS),
    "GetDataset": Rule({"gateway", "evaluator"}, EVERY_ROLE, runs=True),
    "ListDatasets": _READ,
    "ListModelFiles": Rule({"trainer"}),
    "SettleConversion": Rule({"trainer"}),
}

ACCESS = {f"/{SERVICE}/{method}": rule for method, rule in _RULES.items()}


class TrackerServicer(service_pb2_grpc.TrackerServiceServicer):
    """headrace.tracker.v1.TrackerService."""

    def __init__(self, experiments: Experiments, tracker: Tracker, deliverables: Deliverables, conversions: Conversions) -> None:
        self._experiments = experiments
        self._tracker = tracker
        self._deliverables = deliverables
        self._conversions = conversions

    async def ListModelFiles(self, request: pb.ListModelFilesRequest, context: Context) -> pb.ListModelFilesResponse:
        found = await self._conversions.files(request.run_id, request.owner, request.folder)
        return pb.ListModelFilesResponse(files=[pb.ModelFile(path=one.path, object=translate.blob(one.object)) for one in found])

    async def SettleConversion(self, request: pb.SettleConversionRequest, context: Context) -> pb.SettleConversionResponse:
        converted = translate.converted_of(request) if request.HasField("blob") else None
        await self._conversions.settle(request.run_id, request.owner, request.folder, converted, request.refused)
        return pb.SettleConversionResponse()

    async def CreateExperiment(self, request: pb.CreateExperimentRequest, context: Context) -> pb.CreateExperimentResponse:
        made = await self._experiments.create(current_caller(), request.name, request.request_id)
        return pb.CreateExperimentResponse(experiment=translate.experiment(made))

    async def GetExperiment(self, request: pb.GetExperimentRequest, context: Context) -> pb.GetExperimentResponse:
        found = await self._experiments.get(current_caller(), request.id, request.name)
        return pb.GetExperimentResponse(experiment=translate.experiment(found))

    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Context) -> pb.ListExperimentsResponse:
        place = translate.page_place(request.page_token, int)
        page = await self._experiments.page(current_caller(), place[0] if place else -1, request.page_size)
        more = len(page) == page_size(request.page_size)
        return pb.ListExperimentsResponse(
            experiments=[translate.experiment(one) for one in page], next_page_token=translate.page_token(page[-1].id) if more else ""
        )

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        view, token = await self._tracker.create_run(current_caller(), translate.new_run(request))
        return pb.CreateRunResponse(run=translate.run(view), run_token=token)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=translate.run(await self._tracker.get_run(current_caller(), request.run_id)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        place = translate.page_place(request.page_token, int, str)
        before = (place[0], place[1]) if place else None
        page = await self._tracker.list_runs(current_caller(), request.experiment_id, request.status, before, request.page_size)
        more = len(page) == page_size(request.page_size)
        token = translate.page_token(page[-1].run.started_ms, page[-1].run.run_id) if more else ""
        return pb.ListRunsResponse(runs=[translate.run(view) for view in page], next_page_token=token)

    async def LogBatch(self, request: pb.LogBatchRequest, context: Context) -> pb.LogBatchResponse:
        metrics = [translate.metric_of(metric) for metric in request.metrics]
        await self._tracker.log_batch(current_caller(), request.run_id, metrics, dict(request.params), dict(request.tags))
        return pb.LogBatchResponse()

    async def FinishRun(self, request: pb.FinishRunRequest, context: Context) -> pb.FinishRunResponse:
        # The one span by which `headrace trace RUN_ID` finds all that followed from the run.
        trace.get_current_span().set_attribute("headrace.run_id", request.run_id)
        view = await self._tracker.finish_run(
            current_caller(), request.run_id, request.status, request.finished_ms, request.reason, request.fencing_token or None
        )
        return pb.FinishRunResponse(run=translate.run(view))

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        expires = await self._tracker.renew_lease(current_caller(), request.run_id, request.fencing_token or None)
        return pb.RenewLeaseResponse(expires_at=moment(expires))

    async def GetMetricHistory(self, request: pb.GetMetricHistoryRequest, context: Context) -> pb.GetMetricHistoryResponse:
        place = translate.page_place(request.page_token, int, int, float)
        after = Metric(request.key, value=place[2], timestamp_ms=place[1], step=place[0]) if place else None
        page = await self._tracker.metric_history(current_caller(), request.run_id, request.key, after, request.page_size)
        more = len(page) == page_size(request.page_size)
        token = translate.page_token(page[-1].step, page[-1].timestamp_ms, page[-1].value) if more else ""
        return pb.GetMetricHistoryResponse(metrics=[translate.metric(one) for one in page], next_page_token=token)

    async def StartUpload(self, request: pb.StartUploadRequest, context: Context) -> pb.StartUploadResponse:
        ticket = await self._deliverables.start_upload(
            current_caller(), request.run_id, request.path, request.dataset, request.size_bytes, request.sha256
        )
        return translate.ticket(ticket)

    async def CompleteUpload(self, request: pb.CompleteUploadRequest, context: Context) -> pb.CompleteUploadResponse:
        stored = await self._deliverables.complete_upload(current_caller(), request.upload_id, request.part_etags)
        return pb.CompleteUploadResponse(object=translate.blob(stored))

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: Context) -> pb.ListArtifactsResponse:
        found = await self._deliverables.list_artifacts(current_caller(), request.run_id, request.path)
        return pb.ListArtifactsResponse(artifacts=[translate.artifact(one) for one in found])

    async def GetDownload(self, request: pb.GetDownloadRequest, context: Context) -> pb.GetDownloadResponse:
        caller = current_caller()
        if request.run_id:
            return translate.download(await self._deliverables.download_artifact(caller, request.run_id, request.path))
        return translate.download(await self._deliverables.download_dataset(caller, request.dataset.name, request.dataset.version))

    async def LogModel(self, request: pb.LogModelRequest, context: Context) -> pb.LogModelResponse:
        logged = await self._deliverables.log_model(
            current_caller(),
            request.run_id,
            request.name,
            request.path,
            request.format,
            translate.signature_of(request.signature),
            request.samples_path,
        )
        return pb.LogModelResponse(model=translate.model(logged))

    async def LogInputs(self, request: pb.LogInputsRequest, context: Context) -> pb.LogInputsResponse:
        inputs = [translate.dataset_ref_of(ref) for ref in request.inputs]
        await self._tracker.log_inputs(current_caller(), request.run_id, inputs)
        return pb.LogInputsResponse()

    async def RegisterDataset(self, request: pb.RegisterDatasetRequest, context: Context) -> pb.RegisterDatasetResponse:
        made = await self._deliverables.register_dataset(
            current_caller(), request.name, request.upload_id, request.schema_json, request.holdout
        )
        return pb.RegisterDatasetResponse(dataset=translate.dataset(made))

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        found = await self._tracker.get_dataset(current_caller(), request.name, request.version)
        return pb.GetDatasetResponse(dataset=translate.dataset(found))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        found = await self._tracker.list_datasets(current_caller())
        return pb.ListDatasetsResponse(datasets=[translate.dataset(one) for one in found])
