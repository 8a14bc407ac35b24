"""MLflow's REST API for histories of metrics."""

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

from tracker.entrypoints.mlflow.rules import READ
from tracker.entrypoints.mlflow.wire import OfRun, metric_json, required
from tracker.histories import MOST_POINTS, MOST_SAMPLED, Histories
from tracker.histories import OfRun as Point


class _History(OfRun, kw_only=True):
    metric_key: str = ""
    max_results: int | None = None
    page_token: str = ""


class _Bulk(msgspec.Struct):
    run_id: tuple[str, ...] = ()
    metric_key: str = ""
    max_results: int = MOST_POINTS


class _Interval(msgspec.Struct):
    run_ids: tuple[str, ...] = ()
    metric_key: str = ""
    start_step: int | None = None
    end_step: int | None = None
    max_results: int = MOST_SAMPLED


class MetricsApi:
    """The endpoints that read metrics."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("GET", "/metrics/get-history", READ, self._page),
                ("GET", "/metrics/get-history-bulk", READ, self._of_runs),
                ("GET", "/metrics/get-history-bulk-interval", READ, self._sampled),
            ]
        )

    async def _page(self, request: Request) -> Response:
        asked = await mlflow.read(request, _History)
        key = required("metric_key", asked.metric_key)
        points, token = await self._histories.page(current_caller(), asked.run(), key, asked.max_results, asked.page_token)
        page: dict[str, Any] = {"metrics": [metric_json(one) for one in points]}
        return mlflow.answer({**page, "next_page_token": token} if token else page)

    async def _of_runs(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Bulk)
        if not asked.run_id:
            raise Invalid("GetMetricHistoryBulk request must specify at least one run_id.")
        key = required("metric_key", asked.metric_key)
        return _points(await self._histories.of_runs(current_caller(), asked.run_id, key, asked.max_results))

    async def _sampled(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Interval)
        if not asked.run_ids:
            raise Invalid("Missing value for required parameter 'run_ids'.")
        key = required("metric_key", asked.metric_key)
        steps = (asked.start_step, asked.end_step)
        return _points(await self._histories.sampled(current_caller(), asked.run_ids, key, steps, asked.max_results))


def _points(points: Sequence[Point]) -> Response:
    return mlflow.answer({"metrics": [{**metric_json(metric), "run_id": run_id} for run_id, metric in points]})
