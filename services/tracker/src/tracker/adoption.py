"""From MLflow to delivery: a model that MLflow's client logged becomes a deliverable model of its run, by itself.

Its MLmodel file is read, and what goes in and out of its ONNX file; neither is run, and nothing else of it is opened. One of another form
waits until the trainer has converted it (`conversions`). What cannot be delivered says why in the tag `headrace.deliverable`. MLflow keeps
an input example without outputs: so do the sample rows made of it, and a gate that wants parity does not find it shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from artifacts.onnxfile import MAX_ONNX_BYTES, check_one_file
from artifacts.onnxgraph import GraphValue, read_graph
from artifacts.onnxpack import external_files, pack
from servicekit.access import Caller
from servicekit.clock import Clock
from servicekit.errors import Invalid

from tracker import owners
from tracker.domain.artifact import check_path
from tracker.domain.conversion import Conversion
from tracker.domain.errors import Rejected
from tracker.domain.logged_model import LoggedModel
from tracker.domain.mlmodel import MAX_MLMODEL_BYTES, MLMODEL, MlModel, read_mlmodel, sample_inputs
from tracker.domain.model import MAX_MODELS, MAX_SAMPLES_BYTES, BlobRef, DeliverableModel, Signature, TensorSpec, check_signature
from tracker.domain.run import Run, Status
from tracker.handlers import ending, found_experiment, found_run, told
from tracker.ports import Store, UnitOfWork

TAG = "headrace.deliverable"
"""On a logged model, or on the run among whose artifacts a model lies."""

_MAX_BESIDE = 1_000
_MAX_TAG = 5_000


class Unfit(Exception):
    """The model cannot be delivered; the message says why."""


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a model turned out to be: `model` is None for one that cannot be delivered, and `said` is what its tag says."""

    model: DeliverableModel | None
    said: str
    flavors: tuple[str, ...] = ()
    """Of a model that may be converted to one that can be delivered."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model was logged, and the name that it is delivered by."""

    owner: str
    folder: str
    name: str


async def declare(work: UnitOfWork, run: Run, model: DeliverableModel) -> str:
    """Makes a model a deliverable one of a run that is held; returns why not, or "". Repeatable."""
    known = (await work.runs.facts([run.run_id]))[run.run_id].models
    if len({logged.name for logged in known} | {model.name}) > MAX_MODELS:
        return f"no: the run has {MAX_MODELS} deliverable models, which is the most it may"
    await work.artifacts.add_blob(model.blob)
    if model.samples is not None:
        await work.artifacts.add_blob(model.samples)
    await work.runs.log_model(run.run_id, model)
    return ""


async def tell_again(work: UnitOfWork, run: Run) -> None:
    """Tells the end of a run once more, if it ended well: there is something now that was not there when it ended. The run is held."""
    if run.status is not Status.FINISHED or run.lifecycle_stage != "active":
        return
    again = run.next_event()
    await work.runs.save(again)
    experiment = found_experiment(await work.experiments.share(run.experiment_id), run.experiment_id)
    await work.emit(await ending(work, again, experiment))


class Adoption:
    """Makes deliverable models of what MLflow's client logged."""

    def __init__(self, store: Store, objects: ArtifactStore, clock: Clock, *, work_dir: Path) -> None:
        """`work_dir`: where models are laid that are looked at."""
        self._store = store
        self._objects = objects
        self._clock = clock
        self._work_dir = work_dir

    async def of_model(self, caller: Caller, ready: LoggedModel) -> None:
        """Stores that a logged model is ready, and makes it deliverable if it can be. Repeatable; takes as long as reading it takes.

        When its run has ended well, that end is told once more, with the model: the run could not be a candidate before.
        """
        looked = await self._look(ready.model_id, "", ready.name)
        async with self._store.transaction() as work:
            if ready.source_run_id:
                await work.runs.lock(ready.source_run_id)
            held = (await owners.writable(work, caller, ready.model_id)).model
            model = owners.found_model(held, ready.model_id)
            with told():
                final = model.finalize(ready.status, ready.updated_ms)
            if final is not model:
                await work.logged_models.save(final)
            said = looked.said
            if not model.source_run_id:
                said = "no: no run made it"
            elif looked.model is not None or looked.flavors:
                run = found_run(await work.runs.lock(model.source_run_id), model.source_run_id)
                said = await self._declare(work, run, looked, Place(model.model_id, "", ready.name))
            if said:
                await work.logged_models.set_tags(model.model_id, {TAG: said})

    async def of_run(self, caller: Caller, run_id: str) -> None:
        """Makes models deliverable that lie among a run's own artifacts, before it ends. Repeatable; an ended run is left as it is."""
        async with self._store.transaction() as work:
            run = await work.runs.get(run_id)
            if run is None or run.ended or run.lifecycle_stage != "active":
                return
            await owners.writable(work, caller, run_id)
            paths = [artifact.path for artifact in await work.artifacts.below(run_id, "")]
            known = {model.folder for model in (await work.runs.facts([run_id]))[run_id].models}
        folders = [path.removesuffix(f"/{MLMODEL}") for path in paths if path.endswith(f"/{MLMODEL}")][:MAX_MODELS]
        found = [(folder, await self._look(run_id, folder, folder)) for folder in folders if folder not in known]
        if not found:
            return
        async with self._store.transaction() as work:
            run = found_run(await work.runs.lock(run_id), run_id)
            if run.ended:
                return
            said = [(folder, await self._declare(work, run, looked, Place(run_id, folder, folder))) for folder, looked in found]
            if new := "; ".join(f"{folder}: {one}" for folder, one in said if one):
                await work.runs.log_tags(run_id, {TAG: new[:_MAX_TAG]})

    async def _declare(self, work: UnitOfWork, run: Run, looked: _Looked, place: Place) -> str:
        if looked.flavors:
            if not await work.conversions.add(run.run_id, Conversion(place.owner, place.folder, place.name, looked.flavors)):
                return ""
        elif looked.model is None or looked.model in (await work.runs.facts([run.run_id]))[run.run_id].models:
            return looked.said
        elif refused := await declare(work, run, looked.model):
            return refused
        await tell_again(work, run)
        return looked.said

    async def _look(self, owner: str, folder: str, name: str) -> _Looked:
        try:
            with tempfile.TemporaryDirectory(prefix="headrace-model-", dir=self._work_dir) as scratch:
                return await self._deliverable(owner, folder, name, Path(scratch))
        except Rejected as rejected:
            return _Looked(None, f"no: {rejected.problems[0].message}"[:_MAX_TAG])
        except (Invalid, Unfit) as refused:
            return _Looked(None, f"no: {refused}"[:_MAX_TAG])

    async def _deliverable(self, owner: str, folder: str, name: str, scratch: Path) -> _Looked:
        data = await self._read(owner, _in(folder, MLMODEL), MAX_MLMODEL_BYTES)
        described = await asyncio.to_thread(read_mlmodel, data)
        if not described.file:
            flavors = ", ".join(described.flavors)
            said = f"not yet: its flavor is {flavors}; it is converted when its run has finished and a delivery claims the experiment"
            return _Looked(None, said[:_MAX_TAG], described.flavors)
        file, stored = await self._model_file(owner, _in(folder, described.file), scratch)
        inputs, outputs = await asyncio.to_thread(read_graph, file)
        signature, left_out = signature_of(inputs, outputs)
        blob = await self._keep(file, stored)
        said = "yes"
        if left_out:
            said += f"; without what is no tensor: {', '.join(left_out)[:1000]}"
        samples: BlobRef | None = None
        try:
            samples = await self._samples(owner, folder, described, signature)
        except Rejected as rejected:
            problem = rejected.problems[0]
            said += f"; its input example is not used: {problem.field} {problem.message}"
        except (Invalid, Unfit) as refused:
            said += f"; its input example is not used: {refused}"
        logged_model_id = owner if not folder else ""
        return _Looked(DeliverableModel(name, "onnx", blob, signature, samples, logged_model_id, folder), said[:_MAX_TAG])

    async def _model_file(self, owner: str, path: str, scratch: Path) -> tuple[Path, BlobRef | None]:
        """The model as one file, and the artifact that it is, or None when it was put together of several."""
        artifact = await self._artifact(owner, path, MAX_ONNX_BYTES)
        file = scratch / "model.onnx"
        await self._objects.download(artifact.key, file, sha256=artifact.sha256)
        names = await asyncio.to_thread(external_files, file)
        if not names:
            await asyncio.to_thread(check_one_file, file)
            return file, artifact
        if len(names) > _MAX_BESIDE:
            raise Unfit(f"its tensors lie in {len(names)} files, and {_MAX_BESIDE} is the most that are put together")
        left = MAX_ONNX_BYTES - artifact.size_bytes
        beside: dict[str, Path] = {}
        for number, name in enumerate(sorted(names)):
            if check_path(name):
                raise Unfit(f"its tensors lie in {name[:100]!r}, which is no file beside it")
            tensors = await self._artifact(owner, _in(path.rpartition("/")[0], name), left)
            left -= tensors.size_bytes
            beside[name] = scratch / f"tensors-{number}"
            await self._objects.download(tensors.key, beside[name], sha256=tensors.sha256)
        whole = scratch / "whole.onnx"
        await asyncio.to_thread(pack, file, beside, whole)
        await asyncio.to_thread(check_one_file, whole)
        return whole, None

    async def _keep(self, file: Path, stored: BlobRef | None) -> BlobRef:
        """The model as a blob: copied within the store when it is an artifact as it is."""
        if stored is None:
            sha256 = await asyncio.to_thread(_hash, file)
            put = await self._objects.put(blob_key(sha256), file, sha256=sha256)
            return BlobRef(sha256, put.size, put.key)
        await self._objects.copy(stored.key, blob_key(stored.sha256), sha256=stored.sha256)
        return replace(stored, key=blob_key(stored.sha256))

    async def _samples(self, owner: str, folder: str, described: MlModel, signature: Signature) -> BlobRef | None:
        if not described.example:
            return None
        example = await self._read(owner, _in(folder, described.example), MAX_SAMPLES_BYTES)
        rows = await asyncio.to_thread(sample_inputs, example, signature)
        sha256 = hashlib.sha256(rows).hexdigest()
        put = await self._objects.put(blob_key(sha256), rows, sha256=sha256)
        return BlobRef(sha256, put.size, put.key)

    async def _read(self, owner: str, path: str, most: int) -> bytes:
        artifact = await self._artifact(owner, path, most)
        return await self._objects.read(artifact.key, sha256=artifact.sha256, max_bytes=most)

    async def _artifact(self, owner: str, path: str, most: int) -> BlobRef:
        async with self._store.transaction() as work:
            artifact = await work.artifacts.get(owner, path)
        if artifact is None:
            raise Unfit(f"it has no file {path}")
        if artifact.object.size_bytes > most:
            raise Unfit(f"{path} has {artifact.object.size_bytes} bytes, and {most} is the most that is read")
        return artifact.object


def signature_of(inputs: Sequence[GraphValue], outputs: Sequence[GraphValue]) -> tuple[Signature, Sequence[str]]:
    """What callers give and get, and the outputs that are no tensors, which they do not get. Raises Unfit, Rejected."""
    tensors = [value for value in outputs if value.datatype]
    left_out = [value.name for value in outputs if not value.datatype]
    if not tensors:
        raise Unfit(f"none of its outputs is a tensor: {', '.join(left_out)[:500]}")
    specs = []
    for side, values in (("input", inputs), ("output", tensors)):
        for value in values:
            if not value.datatype:
                raise Unfit(f"its input {value.name[:100]!r} is no tensor of a type that the Open Inference Protocol has")
            if not value.shape:
                raise Unfit(f"its {side} {value.name[:100]!r} has no dimension for the rows of a batch")
            if side == "input" and value.shape[0] != -1:
                raise Unfit(
                    f"its input {value.name[:100]!r} takes {value.shape[0]} rows and no other number; "
                    "export it with a first dimension of any length"
                )
        specs.append(tuple(TensorSpec(value.name, value.datatype, value.shape or ()) for value in values))
    signature = Signature(*specs)
    if problems := check_signature(signature):
        raise Rejected(problems)
    return signature, left_out


def _in(folder: str, path: str) -> str:
    return f"{folder}/{path}" if folder else path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
