"""What is judged: the run that finished, the model it logged, and the rule that says which runs are candidates at all."""

from __future__ import annotations

from dataclasses import dataclass, field

CANDIDATE_TAG = "headrace.candidate"
"""The tag by which a run with several models names the one to deliver."""

DELIVERABLE_TAG = "headrace.deliverable"
"""The tag in which the tracker says why a model of the run cannot be delivered."""

FORMATS = frozenset({"onnx"})


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored object, named by its content. `sha256` in lower-case hexadecimal."""

    sha256: str
    size_bytes: int
    key: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output in the words of the Open Inference Protocol V2; -1 in a shape is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a run logged it. `samples` are rows with the training code's own answers."""

    name: str
    format: str
    blob: Blob
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    samples: Blob | None = None


@dataclass(frozen=True, slots=True)
class DataVersion:
    """An immutable version of a data set."""

    name: str
    version: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where the code of a run came from."""

    commit: str = ""
    dirty: bool = False
    diff_key: str = ""
    command: str = ""
    training_id: str = ""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that ended well."""

    run_id: str
    experiment: str
    user: str = ""
    parent_run_id: str = ""
    models: tuple[Model, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    inputs: tuple[DataVersion, ...] = ()
    source: Source = Source()
    converting: bool = False
    """The model that would be its candidate is being converted; the run's end is told again when that is settled."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The model of a run that is to be judged, with where it comes from."""

    run_id: str
    model: Model
    author: str
    source: Source
    training_data: tuple[DataVersion, ...]


@dataclass(frozen=True, slots=True)
class NotACandidate:
    """Why a run is not judged."""

    reason: str


def choose(run: FinishedRun) -> Candidate | NotACandidate:
    """The candidate that a run brings: it is a top-level run with exactly one deliverable model, or its tag names one of several."""
    if run.parent_run_id:
        return NotACandidate(f"it is part of run {run.parent_run_id}; only top-level runs are candidates")
    named = run.tags.get(CANDIDATE_TAG, "")
    if named:
        models = [model for model in run.models if model.name == named]
        if not models:
            return NotACandidate(f"its tag {CANDIDATE_TAG} names {named!r}, and it logged no deliverable model of that name")
    else:
        models = list(run.models)
    if not models:
        why = run.tags.get(DELIVERABLE_TAG, "")
        return NotACandidate(f"it logged no deliverable model{f' ({why})' if why else ''}")
    if len(models) > 1:
        names = ", ".join(sorted(model.name for model in models))
        return NotACandidate(f"it logged {len(models)} deliverable models ({names}); the tag {CANDIDATE_TAG} may name one of them")
    model = models[0]
    if model.format not in FORMATS:
        return NotACandidate(f"its model {model.name} has the format {model.format!r}, which cannot be evaluated")
    return Candidate(run.run_id, model, run.user, run.source, run.inputs)
