"""Reads a GraphQL query as far as two fixed reads need it: which fields of what are asked for. Directives are read over.

Source: the grammar of executable documents, https://spec.graphql.org/October2021/ (sections 2.1 to 2.12).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from servicekit.errors import Invalid

MAX_QUERY = 64 * 1024
MAX_DEPTH = 32
MAX_SELECTED = 2_000
"""Fields of one answer's shape, fragments counted where they are used."""

# The front is atomic: what separates words has one reading only, however long it is.
_TOKEN = re.compile(
    r"(?>[\s,\ufeff]*(?:\#[^\n]*[\s,\ufeff]*)*)"
    r"(?P<word>\.\.\.|[!$&()=@\[\]{|}:]|[_A-Za-z][_0-9A-Za-z]*|-?[0-9][0-9.eE+-]*|\"(?:[^\"\\\n]|\\.)*\"|$)"
)
_NAME = re.compile(r"[_A-Za-z][_0-9A-Za-z]*")


@dataclass(frozen=True, slots=True)
class Selection:
    """One field as it is asked for: the name of its answer, its own, its arguments with variables filled in, what of it is asked."""

    answered_as: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[Selection, ...] = ()


def read(query: str, variables: Mapping[str, Any], operation: str) -> tuple[Selection, ...]:
    """The fields that the query of this name asks for; "" where there is only one. Raises Invalid, also for mutations."""
    if len(query) > MAX_QUERY:
        raise Invalid(f"the query is longer than {MAX_QUERY} characters")
    reader = _Reader(query, variables)
    operations, fragments = reader.document()
    if operation and operation not in operations:
        raise Invalid(f"there is no operation {operation[:100]!r} in the query")
    if not operation and len(operations) != 1:
        raise Invalid("the query needs one operation, or the name of one")
    chosen = operations[operation] if operation else next(iter(operations.values()))
    return _Spreading(fragments).fields(chosen, 0)


def project(value: Any, fields: tuple[Selection, ...]) -> Any:
    """What is asked of a value: of an object those of its entries, of a list that of each. Raises Invalid for what it has not."""
    if value is None or not fields:
        return value
    if isinstance(value, list):
        return [project(one, fields) for one in value]
    if not isinstance(value, Mapping):
        raise Invalid(f"there is nothing of the name {fields[0].name!r} here")
    for one in fields:
        if one.name not in value:
            raise Invalid(f"there is no field {one.name!r} in {value['__typename']}")
    return {one.answered_as: project(value[one.name], one.fields) for one in fields}


@dataclass(frozen=True, slots=True)
class _Spread:
    """`...Name`, to be replaced by the fragment's fields."""

    name: str


_Raw = tuple["Selection | _Spread | _Parent", ...]


@dataclass(frozen=True, slots=True)
class _Parent:
    """A field, or a fragment in place (no `selection`), with fields that may hold spreads."""

    selection: Selection | None
    fields: _Raw


class _Spreading:
    """Puts fragments in the places where they are named."""

    def __init__(self, fragments: Mapping[str, _Raw]) -> None:
        self._fragments = fragments
        self._count = 0

    def fields(self, raw: _Raw, depth: int) -> tuple[Selection, ...]:
        if depth > MAX_DEPTH:
            raise Invalid(f"the query is nested more than {MAX_DEPTH} deep")
        found: dict[str, Selection] = {}
        for one in raw:
            for selection in self._one(one, depth):
                self._count += 1
                if self._count > MAX_SELECTED:
                    raise Invalid(f"the query asks for more than {MAX_SELECTED} fields")
                before = found.get(selection.answered_as)
                if before is not None:
                    selection = Selection(before.answered_as, before.name, before.arguments, before.fields + selection.fields)
                found[selection.answered_as] = selection
        return tuple(found.values())

    def _one(self, one: Selection | _Spread | _Parent, depth: int) -> tuple[Selection, ...]:
        if isinstance(one, Selection):
            return (one,)
        if isinstance(one, _Spread):
            if one.name not in self._fragments:
                raise Invalid(f"there is no fragment {one.name[:100]!r} in the query")
            return self.fields(self._fragments[one.name], depth + 1)
        inner = self.fields(one.fields, depth + 1)
        if one.selection is None:
            return inner
        return (Selection(one.selection.answered_as, one.selection.name, one.selection.arguments, inner),)


class _Reader:
    """Walks over the tokens of one document."""

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self._text = text
        self._variables = variables
        self._at = 0
        self._depth = 0
        self._word = ""
        self._next()

    def document(self) -> tuple[dict[str, _Raw], dict[str, _Raw]]:
        """Operations and fragments by name; the operation without one by ""."""
        operations: dict[str, _Raw] = {}
        fragments: dict[str, _Raw] = {}
        while self._word:
            kind = "query" if self._word == "{" else self._name()
            if kind == "fragment":
                name = self._name()
                if self._name() != "on":
                    self._wrong()
                self._name()
                self._directives()
                fragments[name] = self._selections()
                continue
            if kind != "query":
                raise Invalid("only queries are answered here")
            name = self._name() if _NAME.fullmatch(self._word) else ""
            if self._word == "(":
                self._over_variables()
            self._directives()
            operations[name] = self._selections()
        return operations, fragments

    def _selections(self) -> _Raw:
        self._deeper()
        self._take("{")
        found: list[Selection | _Spread | _Parent] = []
        while self._word != "}":
            found.append(self._selection())
        self._take("}")
        self._depth -= 1
        return tuple(found)

    def _selection(self) -> Selection | _Spread | _Parent:
        if self._word == "...":
            self._next()
            if self._word not in ("{", "@", "on"):
                name = self._name()
                self._directives()
                return _Spread(name)
            if self._word == "on":
                self._next()
                self._name()
            self._directives()
            return _Parent(None, self._selections())
        name = answered_as = self._name()
        if self._word == ":":
            self._next()
            name = self._name()
        selection = Selection(answered_as, name, self._arguments())
        self._directives()
        return _Parent(selection, self._selections()) if self._word == "{" else selection

    def _arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._word != "(":
            return found
        self._next()
        while self._word != ")":
            name = self._name()
            self._take(":")
            found[name] = self._value()
        self._next()
        return found

    def _directives(self) -> None:
        while self._word == "@":
            self._next()
            self._name()
            self._arguments()

    def _over_variables(self) -> None:
        """Reads over the declarations: what is given is checked by whoever uses it."""
        while self._word != ")":
            if not self._word:
                self._wrong()
            self._next()
        self._next()

    def _value(self) -> Any:
        word = self._word
        if word == "$":
            self._next()
            return self._variables.get(self._name())
        if word in ("[", "{"):
            self._deeper()
            value = self._list() if word == "[" else self._object()
            self._depth -= 1
            return value
        self._next()
        if word in ("true", "false", "null") or word[:1] in '"-0123456789':
            try:
                return json.loads(word)
            except ValueError:
                self._wrong()
        if not _NAME.fullmatch(word):
            self._wrong()
        return word

    def _list(self) -> list[Any]:
        self._next()
        found = []
        while self._word != "]":
            found.append(self._value())
        self._next()
        return found

    def _object(self) -> dict[str, Any]:
        self._next()
        found = {}
        while self._word != "}":
            name = self._name()
            self._take(":")
            found[name] = self._value()
        self._next()
        return found

    def _name(self) -> str:
        word = self._word
        if not _NAME.fullmatch(word):
            self._wrong()
        self._next()
        return word

    def _take(self, word: str) -> None:
        if self._word != word:
            self._wrong()
        self._next()

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Invalid(f"the query is nested more than {MAX_DEPTH} deep")

    def _next(self) -> None:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            self._wrong()
        self._at = match.end()
        self._word = match["word"]

    def _wrong(self) -> NoReturn:
        raise Invalid(f"the query cannot be read at character {self._at}: {self._word[:50]!r}")
