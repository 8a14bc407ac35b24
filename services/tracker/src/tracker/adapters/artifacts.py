"""Uploads, artifacts and data sets, in PostgreSQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sqlalchemy import ColumnElement, RowMapping, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.adapters import tables as t
from tracker.domain.artifact import Artifact, Dataset, Listed, Upload
from tracker.domain.model import BlobRef


class SqlArtifacts:
    """Implements `ports.Artifacts` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add_upload(self, upload: Upload) -> None:
        await self._conn.execute(
            t.upload.insert().values(
                upload_id=upload.upload_id,
                owner=upload.owner,
                path=upload.path,
                dataset=upload.dataset,
                key=upload.object.key,
                size_bytes=upload.object.size_bytes,
                sha256=upload.object.sha256,
                store_id=upload.store_id,
                complete=upload.complete,
            )
        )

    async def find_complete(self, owner: str, path: str, dataset: str, sha256: str) -> Upload | None:
        up = t.upload.c
        statement = (
            select(t.upload)
            # Of a path, only what it holds now: completing an older content again would not bring it back.
            .outerjoin(t.artifact, (t.artifact.c.owner == up.owner) & (t.artifact.c.path == up.path) & (t.artifact.c.key == up.key))
            .where(up.complete, up.sha256 == sha256, up.owner == owner, up.path == path, up.dataset == dataset)
            .where(or_(up.owner == "", t.artifact.c.key.is_not(None)))
            .order_by(up.upload_id.desc())
            .limit(1)
        )
        return _upload((await self._conn.execute(statement)).mappings().first())

    async def get_upload(self, upload_id: str) -> Upload | None:
        return _upload((await self._conn.execute(select(t.upload).where(t.upload.c.upload_id == upload_id))).mappings().first())

    async def complete_upload(self, upload: Upload) -> None:
        stored = {"key": upload.object.key, "size_bytes": upload.object.size_bytes, "sha256": upload.object.sha256}
        await self._conn.execute(update(t.upload).where(t.upload.c.upload_id == upload.upload_id).values(complete=True, **stored))
        if upload.owner:
            statement = upsert(t.artifact).values(owner=upload.owner, path=upload.path, **stored)
            await self._conn.execute(statement.on_conflict_do_update(index_elements=["owner", "path"], set_=stored))

    async def drop_upload(self, upload_id: str) -> None:
        await self._conn.execute(delete(t.upload).where(t.upload.c.upload_id == upload_id))

    async def get(self, owner: str, path: str) -> Artifact | None:
        found = t.artifact.c
        row = (await self._conn.execute(select(t.artifact).where(found.owner == owner, found.path == path))).mappings().first()
        return None if row is None else _artifact(row)

    async def below(self, owner: str, path: str) -> Sequence[Artifact]:
        statement = select(t.artifact).where(_below(owner, path)).order_by(t.artifact.c.path)
        return [_artifact(row) for row in (await self._conn.execute(statement)).mappings()]

    async def folder(self, owner: str, path: str, after: str, limit: int) -> Sequence[Listed]:
        found = t.artifact.c
        start = len(path) + 2 if path else 1
        # What a file is called within the folder, or the folder in which it lies there.
        name = func.split_part(func.substr(found.path, start), "/", 1).label("name")
        is_folder = func.strpos(func.substr(found.path, start), "/") > 0
        inside = found.owner == owner
        if path:
            inside &= func.starts_with(found.path, f"{path}/")
        statement = (
            select(name, func.bool_or(is_folder).label("is_folder"), func.sum(found.size_bytes).label("size_bytes"))
            .where(inside)
            .group_by(name)
            .having(name > after)
            .order_by(name)
            .limit(limit)
        )
        prefix = f"{path}/" if path else ""
        listed = (await self._conn.execute(statement)).mappings()
        return [Listed(prefix + row["name"], row["is_folder"], None if row["is_folder"] else int(row["size_bytes"])) for row in listed]

    async def remove(self, owner: str, path: str) -> Sequence[str]:
        gone = await self._conn.execute(delete(t.artifact).where(_below(owner, path)).returning(t.artifact.c.key))
        return list(gone.scalars())

    async def drop_uploads(self, keys: Sequence[str]) -> None:
        await self._conn.execute(delete(t.upload).where(t.upload.c.key.in_(keys)))

    async def find_blob(self, sha256: str) -> BlobRef | None:
        row = (await self._conn.execute(select(t.blob).where(t.blob.c.sha256 == sha256))).mappings().first()
        return None if row is None else _object(row)

    async def add_blob(self, blob: BlobRef) -> None:
        row = {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "key": blob.key}
        await self._conn.execute(upsert(t.blob).values(**row).on_conflict_do_nothing())


def _below(owner: str, path: str) -> ColumnElement[bool]:
    """The artifact at a path and all below it; "" is the top."""
    found = t.artifact.c
    mine = found.owner == owner
    return mine & or_(found.path == path, func.starts_with(found.path, f"{path}/")) if path else mine


def _object(row: RowMapping) -> BlobRef:
    return BlobRef(row["sha256"], row["size_bytes"], row["key"])


def _upload(row: RowMapping | None) -> Upload | None:
    if row is None:
        return None
    return Upload(row["upload_id"], row["owner"], row["path"], row["dataset"], _object(row), row["store_id"], row["complete"])


def _artifact(row: RowMapping) -> Artifact:
    return Artifact(row["path"], _object(row))


class SqlDatasets:
    """Implements `ports.Datasets` on one connection, within its transaction."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def add(self, dataset: Dataset) -> Dataset:
        await self._conn.execute(upsert(t.dataset).values(name=dataset.name, latest_version=0).on_conflict_do_nothing())
        # The data set's row is held from here: versions are given one after another.
        held = select(t.dataset.c.latest_version).where(t.dataset.c.name == dataset.name).with_for_update()
        latest = (await self._conn.execute(held)).scalar_one()
        if same := await self.find(dataset.name, dataset.blob.sha256):
            return same
        new = dataclasses.replace(dataset, version=latest + 1)
        await self._conn.execute(update(t.dataset).where(t.dataset.c.name == new.name).values(latest_version=new.version))
        await self._conn.execute(
            t.dataset_version.insert().values(
                name=new.name,
                version=new.version,
                sha256=new.blob.sha256,
                size_bytes=new.blob.size_bytes,
                key=new.blob.key,
                schema_json=new.schema_json,
                created_ms=new.created_ms,
                holdout=new.holdout,
            )
        )
        return new

    async def get(self, name: str, version: int) -> Dataset | None:
        stored = t.dataset_version.c
        statement = select(t.dataset_version).where(stored.name == name)
        statement = statement.where(stored.version == version) if version else statement.order_by(stored.version.desc()).limit(1)
        return _dataset((await self._conn.execute(statement)).mappings().first())

    async def find(self, name: str, sha256: str) -> Dataset | None:
        stored = t.dataset_version.c
        same = select(t.dataset_version).where(stored.name == name, stored.sha256 == sha256)
        return _dataset((await self._conn.execute(same)).mappings().first())

    async def holdout_of(self, sha256: str) -> Dataset | None:
        stored = t.dataset_version.c
        statement = select(t.dataset_version).where(stored.sha256 == sha256, stored.holdout).order_by(stored.created_ms).limit(1)
        return _dataset((await self._conn.execute(statement)).mappings().first())

    async def all(self) -> Sequence[Dataset]:
        statement = select(t.dataset_version).order_by(t.dataset_version.c.name, t.dataset_version.c.version.desc())
        found = [_dataset(row) for row in (await self._conn.execute(statement)).mappings()]
        return [dataset for dataset in found if dataset is not None]


def _dataset(row: RowMapping | None) -> Dataset | None:
    if row is None:
        return None
    return Dataset(row["name"], row["version"], _object(row), row["schema_json"], row["created_ms"], row["holdout"])
