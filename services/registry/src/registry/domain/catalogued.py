"""What clients do with a model's entry in the catalogue: register versions, describe, tag, name, rename and delete.

None of it brings a version closer to production; it only says what a version was made from and what people call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from registry.domain.errors import Refused
from registry.domain.events import ModelRegistered
from registry.domain.held import By, HeldModel
from registry.domain.names import CHAMPION, MAX_ALIASES, check_alias, check_description, check_model_name, check_tag, check_tags
from registry.domain.versions import NO_DELIVERABLE, NO_EVIDENCE, Journey, Origin, Stage, Version


@dataclass(frozen=True, slots=True)
class Registration:
    """What a client asks to have registered; `run_id` may be empty. The origin says by whom."""

    run_id: str
    origin: Origin
    description: str
    tags: Mapping[str, str]


class CataloguedModel(HeldModel):
    """The changes that clients make."""

    def register(self, asked: Registration, by: By) -> Version:
        """A new version in Development: or, when an evaluation of this very model of this run has passed already and no client has
        registered it, the version that came of it, wherever it stands, with what the client says of it.

        So whichever comes first, registration or evaluation, there is one version. Registering again makes another version.
        """
        check_description(asked.description)
        check_tags(asked.tags)
        made = [one for one in self.versions.values() if self._unclaimed(one) and one.is_from(asked.run_id, asked.origin)]
        if made:
            known = max(made, key=lambda version: version.number)
            tags = {**known.tags, **asked.tags}
            check_tags(tags)
            said = replace(known, origin=asked.origin, description=asked.description or known.description, tags=tags)
            return self._put(said, "version.register", by)
        self.latest += 1
        version = Version(
            number=self.latest,
            journey=Journey("", "", 0, asked.run_id),
            deliverable=NO_DELIVERABLE,
            evidence=NO_EVIDENCE,
            author=by.actor,
            provenance={},
            created_at=by.at,
            traceparent="",
            stage=Stage.DEVELOPMENT,
            reason="registered",
            origin=asked.origin,
            description=asked.description,
            tags=asked.tags,
        )
        version = self._put(version, "version.register", by)
        self._emit(ModelRegistered(self._ref(version), version.journey, version.deliverable, ""), version, by)
        return version

    def created(self, description: str, tags: Mapping[str, str], by: By) -> None:
        """The model has just been made, with this to say of it."""
        check_description(description)
        check_tags(tags)
        self.description, self.tags = description, dict(tags)
        self._audit(None, "model.create", {}, {"id": str(self.model_id), "description": description, "tags": dict(tags)}, by)

    def describe(self, description: str, by: By) -> None:
        """Repeatable."""
        check_description(description)
        if description != self.description:
            self._audit(None, "model.describe", {"description": self.description}, {"description": description}, by)
            self.description = description
        self.updated_at = by.at

    def describe_version(self, number: int, description: str, by: By) -> Version:
        """Repeatable."""
        check_description(description)
        version = self.version(number)
        if description != version.description:
            self._audit(version, "version.describe", {"description": version.description}, {"description": description}, by)
        return self._hold(replace(version, description=description), by)

    def set_tag(self, key: str, value: str, by: By) -> None:
        """Repeatable."""
        check_tag(key, value)
        changed = self.tags | {key: value}
        check_tags(changed)
        if changed != self.tags:
            self._audit(None, "model.tag", _one(self.tags, key), {key: value}, by)
            self.tags = changed

    def delete_tag(self, key: str, by: By) -> None:
        """Repeatable."""
        if key in self.tags:
            self._audit(None, "model.untag", {key: self.tags.pop(key)}, {}, by)

    def tag_version(self, number: int, key: str, value: str, by: By) -> None:
        """Repeatable."""
        check_tag(key, value)
        version = self.version(number)
        changed = {**version.tags, key: value}
        check_tags(changed)
        if changed != version.tags:
            self._audit(version, "version.tag", _one(version.tags, key), {key: value}, by)
            self.versions[number] = replace(version, tags=changed)

    def untag_version(self, number: int, key: str, by: By) -> None:
        """Repeatable."""
        version = self.version(number)
        if key in version.tags:
            self._audit(version, "version.untag", {key: version.tags[key]}, {}, by)
            self.versions[number] = replace(version, tags={name: value for name, value in version.tags.items() if name != key})

    def set_alias(self, alias: str, number: int, by: By) -> Version:
        """Points an alias at a version. Repeatable. Raises Malformed for a name that cannot be, Refused for `champion`."""
        if alias == CHAMPION:
            raise Refused("champion is set by promotion")
        check_alias(alias)
        version = self.version(number)
        before = self.aliases.get(alias, 0)
        if before != number:
            if len(self.aliases) >= MAX_ALIASES and not before:
                raise Refused(f"{self.name} has {MAX_ALIASES} aliases: delete one first")
            self.aliases[alias] = number
            self._audit(None, "alias.set", {"version": before}, {"version": number}, by, alias=alias)
        return version

    def delete_alias(self, alias: str, by: By) -> None:
        """Takes an alias away. Repeatable. Raises Refused for `champion`."""
        if alias == CHAMPION:
            raise Refused("champion goes with the version in production")
        if alias in self.aliases:
            self._audit(None, "alias.delete", {"version": self.aliases.pop(alias)}, {}, by, alias=alias)

    def rename(self, name: str, by: By) -> None:
        """The id stays, so events and versions are the same model's. Repeatable. Raises Refused while a version rolls out."""
        check_model_name(name, "new_name")
        if name == self.name:
            return
        self._nothing_rolls_out()
        before = self.name
        # Told under both names, so that whoever looks for either finds it.
        self._audit(None, "model.rename", {"name": before}, {"name": name}, by)
        self.name = name
        self._audit(None, "model.rename", {"name": before}, {"name": name}, by)
        self.updated_at = by.at

    def delete(self, by: By) -> None:
        """The model is gone, and its name is free; the audit log keeps what was. Raises Refused while one of its versions is in
        production or rolling out."""
        if self.champion:
            raise Refused(f"version {self.champion} of {self.name} is in production: a model that is served cannot be deleted")
        self._nothing_rolls_out()
        for approval in self._pending():
            self._withdraw(approval.version, by, "the model was deleted")
        self._audit(None, "model.delete", {"id": str(self.model_id), "latest": self.latest, "aliases": dict(self.aliases)}, {}, by)
        self.aliases.clear()
        self.deleted = True

    def delete_version(self, number: int, by: By) -> None:
        """The version is gone from every list, and its number is not used again. Raises Refused for a version that is in production,
        rolling out, or the one that a rollback would bring back."""
        version = self.version(number)
        if number == self.champion:
            raise Refused(f"version {number} of {self.name} is in production: promote another version first")
        if version.rolling_out:
            raise Refused(f"version {number} of {self.name} is rolling out: abort the rollout first")
        if number == self.previous:
            raise Refused(f"version {number} of {self.name} is kept: the rollout of version {self.champion} may be reverted to it")
        self._withdraw(number, by, "the version was deleted")
        for alias in [alias for alias, points_at in self.aliases.items() if points_at == number]:
            self.delete_alias(alias, by)
        self._put(replace(version, deleted=True), "version.delete", by)

    def _nothing_rolls_out(self) -> None:
        for version in self.versions.values():
            if version.rolling_out:
                raise Refused(f"version {version.number} of {self.name} is rolling out: abort the rollout first")

    def _unclaimed(self, version: Version) -> bool:
        return version.evaluated and not version.deleted and not version.origin.registered_by


def _one(tags: Mapping[str, str], key: str) -> dict[str, str]:
    return {key: tags[key]} if key in tags else {}
