"""The use cases of conversions: which finished runs have their model converted, and how one is done from its files to what it came to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from servicekit.errors import Invalid, NotFound, Transient

from trainer.domain.conversion import Conversion
from trainer.packaging.packager import Package
from trainer.ports import LoggedModels, StoredBlob, StoredFile, UnitOfWork

MAX_MODEL_BYTES = 4 * 1024**3
MAX_FILES = 10_000
MAX_LOG_BYTES = 4 * 1024**2
LOG = "conversion.txt"
"""The artifact of the run in which a conversion tells what it did."""

_log = logging.getLogger(__name__)


class Packages(Protocol):
    """Makes ONNX of a model in a folder: `packager.Packager`."""

    async def package(self, model: Path, flavours: tuple[str, ...], folder: Path, output: Callable[[bytes], None]) -> Package: ...


class Conversions:
    """Converts the models of finished runs."""

    def __init__(self, models: LoggedModels, objects: ArtifactStore, packages: Packages, *, work_dir: Path) -> None:
        """`work_dir`: where models are laid while they are converted."""
        self._models = models
        self._objects = objects
        self._packages = packages
        self._work_dir = work_dir

    async def asked(self, work: UnitOfWork, conversion: Conversion) -> bool:
        """Queues a conversion in the caller's transaction, if a delivery claims the run's experiment: else False. Repeatable."""
        if not await work.deliveries.claims(conversion.experiment):
            return False
        await work.jobs.convert(conversion)
        return True

    async def convert(self, conversion: Conversion, *, last: bool) -> None:
        """Converts a model and tells the tracker what came of it. Takes minutes. Repeatable, and nothing goes on when it is cancelled.

        Raises Transient when it may work later; with `last` that is told as the reason why it could not be done, and nothing is tried:
        whoever was to do it before may have died of it.
        """
        if last:
            await self._models.refused(conversion, "it could not be converted: the trainer has tried again and again, and its log says why")
            return
        with tempfile.TemporaryDirectory(prefix="conversion-", dir=self._work_dir) as scratch:
            folder = Path(scratch)
            printed = _Printed()
            try:
                await self._convert(conversion, folder, printed)
            except Invalid as refused:
                printed(f"refused: {refused}\n".encode())
                await self._keep_log(conversion, folder, printed)
                await self._models.refused(conversion, str(refused))
                _log.info("model %s of run %s is not converted: %s", conversion.name, conversion.run_id, refused)

    async def _convert(self, conversion: Conversion, folder: Path, printed: _Printed) -> None:
        model = folder / "model"
        await self._fetch(conversion, model)
        made = folder / "made"
        made.mkdir()
        package = await self._packages.package(model, conversion.flavors, made, printed)
        samples = json.dumps(package.samples, separators=(",", ":")).encode()
        stored = await self._stored(package.file)
        rows = await self._stored(samples)
        printed(f"converted, {stored.size_bytes} bytes; against the original: {json.dumps(package.parity)}\n".encode())
        await self._keep_log(conversion, folder, printed)
        await self._models.converted(conversion, stored, rows)
        _log.info("model %s of run %s is converted", conversion.name, conversion.run_id)

    async def _fetch(self, conversion: Conversion, folder: Path) -> None:
        files = await self._models.files(conversion)
        size = sum(file.size_bytes for file in files)
        if size > MAX_MODEL_BYTES or len(files) > MAX_FILES:
            raise Invalid(f"it has {len(files)} files of {size} bytes; {MAX_FILES} of {MAX_MODEL_BYTES} are the most that are converted")
        for file in files:
            place = _inside(folder, file)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                await self._objects.download(file.key, place, sha256=file.sha256)
            except NotFound as gone:
                raise Invalid(f"its file {file.path} is gone from the artifact store") from gone

    async def _stored(self, content: Path | bytes) -> StoredBlob:
        sha256 = await asyncio.to_thread(_hash, content)
        put = await self._objects.put(blob_key(sha256), content, sha256=sha256)
        return StoredBlob(sha256, put.size, put.key)

    async def _keep_log(self, conversion: Conversion, folder: Path, printed: _Printed) -> None:
        file = folder / LOG
        await asyncio.to_thread(file.write_bytes, printed.text())
        try:
            await self._models.store_file(conversion.run_id, LOG, file)
        except Transient:
            raise
        except Exception as exc:  # a run that was deleted meanwhile takes no files; what came of the conversion is told all the same
            _log.warning("the log of the conversion of run %s is not kept: %s", conversion.run_id, exc)


class _Printed:
    """What installer and converter print: the first MAX_LOG_BYTES of it."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def __call__(self, printed: bytes) -> None:
        self._kept += printed[: MAX_LOG_BYTES - len(self._kept)]

    def text(self) -> bytes:
        return bytes(self._kept)


def _inside(folder: Path, file: StoredFile) -> Path:
    """Raises Invalid for a path that leaves the folder."""
    parts = file.path.split("/")
    if not all(parts) or any(part in (".", "..") or "\x00" in part for part in parts):
        raise Invalid(f"its file {file.path[:100]!r} has a path that cannot be laid out")
    return folder.joinpath(*parts)


def _hash(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
