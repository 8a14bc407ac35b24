"""MLflow's REST API for searches over runs and experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid
from servicekit.mlflow import endpoints
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from tracker.entrypoints.mlflow.experiments import experiment_json
from tracker.entrypoints.mlflow.rules import READ_ALL
from tracker.entrypoints.mlflow.wire import experiment_number
from tracker.searches import Asked, Searches

FILTER_HEADER = "x-headrace-filter"
"""`extended` allows OR, NOT and parentheses in the filter of this request."""

_STAGES = {
    "ACTIVE_ONLY": ("active",),
    "DELETED_ONLY": ("deleted",),
    "ALL": ("active", "deleted"),
}
_BY_NUMBER = {1: "ACTIVE_ONLY", 2: "DELETED_ONLY", 3: "ALL"}
"""MLflow's enum, for clients that send its numbers."""


class _Runs(msgspec.Struct):
    experiment_ids: tuple[str, ...] = ()
    filter: str = ""
    run_view_type: str | int = "ACTIVE_ONLY"
    max_results: int = 1_000
    order_by: tuple[str, ...] = ()
    page_token: str = ""


class _Experiments(msgspec.Struct):
    filter: str = ""
    view_type: str | int = "ACTIVE_ONLY"
    max_results: int = 1_000
    order_by: tuple[str, ...] = ()
    page_token: str = ""


class SearchApi:
    """The endpoints that search."""

    def __init__(self, searches: Searches) -> None:
        self._searches = searches

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/runs/search", READ_ALL, self._runs),
                (("GET", "POST"), "/experiments/search", READ_ALL, self._experiments),
            ]
        )

    async def _runs(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Runs)
        experiments = tuple(dict.fromkeys(experiment_number(one) for one in asked.experiment_ids))
        search = _asked(request, asked, _stages("run_view_type", asked.run_view_type), experiments)
        found, token = await self._searches.runs(current_caller(), search)
        return _page("runs", [msgspec.Raw(one.json.encode()) for one in found], token)

    async def _experiments(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Experiments)
        search = _asked(request, asked, _stages("view_type", asked.view_type), ())
        found, token = await self._searches.experiments(current_caller(), search)
        return _page("experiments", [experiment_json(one) for one in found], token)


def _asked(request: Request, asked: _Runs | _Experiments, stages: tuple[str, ...], experiments: tuple[int, ...]) -> Asked:
    return Asked(
        stages=stages,
        filter=asked.filter,
        order_by=asked.order_by,
        max_results=asked.max_results,
        page_token=asked.page_token,
        experiments=experiments,
        extended=request.headers.get(FILTER_HEADER, "") == "extended",
    )


def _stages(name: str, given: str | int) -> tuple[str, ...]:
    """Lifecycle stages by the name or the number of MLflow's view types. A query has numbers as texts."""
    number = int(given) if isinstance(given, str) and given.isdecimal() and len(given) == 1 else given
    view = _BY_NUMBER.get(number) if isinstance(number, int) else number
    if view not in _STAGES:
        raise Invalid(f"Invalid value for parameter '{name}': {str(given)[:50]!r} is not one of {', '.join(_STAGES)}")
    return _STAGES[view]


def _page(name: str, things: Sequence[Any], token: str) -> Response:
    return mlflow.answer({name: things, "next_page_token": token} if token else {name: things})
