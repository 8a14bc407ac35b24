"""Events that the deployer hears: promoted models (exactly once), deliveries (the newest snapshot), traffic windows (best effort)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from eventing.consumer import Handler
from eventing.envelope import Received
from sqlalchemy.ext.asyncio import AsyncConnection

from deployer.entrypoints import translate
from deployer.handlers import Deployer
from deployer.judging import Judge
from deployer.ports import UnitOfWork


class Joined(Protocol):
    """A store that can work within a consumer's transaction."""

    def on(self, conn: AsyncConnection) -> UnitOfWork: ...


def handlers(deployer: Deployer, store: Joined) -> Mapping[str, Handler]:
    """What the durable consumer does, by event type."""

    async def promoted(conn: AsyncConnection, event: Received) -> None:
        await deployer.promoted(store.on(conn), translate.promotion(event.payload))

    return {"model.promoted": promoted}


class Deliveries:
    """Remembers every revision of every delivery that passes."""

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer

    async def __call__(self, key: str, event: Received | None) -> None:
        """For a SnapshotReader. A tombstone says nothing: a deletion is a snapshot."""
        if event is not None and event.type == "delivery.applied":
            await self._deployer.applied(translate.delivery(event.payload))


class Traffic:
    """Hands gateways' windows to the judge."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    async def __call__(self, event: Received) -> None:
        """For a BestEffortConsumer."""
        if event.type == "traffic.window":
            await self._judge.heard(translate.report(event.payload))
