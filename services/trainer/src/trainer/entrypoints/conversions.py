"""Conversions of logged models: run.finished queues them, and a worker does them under a lease."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from contracts.tracker.v1 import events_pb2
from eventing import topics
from eventing.consumer import Handler
from eventing.envelope import Received
from google.protobuf.message import DecodeError
from jobs import Job, JobContext
from servicekit import telemetry
from servicekit.errors import Invalid
from sqlalchemy.ext.asyncio import AsyncConnection

from trainer.domain.conversion import Conversion
from trainer.entrypoints.translate import conversion_of
from trainer.packaging.conversions import Conversions
from trainer.ports import UnitOfWork

NAME = "trainer"
TOPICS = (topics.RUNS,)
SPAN = "convert"
"""The span of one attempt at a conversion. It belongs to the trace of the run."""


class DeliveriesRead(Protocol):
    """Whether all deliveries are known here: `eventing.readthrough.ReadThrough`."""

    async def check(self, *, now: bool) -> None: ...


class RunEvents:
    """The handlers by event type."""

    def __init__(self, conversions: Conversions, read: DeliveriesRead, open_work: Callable[[AsyncConnection], UnitOfWork]) -> None:
        self._conversions = conversions
        self._read = read
        self._open = open_work

    def handlers(self) -> Mapping[str, Handler]:
        return {"run.finished": self._run_finished}

    async def _run_finished(self, conn: AsyncConnection, event: Received) -> None:
        try:
            message = events_pb2.RunFinished.FromString(event.payload)
        except DecodeError as exc:
            raise Invalid(f"not a run.finished: {exc}") from exc
        if not message.HasField("conversion"):
            return
        await self._read.check(now=False)
        if not await self._conversions.asked(self._open(conn), conversion_of(message)):
            # Nobody claims it. But is the delivery known here that was applied just before the run ended?
            await self._read.check(now=True)


class ConversionJobs:
    """The handler of conversion jobs."""

    def __init__(self, conversions: Conversions) -> None:
        self._conversions = conversions

    async def convert(self, job: Job, context: JobContext) -> None:
        """Raises Transient when it is to be tried again."""
        conversion = Conversion(**{**job.payload, "flavors": tuple(job.payload["flavors"])})
        attributes: dict[str, str | int] = {"headrace.run_id": conversion.run_id, "job.attempt": job.attempt}
        cause = telemetry.context_from(job.traceparent)
        with telemetry.start_span(SPAN, parent=cause, links=[telemetry.current_traceparent()], attributes=attributes):
            await self._conversions.convert(conversion, last=job.attempt >= job.max_attempts)
