"""A model version as the deployer gets to know it, and the arm that it becomes on an endpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deployer.domain.signature import Signature

FORMATS = frozenset({"onnx"})
"""Formats that the runtimes here can load."""


@dataclass(frozen=True)
class Journey:
    """One candidate's way: which delivery, at which revision, from which run."""

    id: str
    delivery: str
    revision: int
    run_id: str


@dataclass(frozen=True)
class Blob:
    """A stored object that is named by its content."""

    sha256: str
    size: int
    key: str


@dataclass(frozen=True)
class Version:
    """An immutable version of a model: its file, what goes in and out, and sample rows if its run logged any."""

    model_id: str
    model: str
    version: int
    journey: Journey
    format: str
    blob: Blob
    signature: Signature
    samples: Blob | None = None


@dataclass(frozen=True)
class Arm:
    """A version on a runtime, as part of an endpoint. `id` is unique in the endpoint; `runtime_model` is empty until it is loaded.

    `last_revision` is the last revision of the endpoint's route that named it, 0 for none.
    """

    id: str
    endpoint: str
    version: Version
    runtime: str
    runtime_model: str = ""
    last_revision: int = 0


def arm_id(version: int, generation: int) -> str:
    """The name of an arm: `v3-g7`."""
    return f"v{version}-g{generation}"


def runtime_model(version: Version, generation: int) -> str:
    """The name under which a runtime loads a version: `flight-delays-v3-1f2e3d4c-g7`. A generation is used for one load only."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", version.model).strip("-.")[:80] or "model"
    return f"{safe}-v{version.version}-{version.blob.sha256[:8]}-g{generation}"
