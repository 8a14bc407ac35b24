"""What a client says a version was made from: names like `runs:/<run id>/model`, which nobody follows here.

Only names that lead to something the tracker keeps are taken. A place in the world (file, http, s3 ..) never is: whoever dereferenced it
later would do so with rights that the client does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from registry.domain.errors import Malformed
from registry.domain.names import check_text

MAX_SOURCE = 500
MAX_RUN_LINK = 500

PROMPT_SOURCES = frozenset({"dummy-source", "prompt-template"})
"""What MLflow's client writes as the source of a prompt, whose text is a tag."""

_RUN_ID = re.compile(r"[0-9a-zA-Z][0-9a-zA-Z_\-]{0,31}")
_LOGGED_MODEL = re.compile(r"m-[0-9a-f]{32}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?=:)")
_VERSION = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Source:
    """A source as read: of which run, which logged model and which path in the run, or which registered version (`model` with a
    number, an alias or a stage; `latest` is among the stages). What it does not name is empty."""

    text: str
    run_id: str = ""
    logged_model: str = ""
    path: str = ""
    model: str = ""
    version: int = 0
    alias: str = ""
    stage: str = ""


def read_source(text: str) -> Source:
    """Raises Malformed, TooLarge."""
    if not text:
        raise Malformed("Missing value for required parameter 'source'.")
    check_text("source", text, MAX_SOURCE)
    if text in PROMPT_SOURCES:
        return Source(text)
    found = _SCHEME.match(text)
    scheme = found.group().lower() if found else ""
    rest = text[len(scheme) + 1 :]
    if scheme not in ("runs", "models", "mlflow-artifacts"):
        raise _refused(text, "a source is named by runs:/<run id>/<path>, models:/<model id> or mlflow-artifacts:/<path>")
    parts = _parts(text, rest)
    if scheme == "runs":
        if len(parts) < 2 or not _RUN_ID.fullmatch(parts[0]):
            raise _refused(text, "it does not name a run and a path")
        return Source(text, run_id=parts[0], path="/".join(parts[1:]))
    if scheme == "models":
        return _of_models(text, parts)
    # mlflow-artifacts:/<experiment>/<run>/artifacts/<path>, or .../models/<logged model>/artifacts
    if len(parts) >= 4 and parts[1] == "models" and parts[3] == "artifacts" and _LOGGED_MODEL.fullmatch(parts[2]):
        return Source(text, logged_model=parts[2])
    if len(parts) >= 4 and parts[2] == "artifacts" and _RUN_ID.fullmatch(parts[1]):
        return Source(text, run_id=parts[1], path="/".join(parts[3:]))
    raise _refused(text, "it is not within the artifacts of a run or a logged model")


def check_run_id(run_id: str) -> None:
    """Raises Malformed for what cannot be a run's id; empty is none."""
    if run_id and not _RUN_ID.fullmatch(run_id):
        raise Malformed(f"Invalid value for parameter 'run_id': {run_id[:50]!r} is not the id of a run")


def check_logged_model(model_id: str) -> None:
    """Raises Malformed for what cannot be a logged model's id; empty is none."""
    if model_id and not _LOGGED_MODEL.fullmatch(model_id):
        raise Malformed(f"Invalid value for parameter 'model_id': {model_id[:50]!r} is not the id of a logged model")


def _of_models(text: str, parts: list[str]) -> Source:
    if len(parts) == 1 and _LOGGED_MODEL.fullmatch(parts[0]):
        return Source(text, logged_model=parts[0])
    if len(parts) == 1:
        model, at, alias = parts[0].rpartition("@")
        if at and model and alias:
            return Source(text, model=model, alias=alias)
    if len(parts) == 2:
        return _version_of(text, *parts)
    raise _refused(text, "it names neither a logged model nor a version of a registered one")


def _version_of(text: str, model: str, which: str) -> Source:
    if _VERSION.fullmatch(which):
        return Source(text, model=model, version=int(which))
    return Source(text, model=model, stage=which)


def _parts(text: str, rest: str) -> list[str]:
    """The parts of a path, which may not lead anywhere else however often it is decoded."""
    if not rest.startswith("/") or rest.startswith("//"):
        raise _refused(text, "it may not name a host, and its path is absolute")
    decoded = rest
    while (once := unquote(decoded)) != decoded:
        decoded = once
    if any(part in ("", ".", "..") for part in decoded[1:].split("/")) or "\\" in decoded or any(ord(one) < 32 for one in decoded):
        raise _refused(text, "its path has empty or relative parts")
    if any(mark in rest for mark in "?#"):
        raise _refused(text, "it may have no query and no fragment")
    return rest[1:].split("/")


def _refused(text: str, why: str) -> Malformed:
    return Malformed(f"Invalid model version source: '{text[:200]}': {why}")
