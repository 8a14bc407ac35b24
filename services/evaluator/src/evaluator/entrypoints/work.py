"""The evaluator's jobs: each evaluation is done under a lease, and decided in the transaction that ends its job."""

from __future__ import annotations

from collections.abc import Callable

from jobs import Ended, Job, JobContext, State
from servicekit import telemetry
from servicekit.errors import Invalid
from sqlalchemy.ext.asyncio import AsyncConnection

from evaluator.handlers import Evaluator
from evaluator.ports import UnitOfWork, WorkerDied

SPAN = "evaluate"
"""The span of one evaluation. It belongs to the trace of the run that brought the candidate, as do the events that come of it."""

MAX_DEATHS = 3
"""A model whose prediction process dies in this attempt or a later one is not tried again. Servers that are away are waited for."""

Open = Callable[[AsyncConnection], UnitOfWork]


class Jobs:
    """The handler of evaluation jobs, and what is done when one has failed for good."""

    def __init__(self, evaluator: Evaluator, open_work: Open, committed: Callable[[], None]) -> None:
        self._evaluator = evaluator
        self._open = open_work
        self._committed = committed

    async def evaluate(self, job: Job, context: JobContext) -> None:
        """Raises Transient when the evaluation is to be tried again."""
        attributes: dict[str, str | int] = {"headrace.evaluation_id": job.key, "job.attempt": job.attempt}
        cause = telemetry.context_from(job.traceparent)
        with telemetry.start_span(SPAN, parent=cause, links=[telemetry.current_traceparent()], attributes=attributes):
            try:
                decision = await self._evaluator.evaluate(job.key)
            except WorkerDied as error:
                if job.attempt >= MAX_DEATHS:
                    raise Invalid(f"{error}, in attempt {job.attempt}") from error
                raise
            async with context.transaction() as conn:
                if decision is not None:
                    await self._evaluator.decide(self._open(conn), decision)
                await context.complete(conn)
        self._committed()

    async def on_end(self, conn: AsyncConnection, job: Job, ended: Ended) -> None:
        """Decides an evaluation as failed whose job has failed: all attempts are used up, or its worker died in the last."""
        if ended.state is not State.FAILED:
            return
        with telemetry.start_span(f"{SPAN} given up", parent=telemetry.context_from(job.traceparent)):
            await self._evaluator.give_up(self._open(conn), job.key, ended.cause)
