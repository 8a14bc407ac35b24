"""What clients may call things and write beside them: names of models, aliases, tags, descriptions. Limits count characters.

Limits and rules are those of MLflow 3.17 (https://mlflow.org/docs/latest/ml/model-registry/), so that what it takes is taken here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

from registry.domain.errors import Malformed, TooLarge

CHAMPION = "champion"
"""The alias of the version in production; nobody sets it but a rollout that completed."""

MAX_NAME = 256
MAX_DESCRIPTION = 5_000
MAX_TAG_KEY = 250
MAX_TAG_VALUE = 100_000
MAX_TAGS = 1_000
MAX_TAGS_TEXT = 1_000_000
"""Keys and values of one model or version together."""

MAX_ALIAS = 255
MAX_ALIASES = 1_000

_ALIAS = re.compile(r"[\w\-]+")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
_TAG_KEY = re.compile(r"[/\w.\- :]+")


def check_text(field: str, value: str, limit: int) -> None:
    """Raises TooLarge, and Malformed for what a database or a file cannot hold: the character 0, half a surrogate pair."""
    if len(value) > limit:
        raise TooLarge(f"{field} has {len(value)} characters: {limit} at most")
    if "\x00" in value:
        raise Malformed(f"{field} holds the character 0")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{field} is no valid Unicode") from None


def check_model_name(name: str, field: str = "name") -> None:
    """Raises Malformed, TooLarge."""
    if not name.strip():
        raise Malformed(f"Missing value for required parameter '{field}'.")
    check_text(field, name, MAX_NAME)
    if "/" in name or ":" in name:
        raise Malformed(f"Invalid model name '{name}'. Names cannot contain '/' or ':'.")
    if _another_path(name):
        raise Malformed(f"Invalid model name '{name}': as a file's name it would mean another")


def check_alias(alias: str) -> None:
    """Raises Malformed, TooLarge. `champion` in other letters is refused: it would be taken for the reserved one."""
    if not alias:
        raise Malformed("Missing value for required parameter 'alias'.")
    check_text("alias", alias, MAX_ALIAS)
    if not _ALIAS.fullmatch(alias):
        raise Malformed(f"Invalid alias name: '{alias}'. An alias has letters, digits, - and _ only")
    if _RESERVED_ALIAS.fullmatch(alias):
        raise Malformed(f"the alias '{alias}' is reserved: latest and numbers of versions, like v3, mean something already")
    if alias != CHAMPION and alias.lower() == CHAMPION:
        raise Malformed(f"the alias '{alias}' is reserved: write {CHAMPION}, which is the version in production")


def check_description(text: str) -> None:
    """Raises Malformed, TooLarge."""
    check_text("description", text, MAX_DESCRIPTION)


def check_tag(key: str, value: str) -> None:
    """Raises Malformed, TooLarge."""
    if not key:
        raise Malformed("Missing value for required parameter 'key'.")
    check_text("key", key, MAX_TAG_KEY)
    if not _TAG_KEY.fullmatch(key):
        raise Malformed(f"Invalid value for parameter 'key': {key!r} may hold letters, digits, _, -, ., /, : and spaces only")
    if _another_path(key):
        raise Malformed(f"Invalid value for parameter 'key': {key!r} as a file's name would mean another")
    check_text(f"the tag {key}", value, MAX_TAG_VALUE)


def check_tags(tags: Mapping[str, str]) -> None:
    """All tags that a model or version is to have. Raises Malformed, TooLarge."""
    if len(tags) > MAX_TAGS:
        raise TooLarge(f"{len(tags)} tags: {MAX_TAGS} at most")
    for key, value in tags.items():
        check_tag(key, value)
    if sum(len(key) + len(value) for key, value in tags.items()) > MAX_TAGS_TEXT:
        raise TooLarge(f"the tags have more than {MAX_TAGS_TEXT} characters together")


def _another_path(name: str) -> bool:
    plain = posixpath.normpath(name)
    return plain != name or plain == "." or plain.startswith(("..", "/"))
