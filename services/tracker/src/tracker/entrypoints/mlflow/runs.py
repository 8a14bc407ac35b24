"""MLflow's REST API on runs: made, read, ended, reopened, renamed, deleted, restored."""

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
from tracker.domain.run import MAX_TAG, Status
from tracker.domain.tags import RUN_NAME
from tracker.entrypoints.mlflow.rules import READ, WRITE, WRITE_ALL
from tracker.entrypoints.mlflow.wire import KeyValue, OfRun, experiment_number, run_info, run_json, texts
from tracker.handlers import NewRun, Tracker

_BY_NUMBER = {1: Status.RUNNING, 2: Status.SCHEDULED, 3: Status.FINISHED, 4: Status.FAILED, 5: Status.KILLED}
"""MLflow's enum, for clients that send its numbers."""


class _Create(msgspec.Struct):
    experiment_id: str = "0"
    run_name: str = ""
    start_time: int = 0
    tags: tuple[KeyValue, ...] = ()


class _Update(OfRun):
    status: str | int | None = None
    end_time: int | None = None
    run_name: str = ""


class RunsApi:
    """The endpoints on runs as a whole."""

    def __init__(self, tracker: Tracker, amendments: Amendments) -> None:
        self._tracker = tracker
        self._amendments = amendments

    def endpoints(self) -> Sequence[Endpoint]:
        return endpoints(
            [
                ("POST", "/runs/create", WRITE_ALL, self._create),
                ("GET", "/runs/get", READ, self._get),
                ("POST", "/runs/update", WRITE, self._update),
                ("POST", "/runs/delete", WRITE_ALL, self._delete),
                ("POST", "/runs/restore", WRITE_ALL, self._restore),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        tags = texts(asked.tags, MAX_TAG)
        name = asked.run_name or tags.get(RUN_NAME, "")
        if tags.get(RUN_NAME, name) not in ("", name):
            raise Invalid(
                "Both 'run_name' argument and 'mlflow.runName' tag are specified, but with different values "
                f"(run_name={name[:100]!r}, mlflow.runName={tags[RUN_NAME][:100]!r})."
            )
        command = NewRun(
            experiment_id=experiment_number(asked.experiment_id or "0"),
            name=name,
            started_ms=asked.start_time,
            tags=tags,
            name_as_tag=True,
        )
        view, _ = await self._tracker.create_run(current_caller(), command)
        return await self._run(view.run.run_id)

    async def _get(self, request: Request) -> Response:
        return await self._run((await mlflow.read(request, OfRun)).run())

    async def _update(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Update)
        run = await self._amendments.update(current_caller(), asked.run(), _status(asked.status), asked.end_time, asked.run_name)
        return mlflow.answer({"run_info": run_info(run)})

    async def _delete(self, request: Request) -> Response:
        await self._amendments.delete(current_caller(), (await mlflow.read(request, OfRun)).run())
        return mlflow.answer({})

    async def _restore(self, request: Request) -> Response:
        await self._amendments.restore(current_caller(), (await mlflow.read(request, OfRun)).run())
        return mlflow.answer({})

    async def _run(self, run_id: str) -> Response:
        return mlflow.answer({"run": run_json(await self._amendments.record(current_caller(), run_id))})


def _status(given: str | int | None) -> Status | None:
    if given is None or given == "":
        return None
    if isinstance(given, int) and given in _BY_NUMBER:
        return _BY_NUMBER[given]
    if isinstance(given, str) and given in {*Status}:
        return Status(given)
    raise Invalid(f"Invalid value for parameter 'status': {str(given)[:50]!r} is not one of {', '.join(Status)}")
