"""A YAML file as plain data that knows the line of every field, so that an error can name both.

Only what JSON can say is read, by the core schema of YAML 1.2 (10.3.2): no tags, no anchors or aliases (so nothing can expand), no dates,
no `yes` that means true. Size, depth and the number of values are limited before anything is built.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from registry.domain.errors import DeliveryInvalid, Problem, TooLarge

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_VALUES = 5_000

WHOLE = "(file)"
"""The field of a problem that is of the file as a whole."""

_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_UNSTORABLE = re.compile("[\\x00\\ud800-\\udfff]")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and where: `lines` gives for a path such as `serve.rollout.steps[1].weight` its line, counted from 1."""

    content: dict[str, Any]
    lines: Mapping[str, int]

    def line_of(self, field: str) -> int:
        """The line of a field; of the nearest field around it when it is not in the file; 1 for a path that leads nowhere."""
        while field:
            if field in self.lines:
                return self.lines[field]
            field = field[: max(field.rfind("."), field.rfind("["), 0)]
        return 1


def canonical(value: object) -> str:
    """JSON that is equal exactly when two values are, whatever order their fields were written in."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def parse(text: str) -> Document:
    """Reads one YAML document whose top is a mapping. Raises DeliveryInvalid, which names line and field, or TooLarge."""
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise TooLarge(f"a delivery file may have {MAX_BYTES // 1024} KiB at most")
    reader = _Reader()
    try:
        content = reader.read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DeliveryInvalid(
            [*reader.problems, Problem(reader.last, f"not YAML: {_sentence(error)}", mark.line + 1 if mark else 1)]
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DeliveryInvalid([Problem(reader.last, "not YAML: a character that may not stand in it", line)]) from None
    if reader.problems:
        raise DeliveryInvalid(reader.problems)
    if not isinstance(content, dict):
        raise DeliveryInvalid([Problem(WHOLE, "a delivery file is a mapping that begins with apiVersion", 1)])
    return Document(content, reader.lines)


def _sentence(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(part for part in (error.context, error.problem) if part)


def _line(event: yaml.Event) -> int:
    """The line on which something begins, from 1; the parser's own marks count from 0."""
    return event.start_mark.line + 1 if event.start_mark else 1


class _Stop(Exception):
    """Ends the reading at once: what follows would only be noise, or too much."""


class _Reader:
    """Builds values from the parser's events and keeps the path of what it is reading, so that every error can name it."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self.path = ""
        self.last = WHOLE
        """The field that was begun last: the nearest to a place where the text is no YAML any more."""
        self._values = 0

    def read(self, events: Iterator[yaml.Event]) -> Any:
        try:
            return self._document(events)
        except _Stop:
            return None

    def _document(self, events: Iterator[yaml.Event]) -> Any:
        content: Any = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if content is not None:
                    self._stop("a second document in the same file", event)
                content = self._value(next(events), events, 0)
        return content

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            self._stop(f"more than {MAX_VALUES} values", event)
        if depth > MAX_DEPTH:
            self._stop(f"nested more than {MAX_DEPTH} deep", event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._stop("anchors and aliases are not read: write the value out", event)
        if (tag := getattr(event, "tag", None)) is not None:
            self._stop(f"tags such as {tag} are not read", event)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, depth)
        return self._scalar(event)

    def _mapping(self, events: Iterator[yaml.Event], depth: int) -> dict[str, Any]:
        above = self.path
        result: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._value(event, events, depth + 1) if isinstance(event, yaml.ScalarEvent | yaml.AliasEvent) else None
            if not isinstance(key, str) or not key:
                self._stop("the name of a field is text", event)
            self.path = self.last = f"{above}.{key}" if above else key
            if key in result:
                self._problem(f"given twice: first in line {self.lines[self.path]}", event)
            else:
                self.lines[self.path] = _line(event)
            value = self._value(next(events), events, depth + 1)
            result.setdefault(key, value)
            self.path = above
        return result

    def _sequence(self, events: Iterator[yaml.Event], depth: int) -> list[Any]:
        above = self.path
        result: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            self.path = self.last = f"{above}[{len(result)}]"
            self.lines[self.path] = _line(event)
            result.append(self._value(event, events, depth + 1))
            self.path = above
        return result

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if _UNSTORABLE.search(text):  # escapes in quotes can write what a file itself may not hold
            self._stop("a text may hold neither the character 0 nor half a surrogate pair", event)
        if event.style is not None:  # in quotes, or a block
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text) or _BASED.fullmatch(text):
            number = int(text, 0) if _BASED.fullmatch(text) else int(text[:40])
            if len(text) > 40 or abs(number) >= 1 << 63:
                self._problem("this whole number is too large", event)
            return number
        if _FLOAT.fullmatch(text):
            value = float(text)
            if not math.isfinite(value):
                self._problem("this number is too large", event)
            return value
        if _NOT_FINITE.fullmatch(text):
            self._problem("not a finite number", event)
        return text

    def _problem(self, message: str, event: yaml.Event) -> None:
        self.problems.append(Problem(self.path or WHOLE, message, _line(event)))

    def _stop(self, message: str, event: yaml.Event) -> NoReturn:
        self._problem(message, event)
        raise _Stop
