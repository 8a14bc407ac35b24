"""Where uploaded bytes go, and what a path, a data set's name and a schema may look like. Servers assign locations; clients never do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tracker.domain.errors import Problem, Rejected
from tracker.domain.model import BlobRef

MAX_OBJECT_BYTES = 5 * 1024**4
"""What S3 accepts as one object."""

MAX_PATH = 500
MAX_COLUMNS = 10_000
MAX_SCHEMA_BYTES = 1_000_000

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATASET = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_DRIVE = re.compile(r"[A-Za-z]:/")


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload under way or done: to the `path` of an owner, who is a run or a logged model, or to a data set.

    `store_id` is the store's name for a multipart upload. What was not announced has no hash, and size 0, until it is complete.
    """

    upload_id: str
    owner: str
    path: str
    dataset: str
    object: BlobRef
    store_id: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    path: str
    object: BlobRef


@dataclass(frozen=True, slots=True)
class Listed:
    """A file or folder directly within a folder; a folder has no size."""

    path: str
    is_folder: bool
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Dataset:
    """A version of a data set; immutable. On a `holdout` models are judged, so no run may read it."""

    name: str
    version: int
    blob: BlobRef
    schema_json: str
    created_ms: int
    holdout: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A place as MLflow's clients name it: whose artifacts (a run's or a logged model's), and a path among them, "" for the top."""

    experiment_id: int
    owner: str
    path: str


def is_model_id(owner: str) -> bool:
    """Whether an owner of artifacts is a logged model; else it is a run."""
    return owner.startswith("m-")


def location(experiment_id: int, owner: str) -> str:
    """Where the artifacts of an owner are, as MLflow's clients write it."""
    between = "models/" if is_model_id(owner) else ""
    return f"mlflow-artifacts:/{experiment_id}/{between}{owner}/artifacts"


def place(text: str) -> Place:
    """Reads `<experiment>/<run>/artifacts[/path]` or `<experiment>/models/<model>/artifacts[/path]`. Raises Rejected for all else."""
    if problems := check_path(text):
        raise Rejected(problems)
    experiment, *rest = text.split("/")
    owned = _MODEL_ID if rest[:1] == ["models"] else _RUN_ID
    if owned is _MODEL_ID:
        rest = rest[1:]
    number = experiment.isascii() and experiment.isdecimal() and len(experiment) <= 18
    if not number or len(rest) < 2 or not owned.fullmatch(rest[0]) or rest[1] != "artifacts":
        raise Rejected([Problem("path", "<experiment>/<run>/artifacts/.. or <experiment>/models/<model>/artifacts/..")])
    return Place(int(experiment), rest[0], "/".join(rest[2:]))


def check_path(path: str) -> list[Problem]:
    """What is wrong with an artifact's path: relative, with /, no `.` or `..`, no backslash, nothing that cannot be printed.

    It is held to this however often it is decoded, since whoever gets it may decode it once more.
    """
    if not path or len(path.encode(errors="replace")) > MAX_PATH:
        return [Problem("path", f"1 to {MAX_PATH} bytes")]
    while True:
        if "\\" in path or not path.isprintable():
            return [Problem("path", "printable characters and no backslash")]
        if _DRIVE.match(path) or any(part in ("", ".", "..") for part in path.split("/")):
            return [Problem("path", "a relative path without empty parts, . or ..")]
        decoded = unquote(path)
        if decoded == path:
            return []
        path = decoded


def check_content(size_bytes: int, sha256: str) -> list[Problem]:
    """What is wrong with the size and hash that a client announces."""
    problems = []
    if not 0 <= size_bytes <= MAX_OBJECT_BYTES:
        problems.append(Problem("size_bytes", f"0 to {MAX_OBJECT_BYTES}"))
    if not _SHA256.fullmatch(sha256):
        problems.append(Problem("sha256", "64 lower-case hexadecimal digits"))
    return problems


def check_dataset_name(field: str, name: str) -> list[Problem]:
    """What is wrong with a data set's name."""
    if _DATASET.fullmatch(name):
        return []
    return [Problem(field, "1 to 128 of a-z, 0-9, . _ -, beginning with a letter or digit")]


def target(upload_id: str, owner: str, path: str, dataset: str, size_bytes: int, sha256: str) -> BlobRef:
    """Where an upload goes: a key of its own, so that nothing ever overwrites what was verified. Raises Rejected."""
    problems = check_content(size_bytes, sha256)
    if bool(owner) == bool(dataset):
        problems.append(Problem("run_id", "either a run and a path, or a data set"))
    elif owner:
        problems.extend(check_path(path))
    else:
        problems.extend(check_dataset_name("dataset", dataset))
        if path:
            problems.append(Problem("path", "a data set has no path"))
    if problems:
        raise Rejected(problems)
    return BlobRef(sha256, size_bytes, key_of(upload_id, owner, path) if owner else f"datasets/{dataset}/{upload_id}")


def key_of(upload_id: str, owner: str, path: str) -> str:
    """The key of an upload to a path of an owner. The path is right already."""
    return f"{'models' if is_model_id(owner) else 'runs'}/{owner}/artifacts/{upload_id}/{path}"


def check_schema(schema_json: str) -> str:
    """A data set's schema in one spelling: a JSON list of {"name", "type"}; "" stays "". Raises Rejected."""
    if not schema_json:
        return ""
    if len(schema_json) > MAX_SCHEMA_BYTES:
        raise Rejected([Problem("schema_json", f"at most {MAX_SCHEMA_BYTES} characters")])
    try:
        columns: Any = json.loads(schema_json)
    except (ValueError, RecursionError) as exc:
        raise Rejected([Problem("schema_json", f"not JSON: {exc}")]) from exc
    if not isinstance(columns, list) or len(columns) > MAX_COLUMNS:
        raise Rejected([Problem("schema_json", f"a list of at most {MAX_COLUMNS} columns")])
    problems = []
    seen: set[str] = set()
    for index, column in enumerate(columns):
        where = f"schema_json[{index}]"
        if not isinstance(column, dict) or set(column) != {"name", "type"} or not all(isinstance(text, str) for text in column.values()):
            problems.append(Problem(where, 'an object of "name" and "type", both texts'))
            continue
        if not column["name"] or "\x00" in column["name"] + column["type"]:
            problems.append(Problem(f"{where}.name", "a name is needed"))
        if column["name"] in seen:
            problems.append(Problem(f"{where}.name", f"{column['name'][:50]!r} is there twice"))
        seen.add(column["name"])
    if problems:
        raise Rejected(problems[:20])
    return json.dumps(columns, separators=(",", ":"))
