"""MLflow's REST API on versions of registered models."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from servicekit import mlflow
from servicekit.access import current_caller
from servicekit.errors import Invalid
from servicekit.rest import Endpoint
from starlette.requests import Request
from starlette.responses import Response

from registry.domain.names import CHAMPION
from registry.domain.versions import Stage
from registry.entrypoints.mlflow import shown
from registry.entrypoints.mlflow.models import held_up
from registry.entrypoints.mlflow.rules import CHANGE, READ, REGISTER, Tag, required, tags_of, version_number
from registry.handlers.catalogue import Asked, Catalogue
from registry.handlers.versions import Versions

_ACTIVE = (Stage.STAGING, Stage.PRODUCTION)


class _Create(msgspec.Struct):
    name: str = ""
    source: str = ""
    run_id: str | None = None
    tags: list[Tag] | None = None
    run_link: str | None = None
    description: str | None = None
    model_id: str | None = None


class _Numbered(msgspec.Struct):
    name: str = ""
    version: str = ""


class _Update(msgspec.Struct):
    name: str = ""
    version: str = ""
    description: str | None = None


class _Search(msgspec.Struct):
    filter: str | None = None
    max_results: int | None = None
    order_by: list[str] = []
    page_token: str | None = None


class _Tagged(msgspec.Struct):
    name: str = ""
    version: str = ""
    key: str = ""
    value: str | None = None


class _Transition(msgspec.Struct):
    name: str = ""
    version: str = ""
    stage: str = ""
    archive_existing_versions: bool | None = None


class ModelVersions:
    """The endpoints on versions."""

    def __init__(self, catalogue: Catalogue, versions: Versions) -> None:
        self._catalogue = catalogue
        self._versions = versions

    def endpoints(self) -> Sequence[Endpoint]:
        return mlflow.endpoints(
            [
                ("POST", "/model-versions/create", REGISTER, self._create),
                ("GET", "/model-versions/get", READ, self._get),
                ("PATCH", "/model-versions/update", CHANGE, self._update),
                ("DELETE", "/model-versions/delete", CHANGE, self._delete),
                ("GET", "/model-versions/search", READ, self._search),
                ("GET", "/model-versions/get-download-uri", READ, self._download_uri),
                ("POST", "/model-versions/set-tag", CHANGE, self._set_tag),
                ("DELETE", "/model-versions/delete-tag", CHANGE, self._delete_tag),
                ("POST", "/model-versions/transition-stage", CHANGE, self._transition),
            ]
        )

    async def _create(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Create)
        said = Asked(
            source=asked.source,
            run_id=asked.run_id or "",
            logged_model=asked.model_id or "",
            run_link=asked.run_link or "",
            description=asked.description or "",
            tags=tags_of(asked.tags),
        )
        made = await self._catalogue.register(current_caller(), asked.name, said)
        return mlflow.answer({"model_version": shown.version(made)})

    async def _get(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Numbered)
        found = await self._catalogue.get_version(asked.name, version_number(asked.version))
        return mlflow.answer({"model_version": shown.version(found)})

    async def _update(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Update)
        number = version_number(asked.version)
        changed = await self._catalogue.describe_version(current_caller(), asked.name, number, asked.description or "")
        return mlflow.answer({"model_version": shown.version(changed)})

    async def _delete(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Numbered)
        await self._catalogue.delete_version(current_caller(), asked.name, version_number(asked.version))
        return mlflow.answer({})

    async def _search(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Search)
        found, token = await self._catalogue.search_versions(asked.filter or "", asked.order_by, asked.max_results, asked.page_token or "")
        answer: dict[str, object] = {"model_versions": [shown.version(one) for one in found]}
        return mlflow.answer(answer | ({"next_page_token": token} if token else {}))

    async def _download_uri(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Numbered)
        found = await self._catalogue.get_version(asked.name, version_number(asked.version))
        return mlflow.answer({"artifact_uri": found.storage})

    async def _set_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tagged)
        number = version_number(asked.version)
        await self._catalogue.tag_version(current_caller(), asked.name, number, asked.key, asked.value or "")
        return mlflow.answer({})

    async def _delete_tag(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Tagged)
        required(name=asked.name, key=asked.key)
        await self._catalogue.untag_version(current_caller(), asked.name, version_number(asked.version), asked.key)
        return mlflow.answer({})

    async def _transition(self, request: Request) -> Response:
        asked = await mlflow.read(request, _Transition)
        required(name=asked.name, stage=asked.stage)
        number, stage = version_number(asked.version), shown.stage_of(asked.stage)
        if asked.archive_existing_versions and stage not in _ACTIVE:
            raise Invalid("archive_existing_versions goes with the stages Staging and Production only")
        view = await self._versions.set_stage(
            current_caller(), asked.name, number, stage, archive_others=bool(asked.archive_existing_versions)
        )
        if stage is Stage.PRODUCTION:
            held_up(view, CHAMPION)
        return mlflow.answer({"model_version": shown.version(await self._catalogue.get_version(asked.name, number))})
