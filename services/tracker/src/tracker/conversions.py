"""Models that MLflow logged in a form that is not delivered: their files for the trainer, which converts them, and what comes of it.

What the trainer brings was made by the code of a stranger in a sandbox: here it is held to the same as what an SDK logs.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from artifacts.onnxfile import MAX_ONNX_BYTES, check_one_file
from artifacts.onnxgraph import read_graph
from servicekit.errors import Invalid, NotFound

from tracker.adoption import TAG, Unfit, declare, signature_of, tell_again
from tracker.domain.artifact import Artifact, is_model_id
from tracker.domain.conversion import Conversion
from tracker.domain.errors import Rejected
from tracker.domain.model import MAX_SAMPLES_BYTES, BlobRef, DeliverableModel, check_samples
from tracker.handlers import found_run
from tracker.ports import Store

_MAX_TAG = 5_000


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made, stored under the keys of its content already; the keys that are told are not believed."""

    blob: BlobRef
    samples: BlobRef


class Conversions:
    """The trainer's side of conversions. Only services call these."""

    def __init__(self, store: Store, objects: ArtifactStore, *, work_dir: Path) -> None:
        """`work_dir`: where models are laid that are looked at."""
        self._store = store
        self._objects = objects
        self._work_dir = work_dir

    async def files(self, run_id: str, owner: str, folder: str) -> Sequence[Artifact]:
        """The files of a model that waits, their paths relative to its folder. Raises NotFound for any other."""
        async with self._store.transaction() as work:
            found = await work.conversions.find(run_id, owner, folder)
            if found is None:
                raise NotFound(f"no model of run {run_id} at {folder!r} of {owner} waits to be converted")
            below = await work.artifacts.below(owner, folder)
        start = len(folder) + 1 if folder else 0
        return [Artifact(file.path[start:], file.object) for file in below]

    async def settle(self, run_id: str, owner: str, folder: str, converted: Converted | None, refused: str) -> None:
        """Makes what was converted a deliverable model of its run, or says in a tag why there is none, and tells the run's end again.

        Repeatable: what is settled stays. Takes as long as reading the model takes. Raises NotFound when nothing waits there.
        """
        async with self._store.transaction() as work:
            found = await work.conversions.find(run_id, owner, folder)
        if found is None:
            raise NotFound(f"no model of run {run_id} at {folder!r} of {owner} waits to be converted")
        conversion, settled = found
        if settled:
            return
        model: DeliverableModel | None = None
        said = f"no: {refused}"
        if converted is not None:
            try:
                model = await self._checked(conversion, converted)
                said = f"yes, converted from {', '.join(conversion.flavors)}"
            except (Invalid, Unfit) as unfit:
                said = f"no: what its conversion made cannot be delivered: {unfit}"
            except Rejected as rejected:
                problem = rejected.problems[0]
                said = f"no: what its conversion made cannot be delivered: {problem.field}: {problem.message}"
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            again = await work.conversions.find(run_id, owner, folder)
            if again is None or again[1]:
                return
            await work.conversions.settle(run_id, owner, folder)
            if model is not None:
                said = await declare(work, run, model) or said
            if is_model_id(owner):
                await work.logged_models.set_tags(owner, {TAG: said[:_MAX_TAG]})
            await work.runs.log_tags(run_id, {TAG: f"{conversion.name}: {said}"[:_MAX_TAG]})
            await tell_again(work, run)

    async def _checked(self, conversion: Conversion, converted: Converted) -> DeliverableModel:
        blob, samples = _named(converted.blob), _named(converted.samples)
        if blob.size_bytes > MAX_ONNX_BYTES or samples.size_bytes > MAX_SAMPLES_BYTES:
            raise Unfit(f"the model has {blob.size_bytes} bytes and its samples {samples.size_bytes}, which is too much")
        with tempfile.TemporaryDirectory(prefix="headrace-model-", dir=self._work_dir) as scratch:
            file = Path(scratch) / "model.onnx"
            await self._objects.download(blob.key, file, sha256=blob.sha256)
            await asyncio.to_thread(check_one_file, file)
            signature, _ = signature_of(*await asyncio.to_thread(read_graph, file))
        rows = await self._objects.read(samples.key, sha256=samples.sha256, max_bytes=MAX_SAMPLES_BYTES)
        await asyncio.to_thread(check_samples, rows, signature)
        logged_model_id = conversion.owner if is_model_id(conversion.owner) else ""
        return DeliverableModel(conversion.name, "onnx", blob, signature, samples, logged_model_id, conversion.folder)


def _named(told: BlobRef) -> BlobRef:
    return BlobRef(told.sha256, told.size_bytes, blob_key(told.sha256))
