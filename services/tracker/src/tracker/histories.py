"""The tracker's use cases that read the history of a metric: in pages, of several runs, and as a sample that a chart can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from servicekit.access import Caller
from servicekit.errors import Invalid, NotFound

from tracker.domain.errors import Rejected
from tracker.domain.run import INT64, Metric
from tracker.domain.search import Place, page_place, page_token
from tracker.handlers import may_read

MOST_POINTS = 25_000
"""Points of one answer, as MLflow has it for several runs."""

MOST_SAMPLED = 2_500
"""Points of a run in a sample, as MLflow has it."""

MOST_RUNS = 100

OfRun = tuple[str, Metric]
"""A point and the id of its run."""


class HistoryStore(Protocol):
    """What histories need from outside. Each call is one read-only transaction."""

    async def missing(self, run_ids: Sequence[str]) -> Sequence[str]:
        """Those that there are no runs of."""
        ...

    async def page(self, run_id: str, key: str, after: Place | None, limit: int) -> Sequence[Metric]:
        """Points by (time, step, value), those after such a place."""
        ...

    async def of_runs(self, run_ids: Sequence[str], key: str, limit: int) -> Sequence[OfRun]:
        """Points by (run id, time, step, value)."""
        ...

    async def sampled(self, run_ids: Sequence[str], key: str, steps: tuple[int, int] | None, points: int) -> Sequence[OfRun]:
        """At most `points` of each run by (step, time, value), spread over its points (of these steps, both ends included): the first and
        the last are among them, of one it is the last. The cost does not grow with the length of a long history."""
        ...


class Histories:
    """Histories of metrics. Raises NotFound for a run that is not there."""

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    async def page(self, caller: Caller, run_id: str, key: str, max_results: int | None, token: str) -> tuple[Sequence[Metric], str]:
        """A page by (time, step, value), and the token of the next one, "" after the last."""
        if max_results is not None and max_results <= 0:
            raise Invalid(f"Invalid value {max_results} for parameter 'max_results' supplied. It must be a positive integer.")
        limit = min(max_results or MOST_POINTS, MOST_POINTS)
        await self._check(caller, [run_id])
        search = ("history", run_id, key)
        try:
            place = page_place(search, token, [int, int, float])
        except Rejected as error:
            raise Invalid(error.problems[0].message) from error
        found = await self._store.page(run_id, key, place, limit + 1)
        page = found[:limit]
        more = len(found) > limit
        return page, page_token(search, (page[-1].timestamp_ms, page[-1].step, page[-1].value)) if more else ""

    async def of_runs(self, caller: Caller, run_ids: Sequence[str], key: str, max_results: int) -> Sequence[OfRun]:
        """Points by (run id, time, step, value): at most `max_results` of all runs together."""
        if max_results <= 0:
            raise Invalid(f"Invalid value {max_results} for parameter 'max_results' supplied. It must be a positive integer.")
        await self._check(caller, run_ids)
        return await self._store.of_runs(run_ids, key, min(max_results, MOST_POINTS))

    async def sampled(
        self, caller: Caller, run_ids: Sequence[str], key: str, steps: tuple[int | None, int | None], max_results: int
    ) -> Sequence[OfRun]:
        """At most `max_results` points of each run, spread over its history or over these steps (first and last; both or neither)."""
        if not 1 <= max_results <= MOST_SAMPLED:
            raise Invalid(f"max_results must be between 1 and {MOST_SAMPLED}.")
        first, last = steps
        span = None
        if first is not None and last is not None:
            if first > last:
                raise Invalid(f"end_step must be greater than start_step. Found start_step={first} and end_step={last}.")
            if first not in INT64 or last not in INT64:
                raise Invalid("start_step and end_step are integers of 64 bits")
            span = (first, last)
        elif first is not None or last is not None:
            raise Invalid("If either start step or end step are specified, both must be specified.")
        await self._check(caller, run_ids)
        return await self._store.sampled(run_ids, key, span, max_results)

    async def _check(self, caller: Caller, run_ids: Sequence[str]) -> None:
        if len(run_ids) > MOST_RUNS:
            raise Invalid(f"a request must specify at most {MOST_RUNS} run_ids. Received {len(run_ids)} run_ids.")
        for run_id in run_ids:
            may_read(caller, run_id)
        if missing := await self._store.missing(run_ids):
            raise NotFound(f"Run with id={missing[0][:100]} not found")
