"""Use cases of the catalogue of models: what clients register, describe, tag, rename, delete and search for.

Promotion, stages and aliases are those of `versions`: here is only what brings a version no closer to production.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from servicekit.access import Caller
from servicekit.clock import Clock, Ids
from servicekit.errors import AlreadyExists, Conflict, Forbidden, Invalid, NotFound

from registry.domain import filters, names, sources
from registry.domain.catalogued import Registration
from registry.domain.deliveries import Claim
from registry.domain.models import By, Model
from registry.domain.sources import Source
from registry.domain.versions import Origin, Stage
from registry.handlers.telling import told
from registry.ports import CataloguedVersion, CatalogueEntry, Session, Store

MODELS_PER_PAGE = 100
MOST_MODELS_PER_PAGE = 1_000
VERSIONS_PER_PAGE = 10_000
"""Also the most that one page brings; a client that asks for more gets a token for the rest."""

MOST_VERSIONS_PER_PAGE = 200_000
"""The most that may be asked for."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client says of a version that it registers. Ids and texts may be empty, but for the source."""

    source: str
    run_id: str = ""
    logged_model: str = ""
    run_link: str = ""
    description: str = ""
    tags: Mapping[str, str] | None = None


class Catalogue:
    """The use cases. Every name of a model that is not there raises NotFound, as does a version."""

    def __init__(self, store: Store, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids

    # Models

    async def create(self, caller: Caller, name: str, description: str, tags: Mapping[str, str]) -> CatalogueEntry:
        """A model without versions. Raises AlreadyExists: of two who make it at once, one is told so."""
        by = self._by(caller)
        with told():
            names.check_model_name(name)
            async with self._store.transaction() as session:
                if not await session.models.create(self._ids.uuid7(), name, by.at):
                    raise AlreadyExists(f"Registered Model (name={name}) already exists.")
                model = await _model(session, name)
                model.created(description, tags, by)
                await session.models.save(model)
                return await _entry(session, name)

    async def get(self, name: str) -> CatalogueEntry:
        """A model with the newest version of each stage."""
        _checked_name(name)
        async with self._store.snapshot() as session:
            return await _entry(session, name)

    async def describe(self, caller: Caller, name: str, description: str) -> CatalogueEntry:
        """Repeatable."""
        return await self._change(caller, name, lambda model, by: model.describe(description, by))

    async def rename(self, caller: Caller, name: str, new_name: str) -> CatalogueEntry:
        """The model keeps its id and versions. Raises AlreadyExists, and Conflict while a delivery delivers models of either name."""
        by = self._by(caller)
        with told():
            names.check_model_name(new_name, "new_name")
            async with self._store.transaction() as session:
                await session.deliveries.exclusively()
                for one in (name, new_name):
                    await _undelivered(session, one)
                model = await _model(session, name)
                model.rename(new_name, by)
                await session.models.save(model)
                return await _entry(session, new_name)

    async def delete(self, caller: Caller, name: str) -> None:
        """Raises Conflict while a delivery delivers it, or one of its versions is served or on its way. The audit log keeps what was."""
        by = self._by(caller)
        with told():
            async with self._store.transaction() as session:
                await session.deliveries.exclusively()
                model = await _model(session, name)
                await _undelivered(session, name)
                model.delete(by)
                await session.models.save(model)

    async def set_tag(self, caller: Caller, name: str, key: str, value: str) -> None:
        """Repeatable."""
        await self._change(caller, name, lambda model, by: model.set_tag(key, value, by))

    async def delete_tag(self, caller: Caller, name: str, key: str) -> None:
        """Repeatable."""
        await self._change(caller, name, lambda model, by: model.delete_tag(key, by))

    async def search(self, filter: str, order_by: Sequence[str], size: int | None, token: str) -> tuple[Sequence[CatalogueEntry], str]:
        """A page of models, by name unless ordered otherwise, and the token of the next page (empty: there is none)."""
        size = _page_size(size, MODELS_PER_PAGE, MOST_MODELS_PER_PAGE)
        with told():
            conditions = filters.read_filter(filter, filters.MODEL_ATTRIBUTES)
            order = filters.read_order(order_by, filters.MODEL_ORDER)
        page = _Page("models", filter, order_by, token)
        async with self._store.snapshot() as session:
            found = await session.catalogue.models(*filters.without_prompts(conditions), order, page.offset, size + 1)
        return found[:size], page.next(size, len(found))

    # Versions

    async def register(self, caller: Caller, name: str, asked: Asked) -> CataloguedVersion:
        """A new version of a model, or the version that an evaluation of the same model of the same run has made already.

        Not repeatable: like MLflow's, every call makes a version. A run token registers models of its own run only.
        """
        by = self._by(caller)
        with told():
            _checked_name(name)
            async with self._store.transaction() as session:
                registration = await _registration(session, caller, asked, _is_prompt(asked.tags))
                model = await _model(session, name, registration.run_id, registration.origin.logged_model)
                version = model.register(registration, by)
                await session.models.save(model)
                return await _version(session, name, version.number)

    async def get_version(self, name: str, number: int) -> CataloguedVersion:
        _checked_name(name)
        async with self._store.snapshot() as session:
            return await _version(session, name, number)

    async def by_alias(self, name: str, alias: str) -> CataloguedVersion:
        """The version that an alias points at; `latest` is the newest. Raises Invalid for an alias that is not there, as MLflow does."""
        _checked_name(name)
        async with self._store.snapshot() as session:
            if alias.lower() == "latest":
                entry = await _entry(session, name)
                if not entry.latest:
                    raise NotFound(f"Latest version not found for model {name}.")
                return max(entry.latest, key=lambda version: version.number)
            with told():
                names.check_alias(alias)
            await _entry(session, name)
            found = await session.catalogue.by_alias(name, alias)
            if found is None:
                raise Invalid(f"Registered model alias {alias} not found.")
            return found

    async def latest(self, name: str, stages: Sequence[Stage]) -> Sequence[CataloguedVersion]:
        """The newest version in each of these stages, or in every stage when none is named."""
        found = (await self.get(name)).latest
        return [version for version in found if not stages or version.stage in stages]

    async def describe_version(self, caller: Caller, name: str, number: int, description: str) -> CataloguedVersion:
        """Repeatable."""
        return await self._change_version(caller, name, number, lambda model, by: model.describe_version(number, description, by))

    async def delete_version(self, caller: Caller, name: str, number: int) -> None:
        """Raises Conflict for a version that is served, on its way, or that a rollback would bring back."""
        await self._change_version(caller, name, number, lambda model, by: model.delete_version(number, by), gone=True)

    async def tag_version(self, caller: Caller, name: str, number: int, key: str, value: str) -> None:
        """Repeatable."""
        await self._change_version(caller, name, number, lambda model, by: model.tag_version(number, key, value, by))

    async def untag_version(self, caller: Caller, name: str, number: int, key: str) -> None:
        """Repeatable."""
        await self._change_version(caller, name, number, lambda model, by: model.untag_version(number, key, by))

    async def search_versions(
        self, filter: str, order_by: Sequence[str], size: int | None, token: str
    ) -> tuple[Sequence[CataloguedVersion], str]:
        """A page of versions of all models, changed last first unless ordered otherwise, and the token of the next page."""
        size = min(_page_size(size, VERSIONS_PER_PAGE, MOST_VERSIONS_PER_PAGE), VERSIONS_PER_PAGE)
        with told():
            conditions = filters.read_filter(filter, filters.VERSION_ATTRIBUTES)
            order = filters.read_order(order_by or ["last_updated_timestamp DESC"], filters.VERSION_ORDER)
        page = _Page("versions", filter, order_by, token)
        async with self._store.snapshot() as session:
            found = await session.catalogue.versions(*filters.without_prompts(conditions), order, page.offset, size + 1)
        return found[:size], page.next(size, len(found))

    async def _change(self, caller: Caller, name: str, change: Callable[[Model, By], object]) -> CatalogueEntry:
        by = self._by(caller)
        with told():
            names.check_model_name(name)
            async with self._store.transaction() as session:
                model = await _model(session, name)
                change(model, by)
                await session.models.save(model)
                return await _entry(session, name)

    async def _change_version(
        self, caller: Caller, name: str, number: int, change: Callable[[Model, By], object], gone: bool = False
    ) -> CataloguedVersion:
        """Answers the version as it is after the change; with `gone`, as it was before."""
        by = self._by(caller)
        with told():
            names.check_model_name(name)
            async with self._store.transaction() as session:
                model = await _model(session, name, number=number)
                before = await _version(session, name, number)
                change(model, by)
                await session.models.save(model)
                return before if gone else await _version(session, name, number)

    def _by(self, caller: Caller) -> By:
        return By(caller.name, self._clock.now(), person=True)


class _Page:
    """Where a page begins. A token belongs to the search that it was given for, and is worth nothing with another."""

    def __init__(self, what: str, filter: str, order_by: Sequence[str], token: str) -> None:
        search = json.dumps([what, filter, list(order_by)]).encode()
        self._of = hashlib.sha256(search).hexdigest()[:16]
        self.offset = self._read(token) if token else 0

    def next(self, size: int, found: int) -> str:
        if found <= size:
            return ""
        return base64.urlsafe_b64encode(f"{self._of}:{self.offset + size}".encode()).decode()

    def _read(self, token: str) -> int:
        try:
            of, _, offset = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii").partition(":")
        except (binascii.Error, ValueError):
            of, offset = "", ""
        if of != self._of or not offset.isdecimal() or len(offset) > 9:
            raise Invalid("Invalid page token: it was not given for this search")
        return int(offset)


def _page_size(asked: int | None, default: int, most: int) -> int:
    size = default if asked is None else asked
    if not 1 <= size <= most:
        raise Invalid(f"Invalid value for request parameter max_results. It must be 1 to {most}, but got value {size}")
    return size


async def _registration(session: Session, caller: Caller, asked: Asked, prompt: bool) -> Registration:
    """What is asked for, once all its names have been held against each other."""
    source = sources.read_source(asked.source)
    if (source.text in sources.PROMPT_SOURCES) is not prompt:
        raise Invalid(f"Invalid model version source: '{source.text}'")
    sources.check_run_id(asked.run_id)
    sources.check_logged_model(asked.logged_model)
    names.check_text("run_link", asked.run_link, sources.MAX_RUN_LINK)
    origin = Origin(source.text, source.path, source.logged_model, source.text, asked.run_link, caller.name)
    run_id = source.run_id
    if source.model:
        copied = await _copied(session, source)
        origin = replace(origin, source=f"models:/{source.model}/{copied.number}", path=copied.path, storage=copied.storage)
        origin, run_id = replace(origin, logged_model=copied.logged_model), copied.run_id
    run_id = _same(run_id, asked.run_id, source, "run_id")
    origin = replace(origin, logged_model=_same(origin.logged_model, asked.logged_model, source, "model_id"))
    if caller.run_id is not None:
        if run_id not in ("", caller.run_id):
            raise Forbidden(f"this token is good for run {caller.run_id} only")
        run_id = caller.run_id
    return Registration(run_id, origin, asked.description, asked.tags or {})


async def _copied(session: Session, source: Source) -> CataloguedVersion:
    if source.stage:
        entry = await _entry(session, source.model)
        fit = [one for one in entry.latest if source.stage.lower() in ("latest", wire_stage(one.stage).lower())]
        found = max(fit, key=lambda version: version.number, default=None)
    elif source.alias:
        found = await session.catalogue.by_alias(source.model, source.alias)
    else:
        found = await session.catalogue.version(source.model, source.version)
    if found is None:
        raise NotFound(f"Invalid model version source: '{source.text}': there is no such version")
    return found


def _same(named: str, said: str, source: Source, field: str) -> str:
    """What the source names and what the request says beside it, which must agree when both do."""
    if named and said and named != said:
        raise Invalid(
            f"Invalid model version source: '{source.text}'. The {field} request parameter must identify the resource that contains "
            "the source."
        )
    return said or named


def wire_stage(stage: Stage) -> str:
    """A stage in MLflow's words."""
    return "None" if stage is Stage.DEVELOPMENT else str(stage)


def _is_prompt(tags: Mapping[str, str] | None) -> bool:
    return (tags or {}).get(filters.PROMPT_TAG, "").lower() == "true"


def _checked_name(name: str) -> None:
    with told():
        names.check_model_name(name)


async def _undelivered(session: Session, name: str) -> None:
    claim = Claim("model", name)
    holder = (await session.deliveries.holders([claim], other_than="")).get(claim)
    if holder:
        raise Conflict(f"the delivery {holder} delivers {name}: delete or change the delivery first")


async def _model(session: Session, name: str, run_id: str = "", logged_model: str = "", number: int = 0) -> Model:
    found = await session.models.lock(name, versions=[number] if number else (), run_id=run_id, logged_model=logged_model)
    if found is None:
        raise NotFound(f"Registered Model with name={name} not found")
    return found


async def _entry(session: Session, name: str) -> CatalogueEntry:
    found = await session.catalogue.model(name)
    if found is None:
        raise NotFound(f"Registered Model with name={name} not found")
    return found


async def _version(session: Session, name: str, number: int) -> CataloguedVersion:
    found = await session.catalogue.version(name, number)
    if found is None:
        raise NotFound(f"Model Version (name={name}, version={number}) not found")
    return found
