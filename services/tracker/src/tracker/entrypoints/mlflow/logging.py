"""MLflow's REST API on what a run logs: metrics, params and tags, one by one or in batches."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid
from servicekit.mlflow import endpoints
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from tracker.amendments import Amendments
from tracker.domain.record import ModelMetric
from tracker.domain.run import MAX_PARAM, MAX_TAG, Metric
from tracker.entrypoints.mlflow.rules import WRITE
from tracker.entrypoints.mlflow.wire import KeyValue, OfRun, finite, required, texts
from tracker.handlers import Tracker

MAX_TOGETHER = 1_000
"""Metrics, params and tags in one batch."""


class _Point(msgspec.Struct, kw_only=True):
    key: str = ""
    value: float | None = None
    timestamp: int | None = None
    step: int = 0
    model_id: str = ""
    dataset_name: str = ""
    dataset_digest: str = ""

    def metric(self, path: str) -> Metric:
        required(f"{path}key", self.key)
        if self.value is None or self.timestamp is None:
            raise Invalid(f"Missing value for required parameter '{path}{'value' if self.value is None else 'timestamp'}'.")
        return Metric(self.key, finite(self.value), self.timestamp, self.step)


class _Metric(_Point, kw_only=True):
    run_id: str = ""
    run_uuid: str = ""


class _Param(OfRun):
    key: str = ""
    value: str = ""


class _Batch(OfRun):
    metrics: tuple[_Point, ...] = ()
    params: tuple[KeyValue, ...] = ()
    tags: tuple[KeyValue, ...] = ()


class LoggingApi:
    """The endpoints by which a run logs."""

    def __init__(self, tracker: Tracker, amendments: Amendments) -> None:
        self._tracker = tracker
        self._amendments = amendments

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/runs/log-metric", WRITE, self._log_metric),
                ("POST", "/runs/log-parameter", WRITE, self._log_param),
                ("POST", "/runs/log-batch", WRITE, self._log_batch),
                ("POST", "/runs/set-tag", WRITE, self._set_tag),
                ("POST", "/runs/delete-tag", WRITE, self._delete_tag),
            ]
        )

    async def _log_metric(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Metric)
        run_id = required("run_id", asked.run_id or asked.run_uuid)
        metric = asked.metric("")
        if asked.model_id:
            await self._log(run_id, [asked], [metric], {}, {})
        else:
            await self._tracker.log_metric(current_caller(), run_id, metric)
        return mlflow.answer({})

    async def _log_param(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Param)
        run_id = asked.run()
        await self._log(run_id, [], [], {required("key", asked.key): asked.value[:MAX_PARAM]}, {})
        return mlflow.answer({})

    async def _log_batch(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Batch)
        run_id = asked.run()
        together = len(asked.metrics) + len(asked.params) + len(asked.tags)
        # Each kind has a limit of its own, which the use case tells.
        if len(asked.metrics) <= MAX_TOGETHER < together:
            raise Invalid(
                f"A batch logging request can contain at most {MAX_TOGETHER} metrics, params, and tags. Got {together}. "
                "Please split them up across multiple requests and try again."
            )
        params = texts(asked.params, MAX_PARAM)
        if len(params) < len(asked.params):
            keys = [one.key for one in asked.params]
            twice = sorted({key[:100] for key in keys if keys.count(key) > 1})
            raise Invalid(f"Duplicate parameter keys have been submitted: {twice[:20]}. A request has one value per key.")
        metrics = [point.metric(f"metrics[{index}].") for index, point in enumerate(asked.metrics)]
        await self._log(run_id, asked.metrics, metrics, params, texts(asked.tags, MAX_TAG))
        return mlflow.answer({})

    async def _set_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Param)
        run_id = asked.run()
        await self._log(run_id, [], [], {}, {required("key", asked.key): asked.value[:MAX_TAG]})
        return mlflow.answer({})

    async def _delete_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Param)
        run_id = asked.run()
        await self._amendments.delete_tag(current_caller(), run_id, required("key", asked.key))
        return mlflow.answer({})

    async def _log(
        self, run_id: str, points: Sequence[_Point], metrics: Sequence[Metric], params: dict[str, str], tags: dict[str, str]
    ) -> None:
        of_models = [
            ModelMetric(metric, point.model_id, point.dataset_name, point.dataset_digest)
            for point, metric in zip(points, metrics, strict=True)
            if point.model_id
        ]
        await self._tracker.log_batch(current_caller(), run_id, metrics, params, tags, of_models)
