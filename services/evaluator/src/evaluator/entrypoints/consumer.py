"""The events that the evaluator listens to, each handed to its use case in the transaction that marks it as applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eventing import topics
from eventing.consumer import Handler
from eventing.envelope import Received
from sqlalchemy.ext.asyncio import AsyncConnection

from evaluator.domain.delivery import Deliveries
from evaluator.entrypoints import translate
from evaluator.handlers import Intake, Outcome
from evaluator.ports import DeliveriesRead, UnitOfWork

NAME = "evaluator"
TOPICS = (topics.RUNS, topics.DEPLOYS, topics.MODELS)

Open = Callable[[AsyncConnection], UnitOfWork]


class Events:
    """The handlers by event type, and what the reader of the deliveries calls."""

    def __init__(self, intake: Intake, deliveries: Deliveries, read: DeliveriesRead, open_work: Open) -> None:
        self._intake = intake
        self._deliveries = deliveries
        self._read = read
        self._open = open_work

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "run.finished": self._run_finished,
            "deploy.completed": self._champion_changed,
            "deploy.reverted": self._champion_changed,
            "model.reevaluation_requested": self._reevaluation_requested,
        }

    def on_delivery(self, key: str, event: Received | None) -> None:
        """Takes a record of headrace.deliveries in. Raises Invalid for one that cannot be read."""
        if event is not None and event.type == "delivery.applied":
            self._deliveries.record(translate.delivery_applied(event.payload))

    async def _run_finished(self, conn: AsyncConnection, event: Received) -> None:
        run = translate.run_finished(event.payload)
        await self._read.check(now=False)
        if await self._intake.run_finished(self._open(conn), run) is Outcome.UNCLAIMED:
            # Nobody claims it. But is the delivery known here that was applied just before the run ended?
            await self._read.check(now=True)

    async def _champion_changed(self, conn: AsyncConnection, event: Received) -> None:
        model, champion = translate.champion_changed(event.type, event.payload)
        await self._intake.champion_changed(self._open(conn), model, champion)

    async def _reevaluation_requested(self, conn: AsyncConnection, event: Received) -> None:
        await self._intake.reevaluation_requested(self._open(conn), translate.reevaluation_requested(event.payload))
