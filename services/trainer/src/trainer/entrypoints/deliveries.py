"""Keeps the train sections of deliveries, as the compacted topic headrace.deliveries tells them."""

from __future__ import annotations

from contracts.registry.v1 import events_pb2
from eventing.envelope import Received
from google.protobuf.message import DecodeError
from servicekit.db import translate
from servicekit.errors import Invalid

from trainer.entrypoints.translate import applied_delivery
from trainer.handlers import Trainer


class DeliveryRecords:
    """The `on_record` of a SnapshotReader."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def __call__(self, key: str, event: Received | None) -> None:
        """Raises Invalid for bytes that are no delivery, Transient when they cannot be kept now."""
        if event is None or event.type != "delivery.applied":
            return
        try:
            message = events_pb2.DeliveryApplied.FromString(event.payload)
        except DecodeError as exc:
            raise Invalid(f"delivery.applied of {key} cannot be read: {exc}") from exc
        try:
            await self._trainer.remember(applied_delivery(message))
        except Exception as exc:
            raise translate(exc) from exc
