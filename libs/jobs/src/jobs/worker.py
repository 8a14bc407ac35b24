"""The worker: claims jobs, keeps their leases, runs their handlers, and ends each job by what became of its handler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from opentelemetry.util.types import AttributeValue
from servicekit import telemetry
from servicekit.db import is_transient
from servicekit.errors import HeadraceError, Invalid, Transient, explain
from sqlalchemy.ext.asyncio import AsyncConnection

from jobs.queue import Job, JobQueue, LeaseLost, State

POLL_S = 0.5
"""How long a change made by another process waits at most to be seen."""

# Metrics.
DURATION = "headrace.job.duration"
RUNNING = "headrace.job.running"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of an attempt: `state` queued means that it will be tried again. `cause` is empty upon success.

    `error` is what the handler raised, for those that ask why; None when it raised nothing, or was not heard to the end.
    """

    state: State
    cause: str = ""
    error: HeadraceError | None = None


OnEnd = Callable[[AsyncConnection, Job, Ended], Awaitable[None]]


class JobContext:
    """What a handler has besides its job."""

    def __init__(self, queue: JobQueue, job: Job) -> None:
        self.job = job
        self._queue = queue
        self._lost = False
        self._ended: State | None = None
        self.cancel_requested = False

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction on the queue's database, committed at the end of the block: for effects that end with `complete`."""
        async with self._queue.engine.begin() as conn:
            yield conn

    async def complete(self, conn: AsyncConnection) -> None:
        """Ends the job with success in the handler's own transaction, together with its effects. Raises LeaseLost: let it pass."""
        await self._queue.complete(conn, self.job)
        self._ended = State.SUCCEEDED

    async def fail(self, conn: AsyncConnection, cause: str, retry: bool) -> State:
        """Ends the attempt in the handler's own transaction, as JobQueue.fail does. Raises LeaseLost: let it pass."""
        self._ended = await self._queue.fail(conn, self.job, cause, retry)
        return self._ended

    def check(self) -> None:
        """Raises LeaseLost when the job is known to be another's: for handlers that do not await for long."""
        if self._lost:
            raise LeaseLost(f"the job {self.job.kind} {self.job.key} is no longer ours")


Handler = Callable[[Job, JobContext], Awaitable[None]]
"""Does a job. Returning is success; Transient is tried again after a backoff while attempts are left; Invalid, and anything else (a
bug), fails the job. It is cancelled when the lease is lost, when the job is cancelled and at shutdown, and must then end soon."""


@dataclass(slots=True)
class _Running:
    job: Job
    context: JobContext
    renewed: float
    """Loop time just before the last claim or heartbeat that succeeded: the lease holds from there at least."""
    task: asyncio.Task[None] | None = None
    why: str = ""
    """Why the handler was told to stop: lost, cancel or stop."""
    alarm: asyncio.TimerHandle | None = field(default=None)


class Worker:
    """Runs up to `concurrency` jobs of the kinds that `handlers` names; a lifecycle component.

    A heartbeat is sent every third of `lease_s`; when none has succeeded for the whole of it, the handler is cancelled, since
    somebody else may have the job by then. `on_end` is called in the transaction in which the worker itself ends an attempt
    (not when the handler did), also for jobs whose worker died in their last attempt; `committed` after it. When stopped it
    lets handlers end for `grace_s`, then hands their jobs back.
    """

    def __init__(
        self,
        queue: JobQueue,
        handlers: Mapping[str, Handler],
        concurrency: int = 1,
        lease_s: float = 30.0,
        *,
        on_end: OnEnd | None = None,
        committed: Callable[[], None] | None = None,
        grace_s: float = 5.0,
        poll_s: float = POLL_S,
        name: str = "worker",
    ) -> None:
        if concurrency < 1 or lease_s <= 0:
            raise ValueError("a worker needs a concurrency and a lease above zero")
        self.name = name
        self._queue = queue
        self._handlers = dict(handlers)
        self._kinds = sorted(handlers)
        self._concurrency = concurrency
        self._lease_s = lease_s
        self._on_end = on_end
        self._committed = committed
        self._grace_s = grace_s
        self._poll_s = min(poll_s, lease_s / 4)
        self._identity = f"{socket.gethostname()}:{os.getpid()}:{name}"
        self._wake = asyncio.Event()
        self._running: dict[Job, _Running] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._forget: Callable[[], None] | None = None
        self._stopping = False
        self._trouble: str | None = "starting"
        meter = telemetry.meter()
        self._duration = meter.create_histogram(DURATION, unit="s", description="Time of an attempt, by kind and what became of it")
        self._count = meter.create_up_down_counter(RUNNING, description="Attempts under way, by kind")

    async def start(self) -> None:
        """Begins to claim. Does not wait for the database: `ready` tells about it."""
        self._forget = self._queue.listen(self._wake.set)
        self._loop_task = asyncio.create_task(self._loop(), name=f"{self.name} loop")

    def ready(self) -> str | None:
        """None when the last look at the queue succeeded, else why not."""
        return self._trouble

    async def wait(self) -> None:
        """Raises when the worker has broken; returns when it was stopped."""
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
            if not self._loop_task.cancelled():
                self._loop_task.result()

    async def stop(self) -> None:
        """Claims no more, waits for handlers for `grace_s`, hands back what is left. May be repeated."""
        self._stopping = True
        self._wake.set()
        if self._forget is not None:
            self._forget()
            self._forget = None
        tasks = [running.task for running in self._running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._grace_s)
            for running in [*self._running.values()]:
                self._interrupt(running, "stop")
            await asyncio.wait(tasks)
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])

    async def _loop(self) -> None:
        while not (self._stopping and not self._running):
            self._wake.clear()  # before looking: a notification that comes while we look is not lost
            try:
                async with asyncio.timeout(self._lease_s):
                    await self._look()
                self._trouble = None
            except Exception as error:
                if not isinstance(error, Transient) and not is_transient(error):
                    raise
                if self._trouble is None:
                    _log.warning("%s cannot reach its queue: %s", self.name, error)
                self._trouble = "no connection to the database"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._poll_s)

    async def _look(self) -> None:
        """One round: keep what runs, end what died, take what is due."""
        await self._keep()
        if self._stopping:
            return
        await self._bury()
        while len(self._running) < self._concurrency and not self._stopping:
            asked = asyncio.get_running_loop().time()
            job = await self._queue.claim(self._kinds, self._identity, self._lease_s)
            if job is None:
                return
            if self._stopping:  # it came while we asked
                async with self._queue.engine.begin() as conn:
                    await self._queue.release(conn, job)
                return
            self._begin(job, asked)

    async def _keep(self) -> None:
        """Renews the leases of all that runs and learns which were lost or shall be cancelled."""
        held = [running for running in self._running.values() if running.why != "lost"]
        if not held:
            return
        asked = asyncio.get_running_loop().time()
        due = any(asked - running.renewed >= self._lease_s / 3 for running in held)
        jobs = [running.job for running in held]
        # Between heartbeats only the question whether to go on, which writes nothing.
        answers = await (self._queue.renew(jobs, self._lease_s) if due else self._queue.peek(jobs))
        for running in held:
            if running.job.id not in answers:
                self._interrupt(running, "lost")
            else:
                if due:
                    self._renewed(running, asked)
                if answers[running.job.id]:
                    running.context.cancel_requested = True
                    self._interrupt(running, "cancel")

    async def _bury(self) -> None:
        async with self._queue.engine.begin() as conn:
            buried = await self._queue.bury(conn, self._kinds)
            for job, state, cause in buried:
                _log.warning("job %s %s %s: %s", job.kind, job.key, state, cause)
                if self._on_end is not None:
                    await self._on_end(conn, job, Ended(state, cause))
        if buried and self._committed is not None:
            self._committed()

    def _begin(self, job: Job, asked: float) -> None:
        running = _Running(job, JobContext(self._queue, job), asked)
        self._running[job] = running
        self._renewed(running, asked)
        running.task = asyncio.create_task(self._work(running), name=f"job {job.kind} {job.key}")

    def _renewed(self, running: _Running, asked: float) -> None:
        running.renewed = asked
        if running.alarm is not None:
            running.alarm.cancel()
        # Local time runs out before the database's does, since it is counted from before the request.
        running.alarm = asyncio.get_running_loop().call_at(asked + self._lease_s, self._interrupt, running, "lost")

    def _interrupt(self, running: _Running, why: str) -> None:
        if running.why == "lost" or running.why == why or running.task is None:
            return
        first = not running.why
        running.why = why
        if why == "lost":
            running.context._lost = True
            _log.warning("job %s %s: its lease is lost", running.job.kind, running.job.key)
        if first or why == "lost":
            running.task.cancel()

    async def _work(self, running: _Running) -> None:
        job, started = running.job, self._queue.clock.monotonic()
        self._count.add(1, {"job.kind": job.kind})
        ended: Ended | None = None
        try:
            attributes: dict[str, AttributeValue] = {"job.kind": job.kind, "job.id": str(job.id), "job.attempt": job.attempt}
            # Long work is a trace of its own, linked to the one that asked for it.
            with telemetry.start_span(f"job {job.kind}", SpanKind.CONSUMER, Context(), [job.traceparent], attributes):
                ended = await self._attempt(running)
        except Exception as error:
            # The job stays claimed until its lease runs out, and is tried again then: nothing is lost.
            _log.error("the end of job %s %s could not be recorded", job.kind, job.key, exc_info=error)
        finally:
            if running.alarm is not None:
                running.alarm.cancel()
            del self._running[job]
            self._count.add(-1, {"job.kind": job.kind})
            state = str(ended.state) if ended is not None else "lost"
            self._duration.record(self._queue.clock.monotonic() - started, {"job.kind": job.kind, "job.state": state})
            self._wake.set()

    async def _attempt(self, running: _Running) -> Ended | None:
        """Runs the handler and ends the attempt; None when the job was no longer ours to end."""
        job, context = running.job, running.context
        try:
            await self._handlers[job.kind](job, context)
            if context._ended is not None:
                return Ended(context._ended)
            return await self._end(running, lambda conn: _then(self._queue.complete(conn, job), Ended(State.SUCCEEDED)))
        except asyncio.CancelledError:
            if running.why:
                return await self._interrupted(running)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # not by us: the process is being torn down
            return await self._failed(running, "a part of its own work was cancelled", retry=True)
        except LeaseLost:
            running.why = "lost"
            return None
        except (Invalid, Transient) as error:
            told: HeadraceError = error
        except Exception as error:
            told = explain(error)  # logs a bug with its stack
        return await self._failed(running, f"{type(told).__name__}: {told}", isinstance(told, Transient), told)

    async def _interrupted(self, running: _Running) -> Ended | None:
        job = running.job
        if running.why == "lost":
            return None
        if running.why == "cancel":
            return await self._end(running, lambda conn: _then(self._queue.end_cancelled(conn, job), Ended(State.CANCELLED, "cancelled")))

        async def hand_back(conn: AsyncConnection) -> Ended:
            state = await self._queue.release(conn, job)
            return Ended(state, "handed back" if state is State.QUEUED else "cancelled")

        return await self._end(running, hand_back)

    async def _failed(self, running: _Running, cause: str, retry: bool, error: HeadraceError | None = None) -> Ended | None:
        async def fail(conn: AsyncConnection) -> Ended:
            return Ended(await self._queue.fail(conn, running.job, cause, retry), cause, error)

        return await self._end(running, fail)

    async def _end(self, running: _Running, write: Callable[[AsyncConnection], Awaitable[Ended]]) -> Ended | None:
        """Writes how the attempt ended, with `on_end`, in one transaction; again and again while the database is away and the job ours."""
        while True:
            try:
                async with self._queue.engine.begin() as conn:
                    ended = await write(conn)
                    if self._on_end is not None:
                        await self._on_end(conn, running.job, ended)
            except LeaseLost:
                return None
            except Exception as error:
                if not isinstance(error, Transient) and not is_transient(error):
                    raise
            else:
                _log.log(
                    logging.INFO if ended.state is State.SUCCEEDED else logging.WARNING,
                    "job %s %s %s%s",
                    running.job.kind,
                    running.job.key,
                    ended.state,
                    f": {ended.cause}" if ended.cause else "",
                )
                if self._committed is not None:
                    self._committed()
                return ended
            await self._queue.clock.sleep(self._poll_s)


async def _then(writing: Awaitable[None], ended: Ended) -> Ended:
    await writing
    return ended
