"""The grammar of a delivery's `train` section.

train:
  source: {path: folder}            # or git: {url, ref}
  command: [python, train.py]
  resources: {processes: 2, memory: 4GiB, timeout: 1h, disk: 2GiB}
  environment: {NAME: value}
  seed: 7
  max_attempts: 1
  triggers: [{cron: "0 3 * * *"}]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.domain import training as rules
from trainer.domain.errors import Problem, Rejected
from trainer.domain.schedule import check_cron
from trainer.domain.training import Resources

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class TrainSection:
    """A train section that is right. `path` and `git_url` exclude each other."""

    path: str = ""
    git_url: str = ""
    git_ref: str = ""
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    seed: int = 0
    max_attempts: int = 0
    crons: tuple[str, ...] = ()
    """The triggers: cron expressions of five fields."""


def parse(section_json: str, prefix: str = "train") -> TrainSection:
    """Reads a section. Raises Rejected with everything that is wrong with it, each with its path from the top of the file."""
    try:
        document = json.loads(section_json)
    except (ValueError, RecursionError) as exc:
        raise Rejected([Problem(prefix, f"not JSON: {exc}")]) from exc
    reader = _Reader(prefix)
    section = reader.section(document)
    if reader.problems:
        raise Rejected(reader.problems[:50])
    return section


class _Reader:
    """Reads a section and notes what is wrong on the way."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.problems: list[Problem] = []

    def section(self, document: Any) -> TrainSection:
        known = ("source", "command", "resources", "environment", "seed", "max_attempts", "triggers")
        given = self._mapping(self._prefix, document, known)
        for needed in ("source", "command"):
            if needed not in given:
                self._wrong(f"{self._prefix}.{needed}", "is missing")
        path, git_url, git_ref = self._source(given.get("source")) if "source" in given else ("", "", "")
        resources = self._resources(given.get("resources", {}))
        command = self._words(given["command"], resources.processes) if "command" in given else ()
        return TrainSection(
            path=path,
            git_url=git_url,
            git_ref=git_ref,
            command=command,
            environment=self._environment(given.get("environment", {})),
            resources=resources,
            seed=self._whole(f"{self._prefix}.seed", given.get("seed", 0), 0, rules.MAX_SEED),
            max_attempts=self._whole(f"{self._prefix}.max_attempts", given.get("max_attempts", 0), 0, rules.MAX_ATTEMPTS),
            crons=tuple(self._triggers(given.get("triggers", []))),
        )

    def _source(self, value: Any) -> tuple[str, str, str]:
        where = f"{self._prefix}.source"
        given = self._mapping(where, value, ("path", "git"))
        if len(given) != 1:
            self._wrong(where, "either path or git")
            return "", "", ""
        if "path" in given:
            path = self._text(f"{where}.path", given["path"])
            if path.startswith("/") or "\\" in path or ".." in path.split("/"):
                self._wrong(f"{where}.path", "a folder below the repository's top, without ..")
            return path, "", ""
        git = self._mapping(f"{where}.git", given["git"], ("url", "ref"))
        url = self._text(f"{where}.git.url", git["url"]) if "url" in git else ""
        ref = self._text(f"{where}.git.ref", git["ref"]) if "ref" in git else ""
        self.problems += rules.check_git(f"{where}.git", url, ref)
        return "", url, ref

    def _words(self, value: Any, processes: int) -> tuple[str, ...]:
        where = f"{self._prefix}.command"
        if not isinstance(value, list):
            self._wrong(where, "a list of words is needed, like [python, train.py]")
            return ()
        words = tuple(self._text(f"{where}[{index}]", word, empty=True) for index, word in enumerate(value))
        self.problems += rules.check_command(where, words, processes)
        return words

    def _resources(self, value: Any) -> Resources:
        where = f"{self._prefix}.resources"
        given = self._mapping(where, value, ("processes", "memory", "timeout", "disk"))
        resources = Resources(
            processes=self._whole(f"{where}.processes", given["processes"], 1, rules.MAX_PROCESSES) if "processes" in given else 0,
            memory_bytes=int(self._quantity(f"{where}.memory", given["memory"], SIZES, "4GiB")) if "memory" in given else 0,
            timeout_seconds=round(self._quantity(f"{where}.timeout", given["timeout"], TIMES, "90m")) if "timeout" in given else 0,
            disk_bytes=int(self._quantity(f"{where}.disk", given["disk"], SIZES, "2GiB")) if "disk" in given else 0,
        )
        self.problems += [p for p in rules.check_resources(where, resources) if p.field not in {known.field for known in self.problems}]
        return resources

    def _environment(self, value: Any) -> Mapping[str, str]:
        where = f"{self._prefix}.environment"
        given = self._mapping(where, value, None)
        environment = {}
        for name, text in given.items():
            # YAML reads `THREADS: 1` as a number; what is meant is plain.
            environment[name] = str(text) if isinstance(text, int | float) and not isinstance(text, bool) else text
            if not isinstance(environment[name], str):
                self._wrong(f"{where}.{name}", "a text is needed; put it in quotes")
                environment[name] = ""
        self.problems += rules.check_environment(where, environment)
        return environment

    def _triggers(self, value: Any) -> Iterator[str]:
        where = f"{self._prefix}.triggers"
        if not isinstance(value, list):
            self._wrong(where, 'a list is needed, like [{cron: "0 3 * * *"}]')
            return
        for index, trigger in enumerate(value):
            if isinstance(trigger, dict) and set(trigger) == {"cron"} and isinstance(trigger["cron"], str):
                if wrong := check_cron(trigger["cron"]):
                    self._wrong(f"{where}[{index}].cron", wrong)
                yield trigger["cron"]
            else:
                self._wrong(f"{where}[{index}]", '{cron: "minute hour day month weekday"} is needed, or start it with headrace run')

    def _mapping(self, where: str, value: Any, known: tuple[str, ...] | None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._wrong(where, "a mapping is needed")
            return {}
        for name in value:
            if known is not None and name not in known:
                self._wrong(f"{where}.{name}", f"is not known here; known are {', '.join(known)}")
        return value if known is None else {name: value[name] for name in known if name in value}

    def _text(self, where: str, value: Any, *, empty: bool = False) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or (not value and not empty) or "\x00" in value:
            self._wrong(where, "a text is needed")
            return ""
        return value

    def _whole(self, where: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._wrong(where, f"a whole number from {low} to {high}")
            return low
        return value

    def _quantity(self, where: str, value: Any, units: Mapping[str, float], example: str) -> float:
        match = _QUANTITY.fullmatch(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
        if match is None or match[2] not in units or float(match[1]) * units[match[2]] < 1:
            self._wrong(where, f"a number above 0 with a unit ({', '.join(unit for unit in units if unit)}), like {example}")
            return 0
        return float(match[1]) * units[match[2]]

    def _wrong(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))
