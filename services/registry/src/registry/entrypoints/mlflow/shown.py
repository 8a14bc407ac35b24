"""Registered models and versions as MLflow's API writes them: times in milliseconds, numbers of versions as texts, nothing that is not set.

A version in Development is `None` there. `status` says whether a version can be used as a name, and every one can; what holds it up on
its way to production is `status_message`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from servicekit.errors import Invalid

from registry.domain.versions import Stage
from registry.handlers.catalogue import wire_stage
from registry.ports import CataloguedVersion, CatalogueEntry

STAGES: Mapping[str, Stage] = {wire_stage(stage).lower(): stage for stage in Stage}


def stage_of(text: str) -> Stage:
    """A stage in MLflow's words, in capitals or not. Raises Invalid."""
    try:
        return STAGES[text.lower()]
    except KeyError:
        known = ", ".join(wire_stage(stage) for stage in Stage)
        raise Invalid(f"Invalid Model Version stage: {text[:50]}. Value must be one of {known}.") from None


def model(entry: CatalogueEntry) -> dict[str, Any]:
    """A registered model."""
    return {
        "name": entry.name,
        "creation_timestamp": _ms(entry.created_at),
        "last_updated_timestamp": _ms(entry.updated_at),
        **({"description": entry.description} if entry.description else {}),
        "latest_versions": [version(one) for one in entry.latest],
        "tags": _tags(entry.tags),
        "aliases": [{"alias": alias, "version": str(number)} for alias, number in entry.aliases.items()],
    }


def version(one: CataloguedVersion) -> dict[str, Any]:
    """A version of a registered model."""
    optional = {
        "description": one.description,
        "run_id": one.run_id,
        "run_link": one.run_link,
        "model_id": one.logged_model,
        "status_message": one.reason if one.reason != "registered" else "",
    }
    return {
        "name": one.model,
        "version": str(one.number),
        "creation_timestamp": _ms(one.created_at),
        "last_updated_timestamp": _ms(one.updated_at),
        "user_id": one.user,
        "current_stage": wire_stage(one.stage),
        "source": one.source,
        "status": "READY",
        **{name: value for name, value in optional.items() if value},
        "tags": _tags(one.tags),
        "aliases": list(one.aliases),
    }


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
