"""Filters and orderings of searches for models and versions: read from text into conditions that are joined by AND.

The language is that of MLflow 3.17's searches of its model registry (https://mlflow.org/docs/latest/ml/model-registry/): attributes by
name, tags as `tags.key`, values in quotes. Text is read character by character and bounded before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from registry.domain.errors import Malformed, TooLarge
from registry.domain.names import check_text

MAX_FILTER = 50_000
"""Characters; a list of runs can be long."""

MAX_CONDITIONS = 50
MAX_LIST = 2_000
MAX_ORDERINGS = 10

PROMPT_TAG = "mlflow.prompt.is_prompt"
"""What has this tag is a prompt, and is found only by those who ask for prompts."""

_SPACE = " \t\r\n"
_COMPARING = "=!<>"
_TEXT_OPERATORS = frozenset({"=", "!=", "LIKE", "ILIKE"})
_LIST_OPERATORS = frozenset({"IN", "NOT IN"})
_NUMBER_OPERATORS = frozenset({"=", "!=", "<", "<=", ">", ">="})
_MOST = 2**63 - 1


class Kind(Enum):
    """What an attribute can be compared with."""

    TEXT = 1
    TEXT_OR_LIST = 2
    NUMBER = 3


_OPERATORS = {Kind.TEXT: _TEXT_OPERATORS, Kind.TEXT_OR_LIST: _TEXT_OPERATORS | _LIST_OPERATORS, Kind.NUMBER: _NUMBER_OPERATORS}

MODEL_ATTRIBUTES: Mapping[str, Kind] = {"name": Kind.TEXT_OR_LIST}
VERSION_ATTRIBUTES: Mapping[str, Kind] = {
    "name": Kind.TEXT_OR_LIST,
    "run_id": Kind.TEXT_OR_LIST,
    "source_path": Kind.TEXT,
    "version_number": Kind.NUMBER,
}
MODEL_ORDER = {
    "name": "name",
    "timestamp": "last_updated_timestamp",
    "last_updated_timestamp": "last_updated_timestamp",
    "creation_timestamp": "creation_timestamp",
}
VERSION_ORDER = {one: one for one in ("name", "version_number", "creation_timestamp", "last_updated_timestamp")}


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison: of an attribute, or of the tag `key`. The operator is in capitals."""

    tag: bool
    key: str
    operator: str
    value: str | int | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ordering:
    """One key to order by."""

    key: str
    ascending: bool


def read_filter(text: str, attributes: Mapping[str, Kind]) -> tuple[Condition, ...]:
    """All conditions of a filter; an empty one has none. Raises Malformed, TooLarge."""
    check_text("filter", text, MAX_FILTER)
    scanner = _Scanner(text)
    conditions: list[Condition] = []
    while not scanner.at_end():
        if conditions and scanner.word().upper() != "AND":
            raise scanner.wrong("comparisons are joined by AND")
        conditions.append(_condition(scanner, attributes))
        if len(conditions) > MAX_CONDITIONS:
            raise TooLarge(f"the filter has more than {MAX_CONDITIONS} comparisons")
    return tuple(conditions)


def read_order(clauses: Sequence[str], keys: Mapping[str, str]) -> tuple[Ordering, ...]:
    """Clauses like `name ASC`. Raises Malformed, TooLarge."""
    if len(clauses) > MAX_ORDERINGS:
        raise TooLarge(f"order_by has more than {MAX_ORDERINGS} clauses")
    read: list[Ordering] = []
    for clause in clauses:
        check_text("order_by", clause, 500)
        words = clause.split()
        name = words[0].removeprefix("attribute.").removeprefix("attributes.").strip('`"') if words else ""
        if name not in keys:
            raise Malformed(f"Invalid order by key '{name}' specified. Valid keys are {', '.join(keys)}")
        if len(words) > 2 or (len(words) == 2 and words[1].upper() not in ("ASC", "DESC")):
            raise Malformed(f"Invalid order_by clause '{clause}': a key, then ASC or DESC")
        if any(keys[name] == one.key for one in read):
            raise Malformed(f"`order_by` contains duplicate fields: {', '.join(clauses)}")
        read.append(Ordering(keys[name], len(words) == 1 or words[1].upper() == "ASC"))
    return tuple(read)


def without_prompts(conditions: Sequence[Condition]) -> tuple[tuple[Condition, ...], bool]:
    """The conditions but those on being a prompt, and whether it is prompts that are asked for; else they are left out."""
    about = [one for one in conditions if one.tag and one.key == PROMPT_TAG]
    asked = bool(about) and (about[0].operator, str(about[0].value).lower()) in (("=", "true"), ("!=", "false"))
    return tuple(one for one in conditions if one not in about), asked


def _condition(scanner: _Scanner, attributes: Mapping[str, Kind]) -> Condition:
    entity, key = scanner.identifier()
    if entity in ("tag", "tags"):
        kind, tag = Kind.TEXT, True
    elif entity in ("", "attribute", "attributes"):
        if key not in attributes:
            raise scanner.wrong(f"Invalid attribute key '{key}' specified. Valid keys are {', '.join(attributes)}")
        kind, tag = attributes[key], False
    else:
        raise scanner.wrong(f"Invalid entity type '{entity}'. Valid entity types are attribute, tag, tags")
    operator = scanner.operator()
    allowed = (
        _NUMBER_OPERATORS if kind is Kind.NUMBER else _TEXT_OPERATORS | (_LIST_OPERATORS if kind is Kind.TEXT_OR_LIST else frozenset())
    )
    if operator not in allowed:
        raise scanner.wrong(f"Invalid comparator '{operator}' for '{key}': {', '.join(sorted(allowed))} are valid")
    if kind is Kind.NUMBER:
        return Condition(tag, key, operator, scanner.number())
    if operator in _LIST_OPERATORS:
        return Condition(tag, key, operator, scanner.texts())
    return Condition(tag, key, operator, scanner.text())


class _Scanner:
    """Reads a filter from left to right; what it cannot read is Malformed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def wrong(self, why: str) -> Malformed:
        return Malformed(f"Invalid clause(s) in filter string at character {self._at + 1}: {why}")

    def at_end(self) -> bool:
        while self._peek() and self._peek() in _SPACE:
            self._at += 1
        return self._at == len(self._text)

    def word(self) -> str:
        """Letters up to the next space or mark."""
        self.at_end()
        begin = self._at
        while self._peek().isalpha():
            self._at += 1
        return self._text[begin : self._at]

    def identifier(self) -> tuple[str, str]:
        """What stands before the first dot (empty without one), and the key; the key may be in `..` or "..": then anything is in it."""
        self.at_end()
        begin = self._at
        while self._peek().isalnum() or self._peek() == "_":
            self._at += 1
        first = self._text[begin : self._at]
        if self._peek() in ("`", '"') and not first:
            return "", self._quoted(self._peek())
        if self._peek() != ".":
            if not first:
                raise self.wrong("the name of an attribute or tag is expected")
            return "", first
        self._at += 1
        if self._peek() in ("`", '"'):
            return first, self._quoted(self._peek())
        begin = self._at
        while self._peek() and self._peek() not in _SPACE + _COMPARING + "()'\"`,":
            self._at += 1
        if begin == self._at:
            raise self.wrong("a key is expected after the dot")
        return first, self._text[begin : self._at]

    def operator(self) -> str:
        self.at_end()
        begin = self._at
        while self._peek() and self._peek() in _COMPARING:
            self._at += 1
        if begin != self._at:
            return self._text[begin : self._at]
        operator = self.word().upper()
        return f"NOT {self.word().upper()}" if operator == "NOT" else operator

    def text(self) -> str:
        self.at_end()
        if self._peek() not in ("'", '"'):
            raise self.wrong("Expected a quoted string value")
        return self._quoted(self._peek())

    def texts(self) -> tuple[str, ...]:
        self.at_end()
        if self._peek() != "(":
            raise self.wrong("Expected a list of quoted string values, like ('a', 'b')")
        self._at += 1
        found: list[str] = []
        while True:
            found.append(self.text())
            if len(found) > MAX_LIST:
                raise TooLarge(f"a list in the filter has more than {MAX_LIST} values")
            self.at_end()
            mark = self._peek()
            self._at += 1
            if mark == "," and self.at_end():
                raise self.wrong("the list does not end")
            if mark == ")" or (mark == "," and self._peek() == ")"):
                self._at += mark == ","
                return tuple(found)
            if mark != ",":
                raise self.wrong("the values of a list are parted by commas")

    def number(self) -> int:
        """A whole number, in quotes or not."""
        self.at_end()
        if self._peek() in ("'", '"'):
            digits = self._quoted(self._peek())
        else:
            begin = self._at
            while self._peek() and self._peek() not in _SPACE + "()'\"`,":
                self._at += 1
            digits = self._text[begin : self._at]
        unsigned = digits.removeprefix("-")
        if not (unsigned.isascii() and unsigned.isdecimal() and len(unsigned) < 20) or abs(int(digits)) > _MOST:
            raise self.wrong(f"Invalid value for numeric attribute: {digits[:50]!r}")
        return int(digits)

    def _quoted(self, mark: str) -> str:
        """The text between two marks; a mark within is written twice."""
        self._at += 1
        parts: list[str] = []
        while True:
            end = self._text.find(mark, self._at)
            if end < 0:
                raise self.wrong(f"a {mark} is not closed")
            parts.append(self._text[self._at : end])
            self._at = end + 1
            if self._peek() != mark:
                return mark.join(parts)
            self._at += 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]
