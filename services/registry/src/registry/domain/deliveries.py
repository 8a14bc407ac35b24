"""Delivery files: their grammar as far as it is the registry's own (head, promote, claims), their revisions, and what makes a gate looser.

The sections train, evaluate and serve belong to other services and are only cut out here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from registry.domain.document import Document, canonical, parse
from registry.domain.errors import Problem

API_VERSION = "headrace/v1"
KIND = "Delivery"
FOREIGN_SECTIONS = ("train", "evaluate", "serve")
"""The sections that other services validate."""

MAX_APPROVALS = 10

_TOP = ("apiVersion", "kind", "metadata", "train", "evaluate", "promote", "serve")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,126}[A-Za-z0-9])?")
_LABEL_RULE = "1 to 63 lower-case letters, digits and hyphens, with a letter or digit at both ends"
_NAME_RULE = "1 to 128 letters, digits, dots, hyphens and underscores, with a letter or digit at both ends"


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that one delivery alone may name: an experiment, a model or an endpoint."""

    kind: str
    name: str

    @property
    def field(self) -> str:
        """Where in the file it is claimed."""
        return {"experiment": "evaluate.experiment", "model": "promote.model", "endpoint": "serve.endpoint"}[self.kind]


@dataclass(frozen=True, slots=True)
class DeliveryFile:
    """A file as read. `sections` holds JSON by name; a section that was left out, or is no mapping, is not in it.

    Names are empty and approvals 0 where the file says nothing of use; `read` tells what is wrong with it.
    """

    name: str
    yaml: str
    document: Document
    sections: Mapping[str, str]
    experiment: str
    model: str
    endpoint: str
    approvals: int

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What it claims; an endpoint only when it serves."""
        return claims_of(self.experiment, self.model, self.endpoint)


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored revision of a delivery; immutable. Revisions of a name count from 1, and a deletion is a revision too."""

    name: str
    revision: int
    yaml: str
    sections: Mapping[str, str]
    experiment: str
    model: str
    endpoint: str
    approvals: int
    applied_by: str
    applied_at: datetime
    deleted: bool = False

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What it holds while it is the newest; nothing once it is deleted."""
        return () if self.deleted else claims_of(self.experiment, self.model, self.endpoint)


def claims_of(experiment: str, model: str, endpoint: str) -> tuple[Claim, ...]:
    """The claims of these names; an empty name claims nothing."""
    pairs = (("experiment", experiment), ("model", model), ("endpoint", endpoint))
    return tuple(Claim(kind, name) for kind, name in pairs if name)


def read(text: str) -> tuple[DeliveryFile, list[Problem]]:
    """Reads a delivery file, and says what is wrong in the registry's own part of it; only a file without problems may be stored.

    Raises DeliveryInvalid when it is not a YAML mapping at all, TooLarge when it is too large.
    """
    document = parse(text)
    check = _Check(document)
    top = document.content
    check.known(top, "", _TOP)
    check.literal(top, "apiVersion", API_VERSION)
    check.literal(top, "kind", KIND)
    metadata = check.mapping(top, "metadata")
    check.known(metadata, "metadata", ("name",))
    name = check.name(metadata, "metadata.name", _LABEL, _LABEL_RULE)
    evaluate = check.mapping(top, "evaluate")
    experiment = check.experiment(evaluate)
    promote = check.mapping(top, "promote")
    check.known(promote, "promote", ("model", "approvals"))
    model = check.name(promote, "promote.model", _NAME, _NAME_RULE)
    approvals = check.approvals(promote)
    endpoint = ""
    if "serve" in top:
        endpoint = check.name(check.mapping(top, "serve"), "serve.endpoint", _LABEL, _LABEL_RULE)
    if "train" in top:
        check.mapping(top, "train")
    sections = {name: top[name] for name in (*FOREIGN_SECTIONS, "promote") if isinstance(top.get(name), dict)}
    file = DeliveryFile(
        name=name,
        yaml=text,
        document=document,
        sections={name: json.dumps(section, ensure_ascii=False) for name, section in sections.items()},
        experiment=experiment,
        model=model,
        endpoint=endpoint,
        approvals=approvals,
    )
    return file, check.problems


def same(file: DeliveryFile, revision: Revision) -> bool:
    """Whether applying the file would change nothing: comments, order of fields and layout do not count."""
    return not revision.deleted and canonical(_parsed(file.sections)) == canonical(_parsed(revision.sections))


def loosened(file: DeliveryFile, before: Sequence[Revision]) -> list[str]:
    """The fields of the registry's own section in which a gate is looser than in any of those before."""
    return ["promote.approvals.production"] if any(file.approvals < one.approvals for one in before) else []


def difference(file: DeliveryFile, before: Revision | None) -> str:
    """A unified diff of the file against the revision before; empty when the text is the same."""
    old = before.yaml if before is not None and not before.deleted else ""
    label = f"{file.name} (revision {before.revision})" if before is not None and not before.deleted else "(nothing)"
    return unified(old, file.yaml, label, f"{file.name} (new)")


def unified(old: str, new: str, old_label: str, new_label: str) -> str:
    """A unified diff of two texts, three lines of context."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_label, new_label, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def revise(file: DeliveryFile, before: Revision | None, by: str, at: datetime) -> Revision:
    """The revision that storing the file makes."""
    return Revision(
        name=file.name,
        revision=(before.revision if before else 0) + 1,
        yaml=file.yaml,
        sections=dict(file.sections),
        experiment=file.experiment,
        model=file.model,
        endpoint=file.endpoint,
        approvals=file.approvals,
        applied_by=by,
        applied_at=at,
    )


def delete(current: Revision, by: str, at: datetime) -> Revision:
    """The revision that deletes a delivery. It keeps text and sections, so that a file applied later can still be held against them."""
    return Revision(
        name=current.name,
        revision=current.revision + 1,
        yaml=current.yaml,
        sections=dict(current.sections),
        experiment=current.experiment,
        model=current.model,
        endpoint=current.endpoint,
        approvals=current.approvals,
        applied_by=by,
        applied_at=at,
        deleted=True,
    )


def taken(document: Document, held: Mapping[Claim, str]) -> list[Problem]:
    """A problem for every claim that another delivery holds."""
    return [
        Problem(claim.field, f"the {claim.kind} {claim.name} belongs to the delivery {holder}", document.line_of(claim.field))
        for claim, holder in held.items()
    ]


def _parsed(sections: Mapping[str, str]) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in sections.items()}


class _Check:
    """Collects what is wrong, so that a user sees everything at once."""

    def __init__(self, document: Document) -> None:
        self.problems: list[Problem] = []
        self._document = document

    def problem(self, field: str, message: str) -> None:
        self.problems.append(Problem(field, message, self._document.line_of(field)))

    def known(self, mapping: Mapping[str, Any], path: str, names: Sequence[str]) -> None:
        for key in mapping:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
                self.problem(f"{path}.{key}" if path else key, f"unknown field; {hint}")

    def literal(self, mapping: Mapping[str, Any], key: str, value: str) -> None:
        if key not in mapping:
            self.problem(key, f"missing; it is {value}")
        elif mapping[key] != value:
            self.problem(key, f"must be {value}")

    def mapping(self, top: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = top.get(key)
        if key not in top:
            self.problem(key, "missing")
        elif not isinstance(value, dict):
            self.problem(key, "must be a mapping of fields")
        return value if isinstance(value, dict) else {}

    def name(self, mapping: Mapping[str, Any], field: str, pattern: re.Pattern[str], rule: str) -> str:
        value = self._text(mapping, field)
        if value and not pattern.fullmatch(value):
            self.problem(field, f"must be {rule}")
        return value

    def experiment(self, evaluate: Mapping[str, Any]) -> str:
        value = self._text(evaluate, "evaluate.experiment")
        if value and (len(value) > 250 or not value.isprintable() or value != value.strip()):
            self.problem("evaluate.experiment", "must be 1 to 250 printable characters without space at its ends")
        return value

    def approvals(self, promote: Mapping[str, Any]) -> int:
        if "approvals" not in promote:
            return 0
        approvals = promote["approvals"]
        if not isinstance(approvals, dict):
            self.problem("promote.approvals", "must be a mapping like {production: 1}")
            return 0
        self.known(approvals, "promote.approvals", ("production",))
        needed = approvals.get("production", 0)
        if isinstance(needed, bool) or not isinstance(needed, int) or not 0 <= needed <= MAX_APPROVALS:
            self.problem("promote.approvals.production", f"must be a whole number from 0 to {MAX_APPROVALS}")
            return 0
        return needed

    def _text(self, mapping: Mapping[str, Any], field: str) -> str:
        section, _, key = field.rpartition(".")
        if section in self._document.content and not isinstance(self._document.content[section], dict):
            return ""  # said already
        value = mapping.get(key)
        if key not in mapping:
            if section in self._document.content:  # a missing section is said already
                self.problem(field, "missing")
        elif not isinstance(value, str):
            self.problem(field, "must be text; put it in quotes")
        elif not value:
            self.problem(field, "must not be empty")
        return value if isinstance(value, str) else ""
