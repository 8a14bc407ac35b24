"""Brings a source's registered models, versions and aliases into Headrace.

What a stage or the alias `champion` would do here, which is to send a version to production, a transfer never does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from headrace.http import Client, InvalidInput
from headrace.sync.door import API, Door, pairs, texts
from headrace.sync.report import Report
from headrace.sync.source import RegisteredModel, Source, Version

SOURCE_VERSION = "headrace.source_version"
SOURCE_STAGE = "headrace.source_stage"
CHAMPION = "champion"
PROMPTS = frozenset({"dummy-source", "prompt-template"})

_OF_RUN = re.compile(r"(?:^runs:/|/)([0-9a-f]{32})(?:/artifacts)?(?:/(.*))?$")
_OF_MODEL = re.compile(r"(m-[0-9a-f]{32})(?:/artifacts)?/?$")


class Catalogue:
    """Registered models, once runs and logged models are there (`run_ids`, `model_ids`: what they have become)."""

    def __init__(
        self, client: Client, source: Source, report: Report, run_ids: Mapping[str, tuple[str, str]], model_ids: Mapping[str, str]
    ) -> None:
        self._client = client
        self._door = Door(client)
        self._source = source
        self._report = report
        self._run_ids = run_ids
        self._model_ids = model_ids

    def models(self, *, only_of_runs: bool) -> None:
        """All models; with `only_of_runs` the versions alone that were made by the runs that are there."""
        for model in self._source.registered_models():
            versions = list(self._source.versions(model))
            if only_of_runs:
                versions = [one for one in versions if self._origin(one) is not None]
                if not versions:
                    continue
            self._model(model, versions)

    def _model(self, model: RegisteredModel, versions: list[Version]) -> None:
        what = f"registered model {model.name!r}"
        try:
            there = self._door.registered_model(model.name)
            if there is None:
                asked = {"name": model.name, "description": model.description, "tags": pairs(model.tags)}
                there = dict(self._door.once("/registered-models/create", asked)["registered_model"])
                self._report.taken["registered models"] += 1
            else:
                self._report.there["registered models"] += 1
                known = texts(there.get("tags"))
                for key, value in model.tags.items():
                    if known.get(key) != value:
                        self._door.again("/registered-models/set-tag", {"name": model.name, "key": key, "value": value})
            numbers = {texts(one.get("tags")).get(SOURCE_VERSION, ""): str(one["version"]) for one in self._door.versions(model.name)}
        except InvalidInput as error:
            self._report.missed(what, str(error)[:500])
            return
        here = {}
        for version in versions:
            mark = f"{version.number} {version.created_ms}"
            if mark in numbers:
                self._report.there["model versions"] += 1
            elif (made := self._version(model.name, version, mark)) is None:
                continue
            else:
                numbers[mark] = made
                if made != str(version.number):
                    self._report.say(f"{what}: version {version.number} is version {made}")
            here[version.number] = numbers[mark]
        self._aliases(model, here, {one["alias"]: str(one["version"]) for one in there.get("aliases", [])})

    def _version(self, name: str, version: Version, mark: str) -> str | None:
        what = f"registered model {name!r} version {version.number}"
        origin = self._origin(version)
        if origin is None:
            self._report.missed(what, f"its source {version.source[:200]!r} is not of a run or logged model that was taken")
            return None
        tags = {**version.tags, SOURCE_VERSION: mark}
        if version.stage not in ("", "None"):
            tags[SOURCE_STAGE] = version.stage
            self._report.missed(f"{what} stage {version.stage}", f"stages are moved by people; it is kept in the tag {SOURCE_STAGE}")
        asked = {"name": name, **origin, "description": version.description, "run_link": version.run_link, "tags": pairs(tags)}
        try:
            made = self._door.once("/model-versions/create", asked)["model_version"]
            number = str(made["version"])
            if texts(made.get("tags")).get(SOURCE_VERSION) != mark:  # it was there, made by an evaluation
                self._door.again("/model-versions/set-tag", {"name": name, "version": number, "key": SOURCE_VERSION, "value": mark})
        except InvalidInput as error:
            self._report.missed(what, str(error)[:500])
            return None
        self._report.taken["model versions"] += 1
        return number

    def _aliases(self, model: RegisteredModel, here: Mapping[int, str], there: Mapping[str, str]) -> None:
        for alias, number in model.aliases.items():
            what = f"registered model {model.name!r} alias {alias!r}"
            if number not in here:
                self._report.missed(what, f"version {number} was not taken")
            elif there.get(alias) == here[number]:
                self._report.there["aliases"] += 1
            elif alias == CHAMPION:
                self._report.missed(what, f"it would send version {here[number]} to production: promote it yourself")
            else:
                try:
                    self._client.post(
                        f"{API}/registered-models/alias", {"name": model.name, "alias": alias, "version": here[number]}, repeatable=True
                    )
                    self._report.taken["aliases"] += 1
                except InvalidInput as error:
                    self._report.missed(what, str(error)[:500])

    def _origin(self, version: Version) -> dict[str, str] | None:
        """Source, run and logged model of a version in the words of this server; None when it is of nothing that is here."""
        if version.source in PROMPTS:
            return {"source": version.source}
        run_id = self._run_ids.get(version.run_id, ("", ""))[0]
        beside = {"run_id": run_id} if run_id else {}
        for text in (version.model_id, version.source):
            if (found := _OF_MODEL.search(text)) and found[1] in self._model_ids:
                return {"source": f"models:/{self._model_ids[found[1]]}", "model_id": self._model_ids[found[1]], **beside}
        found = _OF_RUN.search(version.source)
        if found and found[1] in self._run_ids:
            run_id, experiment_id = self._run_ids[found[1]]
            path = (found[2] or "").strip("/")
            return {"source": f"mlflow-artifacts:/{experiment_id}/{run_id}/artifacts{'/' if path else ''}{path}", "run_id": run_id}
        return None
