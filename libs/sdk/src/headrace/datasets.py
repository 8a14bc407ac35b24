"""Data sets: immutable, versioned files that evaluations and runs refer to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from headrace.config import proxy
from headrace.http import Client, HeadraceError, InvalidInput, Unreachable
from headrace.uploads import upload


@dataclass(frozen=True)
class DatasetVersion:
    """A version of a data set; `sha256` is of the stored file. A `holdout` is what models are judged on."""

    name: str
    version: int
    sha256: str
    holdout: bool = False


def push_dataset(
    name: str, path: str | Path, schema: list[dict[str, str]] | None = None, *, holdout: bool = False, client: Client | None = None
) -> DatasetVersion:
    """Uploads a file as the next version of a data set. Blocks.

    `schema` is [{"name", "type"}] of the columns; left out, a Parquet file's own schema is used when pyarrow is installed.
    A `holdout` is for judging models: no training may read it, and a version never becomes one or ceases to be one.
    Repeatable: the same content answers the version that it has. Raises InvalidInput when there is no such file, or when the version
    that has this content is a holdout and this is to be none, or the other way round; or when this is to be none and the content is
    that of a holdout of another name.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidInput(f"there is no file {file}")
    columns = schema if schema is not None else _parquet_schema(file)
    own = client or Client()
    try:
        stored = upload(own, f"/api/v1/datasets/{name}/uploads", file, {})
        version = {"upload_id": stored["upload_id"], "columns_json": json.dumps(columns), "holdout": holdout}
        answer = own.post(f"/api/v1/datasets/{name}/versions", version, repeatable=True)
    finally:
        if client is None:
            own.close()
    reference: dict[str, Any] = answer["dataset"]["ref"]
    return DatasetVersion(reference["name"], int(reference["version"]), reference["sha256"], holdout)


def pull_dataset(name: str, path: str | Path, version: int = 0, *, client: Client | None = None) -> DatasetVersion:
    """Downloads a version of a data set (0: the newest) to `path`, in constant memory, and verifies its hash. Blocks. Repeatable.

    Raises InvalidInput when there is no such version, Denied when it is a holdout and this is a training, HeadraceError when what
    arrived is not what was registered; then it leaves no file.
    """
    target = Path(path)
    own = client or Client()
    try:
        dataset = own.get(f"/api/v1/datasets/{name}", version=version)["dataset"]
        reference = dataset["ref"]
        url = own.get(f"/api/v1/datasets/{name}/download", version=reference["version"])["url"]
    finally:
        if client is None:
            own.close()
    digest = hashlib.sha256()
    partial = target.with_name(target.name + ".partial")
    try:
        with (
            httpx.stream("GET", url, timeout=httpx.Timeout(60.0, connect=5.0), proxy=proxy(), trust_env=False) as answer,
            partial.open("wb") as file,
        ):
            answer.raise_for_status()
            for chunk in answer.iter_bytes(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != reference["sha256"]:
            raise HeadraceError(f"what the store has as {name} version {reference['version']} is not what was registered")
        partial.replace(target)
    except httpx.HTTPError as error:
        raise Unreachable(f"{name} could not be downloaded: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return DatasetVersion(name, int(reference["version"]), str(reference["sha256"]), bool(dataset["holdout"]))


def _parquet_schema(file: Path) -> list[dict[str, str]]:
    if file.suffix != ".parquet":
        return []
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        return []
    return [{"name": field.name, "type": str(field.type)} for field in parquet.read_schema(file)]
