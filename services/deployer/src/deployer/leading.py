"""The leader's work: what is due is done, every half second and whenever something happened; runtimes are compared every two."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from eventing.background import Background
from servicekit.clock import Clock
from servicekit.errors import Transient

from deployer.domain.errors import CommandRefused
from deployer.domain.inputs import Deadline
from deployer.handlers import Deployer
from deployer.judging import Judge
from deployer.loading import Loader
from deployer.ports import Deposed, Store

TICK_S = 0.5
RECONCILE_S = 2.0
REPUBLISH_S = 10.0
"""A watched route is published again after this time; gateways take the canary's share back after 30 s without."""

_CANDIDATE_S = 0.5
_log = logging.getLogger(__name__)


class Term(Protocol):
    """A session in which one may come to lead."""

    async def try_lead(self) -> int | None: ...

    async def check(self) -> None: ...


class Leader(Background):
    """Waits until it leads, then does a leader's work until it is stopped or deposed. Every replica runs one."""

    def __init__(
        self,
        session: Callable[[], AbstractAsyncContextManager[Term]],
        store: Store,
        deployer: Deployer,
        judge: Judge,
        loader: Loader,
        clock: Clock,
        woken: asyncio.Event,
        reconcile_s: float = RECONCILE_S,
    ) -> None:
        super().__init__("leader")
        self._session = session
        self._store = store
        self._deployer = deployer
        self._judge = judge
        self._loader = loader
        self._clock = clock
        self._woken = woken
        self._reconcile_s = reconcile_s
        self._problem: str | None = "has not connected yet"
        self._compared = False
        self.epoch: int | None = None
        """The epoch of the term that runs, None while another process leads."""

    def ready(self) -> str | None:
        """None when it waits behind the one that leads, or leads and has looked once what the runtimes have loaded; else why not.

        So whoever starts everything anew knows, when this is ready, that what was served is loaded again.
        """
        problem = self._problem
        if problem is None and self.epoch is not None and not self._compared:
            problem = "has not compared the runtimes with what they should have loaded yet"
        return super().ready() or (f"leader: {problem}" if problem else None)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                async with self._session() as term:
                    epoch = await self._become_leader(term)
                    if epoch is not None:
                        await self._lead(term, epoch)
            except Deposed as deposed:
                _log.warning("deposed: %s", deposed)
            except Transient as passing:
                self._problem = str(passing)
                _log.warning("the leader lost its database: %s", passing)
            finally:
                self.epoch = None
                self._judge.follow()
            await self._pause(_CANDIDATE_S)

    async def _become_leader(self, term: Term) -> int | None:
        while not self._stopping.is_set():
            epoch = await term.try_lead()
            self._problem = None
            if epoch is not None:
                return epoch
            await self._pause(_CANDIDATE_S)
        return None

    async def _lead(self, term: Term, epoch: int) -> None:
        _log.info("leads", extra={"epoch": epoch})
        self.epoch = epoch
        self._compared = False
        await self._deployer.readdress(epoch)
        await self._judge.lead(epoch)
        work = {
            asyncio.create_task(self._every(TICK_S, lambda: self._tick(term, epoch), self._woken), name="tick"),
            asyncio.create_task(self._every(self._reconcile_s, lambda: self._reconcile(epoch)), name="reconcile"),
        }
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]], woken: asyncio.Event | None = None) -> None:
        """Repeat until stopped. A passing error is logged and the work tried again; being deposed, and bugs, end it."""
        while not self._stopping.is_set():
            if woken is not None:
                woken.clear()
            try:
                await work()
            except Deposed:
                raise
            except Transient as passing:
                _log.warning("the leader's work waits: %s", passing)
            await self._wait(seconds, woken)

    async def _wait(self, seconds: float, woken: asyncio.Event | None) -> None:
        if woken is None:
            await self._pause(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await woken.wait()

    def _wake(self) -> None:
        self._woken.set()

    async def _reconcile(self, epoch: int) -> None:
        try:
            await self._loader.reconcile(epoch)
        finally:
            self._compared = True

    async def _tick(self, term: Term, epoch: int) -> None:
        """Do what is due."""
        try:
            await term.check()
        except Transient as gone:
            raise Deposed(f"the session that held the lead is gone: {gone}") from gone
        due = await self._store.due(REPUBLISH_S)
        for rollout_id in due.deadlines:
            with contextlib.suppress(CommandRefused):
                await self._deployer.tell(rollout_id, Deadline(), epoch)
        for endpoint in due.orphaned:
            await self._deployer.abandon(endpoint, epoch)
        for endpoint in due.begin:
            await self._deployer.begin(endpoint, epoch)
        for endpoint in due.unpublished:
            await self._deployer.publish_again(endpoint, epoch)
        await self._judge.refresh()
        await self._judge.acknowledgements()
        now = self._clock.monotonic()
        membership = self._judge.membership
        for endpoint, revision in due.unacknowledged:
            if membership.acknowledged(endpoint, revision, now, anyone=False):
                await self._deployer.acknowledged(endpoint, revision, epoch)
        if not membership.vanished(now):
            for endpoint in due.idle:
                for name in await self._deployer.release(endpoint, epoch):
                    _log.info("%s is not needed any more", name)
