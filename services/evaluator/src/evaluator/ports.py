"""What the evaluator's use cases need from outside. The artifact store's port is `artifacts.ArtifactStore`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from servicekit.errors import Unavailable

from evaluator.domain.candidate import DataVersion, Model
from evaluator.domain.evaluation import Champion, Claim, Evaluation, Event, Evidence, Judgement, Latency, Verdict
from evaluator.domain.statistics import Floats


class WorkerDied(Unavailable):
    """The process that predicts died, hung or left nothing of use. A model can do that to it, so it is not tried for ever."""


class Unjudgeable(Exception):
    """The evaluation cannot be done, and trying again does not help: the reason why it failed, in a sentence."""


class Claims(Protocol):
    """The deliveries in force."""

    def of_experiment(self, experiment: str) -> Claim | None:
        """The delivery that claims an experiment; None when none does, as far as deliveries are known."""
        ...


class DeliveriesRead(Protocol):
    """How far the deliveries are known."""

    def saw(self, partition: int, position: int) -> None:
        """Notes that every record before this offset has been read, whatever it was."""
        ...

    async def check(self, *, now: bool) -> None:
        """Raises Unavailable unless all deliveries are known that there were at some moment since the start (`now`: at this moment)."""
        ...


class Evaluations(Protocol):
    async def add(self, evaluation: Evaluation) -> bool:
        """Stores a new one; False when this model of this run has been judged before (for the same reason to judge it)."""
        ...

    async def get(self, evaluation_id: str) -> Evaluation | None: ...

    async def lock(self, evaluation_id: str) -> Evaluation | None:
        """The evaluation, held until the transaction ends."""
        ...

    async def save(self, evaluation: Evaluation) -> None:
        """Stores status, reason, judgement and end of one that is held."""
        ...

    async def page(self, delivery: str, run_id: str, before: str, limit: int) -> Sequence[Evaluation]:
        """Newest first, those before the id `before`; an empty filter lets everything through."""
        ...


class UnitOfWork(Protocol):
    """One transaction: what is done in it happens as a whole or not at all."""

    @property
    def evaluations(self) -> Evaluations: ...

    async def champion(self, model: str) -> Champion | None: ...

    async def crown(self, model: str, champion: Champion | None) -> None:
        """Remembers who is champion of a model now."""
        ...

    async def enqueue(self, evaluation: Evaluation) -> None:
        """Has the evaluation worked on after this transaction has committed. Once per evaluation."""
        ...

    async def emit(self, event: Event) -> None:
        """Has the event published if and only if this transaction commits, in order per model."""
        ...


class Store(Protocol):
    """Where the evaluator keeps what it knows."""

    def transaction(self) -> AbstractAsyncContextManager[UnitOfWork]: ...


@dataclass(frozen=True, slots=True)
class StoredHoldout:
    """A version of a data set as the tracker knows it."""

    ref: DataVersion
    key: str
    size_bytes: int
    marked: bool
    """Whether it was registered as a holdout, which no training may read."""


class Datasets(Protocol):
    async def find(self, name: str, version: int) -> StoredHoldout:
        """Raises servicekit.errors.NotFound, and Transient when the tracker does not answer."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the sandboxed process found out. `scores` one per row; `samples` an array per output for the sample rows."""

    scores: Floats
    samples: dict[str, Any] | None
    latency: Latency | None


class Predictor(Protocol):
    async def predict(
        self, model: Path, declared: Model | None, rows: Path, samples: dict[str, Any] | None, *, measure: bool
    ) -> Prediction:
        """Runs a model on rows, and on sample inputs if there are some; measures its latency if asked to.

        With `declared` the file's inputs and outputs must be those; the first output is the score.
        Raises Unjudgeable for what is the model's own fault, Transient when the process died or took too long.
        """
        ...


class HoldoutReader(Protocol):
    def split(self, file: Path, label: str, rows: Path) -> Floats:
        """Writes the columns of a holdout but its label to `rows`, and returns the labels. Blocks. Raises Unjudgeable."""
        ...


class Reporter(Protocol):
    def json(self, judgement: Judgement, verdict: Verdict, evidence: Evidence) -> bytes:
        """The report for programs. Blocks."""
        ...

    def html(self, judgement: Judgement, verdict: Verdict, evidence: Evidence) -> bytes:
        """The report for people, one page that needs nothing else. Blocks for about a second."""
        ...
