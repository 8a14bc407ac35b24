"""MLflow's REST API on what a run reads and makes: data sets, logged models, and the models of older clients."""

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

from tracker.amendments import Amendments
from tracker.domain.record import DatasetInput, DescribedDataset, ModelOutput
from tracker.entrypoints.mlflow.rules import WRITE
from tracker.entrypoints.mlflow.wire import KeyValue, OfRun, required, texts

_NEEDED_OF_A_MODEL = ("artifact_path", "flavors", "utc_time_created", "run_id")


class _Dataset(msgspec.Struct):
    name: str = ""
    digest: str = ""
    source_type: str = ""
    source: str = ""
    schema: str = ""
    profile: str = ""


class _DatasetInput(msgspec.Struct):
    dataset: _Dataset = msgspec.field(default_factory=_Dataset)
    tags: tuple[KeyValue, ...] = ()


class _Model(msgspec.Struct):
    model_id: str = ""
    step: int = 0


class _Inputs(OfRun):
    datasets: tuple[_DatasetInput, ...] = ()
    models: tuple[_Model, ...] = ()


class _Outputs(OfRun):
    models: tuple[_Model, ...] = ()


class _LogModel(OfRun):
    model_json: str = ""


class InputsApi:
    """The endpoints on inputs and outputs of runs."""

    def __init__(self, amendments: Amendments) -> None:
        self._amendments = amendments

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/runs/log-inputs", WRITE, self._log_inputs),
                ("POST", "/runs/outputs", WRITE, self._log_outputs),
                ("POST", "/runs/log-model", WRITE, self._log_model),
            ]
        )

    async def _log_inputs(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Inputs)
        datasets = [DatasetInput(DescribedDataset(**msgspec.structs.asdict(one.dataset)), texts(one.tags)) for one in asked.datasets]
        await self._amendments.log_inputs(current_caller(), asked.run(), datasets, [one.model_id for one in asked.models])
        return mlflow.answer({})

    async def _log_outputs(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Outputs)
        if not asked.models:
            raise Invalid("Missing value for required parameter 'models'.")
        outputs = [ModelOutput(one.model_id, one.step) for one in asked.models]
        await self._amendments.log_outputs(current_caller(), asked.run(), outputs)
        return mlflow.answer({})

    async def _log_model(self, request: Request) -> Response:
        asked = await mlflow.read(request, _LogModel)
        run_id = asked.run()
        try:
            model: Any = msgspec.json.decode(required("model_json", asked.model_json))
        except (msgspec.DecodeError, RecursionError):
            raise Invalid("Malformed model info: 'model_json' is not a valid JSON.") from None
        missing = [name for name in _NEEDED_OF_A_MODEL if not isinstance(model, dict) or name not in model]
        if missing:
            raise Invalid(f"Model json is missing mandatory fields: {', '.join(missing)}")
        await self._amendments.record_model(current_caller(), run_id, model)
        return mlflow.answer({})
