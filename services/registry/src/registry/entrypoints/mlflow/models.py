"""MLflow's REST API on registered models: their names, tags and aliases."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Conflict
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from registry.domain.names import CHAMPION
from registry.domain.versions import Stage
from registry.entrypoints.mlflow import shown
from registry.entrypoints.mlflow.rules import CHANGE, READ, REGISTER, Tag, required, tags_of, version_number
from registry.handlers.catalogue import Catalogue
from registry.handlers.versions import Versions
from registry.ports import VersionView


class _Create(msgspec.Struct):
    name: str = ""
    tags: list[Tag] | None = None
    description: str | None = None


class _Named(msgspec.Struct):
    name: str = ""


class _Update(msgspec.Struct):
    name: str = ""
    description: str | None = None


class _Rename(msgspec.Struct):
    name: str = ""
    new_name: str = ""


class _Search(msgspec.Struct):
    filter: str | None = None
    max_results: int | None = None
    order_by: list[str] = []
    page_token: str | None = None


class _Latest(msgspec.Struct):
    name: str = ""
    stages: list[str] = []


class _Tagged(msgspec.Struct):
    name: str = ""
    key: str = ""
    value: str | None = None


class _Alias(msgspec.Struct):
    name: str = ""
    alias: str = ""
    version: str = ""


class RegisteredModels:
    """The endpoints on registered models."""

    def __init__(self, catalogue: Catalogue, versions: Versions) -> None:
        self._catalogue = catalogue
        self._versions = versions

    def endpoints(self) -> Sequence[Endpoint]:
        return mlflow.endpoints(
            [
                ("POST", "/registered-models/create", REGISTER, self._create),
                ("GET", "/registered-models/get", READ, self._get),
                ("PATCH", "/registered-models/update", CHANGE, self._update),
                ("POST", "/registered-models/rename", CHANGE, self._rename),
                ("DELETE", "/registered-models/delete", CHANGE, self._delete),
                ("GET", "/registered-models/search", READ, self._search),
                (("GET", "POST"), "/registered-models/get-latest-versions", READ, self._latest),
                ("POST", "/registered-models/set-tag", CHANGE, self._set_tag),
                ("DELETE", "/registered-models/delete-tag", CHANGE, self._delete_tag),
                ("POST", "/registered-models/alias", CHANGE, self._set_alias),
                ("DELETE", "/registered-models/alias", CHANGE, self._delete_alias),
                ("GET", "/registered-models/alias", READ, self._by_alias),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        made = await self._catalogue.create(current_caller(), asked.name, asked.description or "", tags_of(asked.tags))
        return mlflow.answer({"registered_model": shown.model(made)})

    async def _get(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        return mlflow.answer({"registered_model": shown.model(await self._catalogue.get(asked.name))})

    async def _update(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Update)
        changed = await self._catalogue.describe(current_caller(), asked.name, asked.description or "")
        return mlflow.answer({"registered_model": shown.model(changed)})

    async def _rename(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Rename)
        required(name=asked.name)
        changed = await self._catalogue.rename(current_caller(), asked.name, asked.new_name)
        return mlflow.answer({"registered_model": shown.model(changed)})

    async def _delete(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Named)
        required(name=asked.name)
        await self._catalogue.delete(current_caller(), asked.name)
        return mlflow.answer({})

    async def _search(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Search)
        found, token = await self._catalogue.search(asked.filter or "", asked.order_by, asked.max_results, asked.page_token or "")
        answer: dict[str, object] = {"registered_models": [shown.model(one) for one in found]}
        return mlflow.answer(answer | ({"next_page_token": token} if token else {}))

    async def _latest(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Latest)
        stages = [shown.stage_of(stage) for stage in asked.stages]
        found = await self._catalogue.latest(asked.name, stages)
        return mlflow.answer({"model_versions": [shown.version(one) for one in found]})

    async def _set_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tagged)
        await self._catalogue.set_tag(current_caller(), asked.name, asked.key, asked.value or "")
        return mlflow.answer({})

    async def _delete_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tagged)
        required(name=asked.name, key=asked.key)
        await self._catalogue.delete_tag(current_caller(), asked.name, asked.key)
        return mlflow.answer({})

    async def _set_alias(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Alias)
        required(name=asked.name, alias=asked.alias)
        view = await self._versions.set_alias(current_caller(), asked.name, asked.alias, version_number(asked.version))
        held_up(view, asked.alias)
        return mlflow.answer({})

    async def _delete_alias(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Alias)
        required(name=asked.name, alias=asked.alias)
        await self._versions.delete_alias(current_caller(), asked.name, asked.alias)
        return mlflow.answer({})

    async def _by_alias(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Alias)
        required(name=asked.name, alias=asked.alias)
        return mlflow.answer({"model_version": shown.version(await self._catalogue.by_alias(asked.name, asked.alias))})


def held_up(view: VersionView, alias: str) -> None:
    """Raises Conflict with the reason when a promotion that was asked for did not set out.

    What the asking has done stays done: people are asked for approval, or another evaluation is under way.
    """
    version = view.version
    if alias == CHAMPION and not version.rolling_out and version.stage is not Stage.PRODUCTION:
        raise Conflict(f"version {version.number} of {view.model} does not go to production yet: {version.reason}")
