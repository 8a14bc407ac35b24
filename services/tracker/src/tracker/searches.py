"""The tracker's searches over runs and experiments: what is asked is checked here, and answered page by page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from servicekit.access import EVERY_ROLE, Caller, require_role
from servicekit.errors import Invalid

from tracker.domain.errors import Rejected
from tracker.domain.filters import EXPERIMENTS, RUNS, Kind, OrderBy, Vocabulary, parse_filter, parse_order_by
from tracker.domain.run import Experiment
from tracker.domain.search import FoundExperiment, FoundRun, Place, Query, kinds_of, page_place, page_token

MOST = 50_000
"""Things of one page, as MLflow has it."""

_NEWEST = (OrderBy(Kind.ATTRIBUTE, "creation_time", ascending=False), OrderBy(Kind.ATTRIBUTE, "experiment_id", ascending=True))


class SearchStore(Protocol):
    """What the searches need from outside. Each call is one read-only transaction, ended with Invalid when it takes too long."""

    async def runs(self, query: Query, place: Place | None, limit: int) -> Sequence[FoundRun]:
        """At most `limit` runs after a place, in the query's order."""
        ...

    async def experiments(self, query: Query, place: Place | None, limit: int) -> Sequence[FoundExperiment]: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A search as it was asked for. `stages` are lifecycle stages; `extended` allows OR, NOT and parentheses in the filter."""

    stages: tuple[str, ...]
    filter: str = ""
    order_by: Sequence[str] = ()
    max_results: int = 1_000
    page_token: str = ""
    experiments: tuple[int, ...] = ()
    extended: bool = False


class Searches:
    """Searches with MLflow's filters and orders."""

    def __init__(self, store: SearchStore, *, extended: bool) -> None:
        """`extended` allows OR, NOT and parentheses to everybody."""
        self._store = store
        self._extended = extended

    async def runs(self, caller: Caller, asked: Asked) -> tuple[Sequence[FoundRun], str]:
        """A page, and the token of the next one, "" after the last. Raises Invalid for what is wrong or takes too long."""
        require_role(caller, *EVERY_ROLE)  # a run's token shows its own run and no other
        query = self._query(asked, RUNS)
        newest = [] if any(one.kind is Kind.ATTRIBUTE and one.key == "start_time" for one in query.order) else [int]
        place = _place(query, asked.page_token, [*kinds_of(query.order, RUNS), *newest, str])
        found = await self._store.runs(query, place, asked.max_results + 1)
        page = found[: asked.max_results]
        return page, page_token(query, page[-1].place) if len(found) > len(page) else ""

    async def experiments(self, caller: Caller, asked: Asked) -> tuple[Sequence[Experiment], str]:
        """A page, and the token of the next one, "" after the last. Raises Invalid for what is wrong or takes too long."""
        require_role(caller, *EVERY_ROLE)
        query = self._query(asked, EXPERIMENTS)
        # The id is a text to a filter and a number to an order.
        kinds = [
            int if one.key == "experiment_id" else kind for one, kind in zip(query.order, kinds_of(query.order, EXPERIMENTS), strict=True)
        ]
        place = _place(query, asked.page_token, kinds)
        found = await self._store.experiments(query, place, asked.max_results + 1)
        page = found[: asked.max_results]
        return [one.experiment for one in page], page_token(query, page[-1].place) if len(found) > len(page) else ""

    def _query(self, asked: Asked, words: Vocabulary) -> Query:
        if not 1 <= asked.max_results <= MOST:
            raise Invalid(
                f"Invalid value {asked.max_results} for parameter 'max_results' supplied. It must be at least 1 and at most {MOST}"
            )
        try:
            condition = parse_filter(asked.filter, words, extended=asked.extended or self._extended)
            order = parse_order_by(asked.order_by, words)
        except Rejected as error:
            raise _told(error) from error
        if words is EXPERIMENTS and not any(one.key == "experiment_id" for one in order):
            order = (*order, OrderBy(Kind.ATTRIBUTE, "experiment_id", ascending=False)) if order else _NEWEST
        return Query(asked.stages, condition, order, asked.experiments)


def _place(query: Query, token: str, kinds: Sequence[type]) -> Place | None:
    try:
        return page_place(query, token, kinds)
    except Rejected as error:
        raise _told(error) from error


def _told(error: Rejected) -> Invalid:
    """The sentence alone, as MLflow's clients show it."""
    return Invalid("; ".join(problem.message for problem in error.problems))
