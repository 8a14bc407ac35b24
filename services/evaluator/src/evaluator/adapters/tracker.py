"""Asks the tracker where a version of a data set is stored."""

from __future__ import annotations

import grpc
from contracts.tracker.v1 import service_pb2, service_pb2_grpc
from servicekit.errors import NotFound

from evaluator.domain.candidate import DataVersion
from evaluator.ports import StoredHoldout

IDEMPOTENT = frozenset({"/headrace.tracker.v1.TrackerService/GetDataset"})


class TrackerDatasets:
    """Implements `ports.Datasets` over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._tracker = service_pb2_grpc.TrackerServiceStub(channel)

    async def find(self, name: str, version: int) -> StoredHoldout:
        try:
            request = service_pb2.GetDatasetRequest(name=name, version=version)
        except ValueError:  # JSON can write names and numbers that no data set has
            raise NotFound(f"there is no version {version} of {name!r}") from None
        dataset = (await self._tracker.GetDataset(request)).dataset
        if (dataset.ref.name, dataset.ref.version) != (name, version):
            raise NotFound(f"the tracker has no version {version} of {name}")
        return StoredHoldout(DataVersion(name, version, dataset.ref.sha256), dataset.blob.key, dataset.blob.size_bytes, dataset.holdout)
