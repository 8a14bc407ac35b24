"""The evaluator's use cases: what an event begins, and how an evaluation is done from the first download to the verdict."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from artifacts.onnxfile import check_one_file
from servicekit.clock import Clock, Ids
from servicekit.errors import Invalid, NotFound, Unavailable, Violation

from evaluator.domain.candidate import Blob, Candidate, FinishedRun, Model, NotACandidate, choose
from evaluator.domain.evaluation import (
    Champion,
    Claim,
    Evaluation,
    Evidence,
    Journey,
    Judgement,
    RunSkipped,
    Status,
    Verdict,
    bootstrap_seed,
    judge,
    unfit_labels,
    unfit_scores,
)
from evaluator.domain.parity import largest_difference
from evaluator.domain.policy import Holdout, Policy
from evaluator.ports import (
    Claims,
    Datasets,
    HoldoutReader,
    Prediction,
    Predictor,
    Reporter,
    Store,
    StoredHoldout,
    UnitOfWork,
    Unjudgeable,
    WorkerDied,
)

MAX_MODEL_BYTES = 4 * 1024**3
MAX_SAMPLES_BYTES = 16 * 1024**2

_CHAMPION_PATIENCE_S = 20.0
_CHAMPION_POLL_S = 0.2

_log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """What came of a finished run."""

    UNCLAIMED = "no delivery claims its experiment"
    SKIPPED = "it is not a candidate"
    RECORDED = "it will be evaluated"
    KNOWN = "it has been recorded before"
    CONVERTING = "its model is being converted; its end is told again then"


@dataclass(frozen=True, slots=True)
class Reevaluation:
    """The registry asks to judge a candidate again, because the champion is another one now."""

    evaluation_id: str
    champion_version: int
    reason: str


class Intake:
    """Turns events into evaluations to be done. Everything happens in the caller's transaction and is quick."""

    def __init__(self, claims: Claims, clock: Clock, ids: Ids) -> None:
        self._claims = claims
        self._clock = clock
        self._ids = ids

    async def run_finished(self, work: UnitOfWork, run: FinishedRun) -> Outcome:
        """Records an evaluation of the run's candidate, or tells why there is none. Repeatable."""
        claim = self._claims.of_experiment(run.experiment)
        if claim is None:
            return Outcome.UNCLAIMED
        if claim.policy is None:
            return await self._skip(work, claim, run, f"the delivery's section evaluate cannot be read: {claim.problem}")
        if run.converting:
            return Outcome.CONVERTING
        chosen = choose(run)
        if isinstance(chosen, NotACandidate):
            return await self._skip(work, claim, run, chosen.reason)
        evaluation = Evaluation(
            evaluation_id=str(self._ids.uuid7()),
            journey=self._journey(claim, run),
            model=claim.model,
            status=Status.PENDING,
            created_at=self._clock.now(),
            candidate=chosen,
            policy=claim.policy,
        )
        return await self._record(work, evaluation)

    async def reevaluation_requested(self, work: UnitOfWork, request: Reevaluation) -> Outcome:
        """Records a new evaluation of a candidate on the journey that it is on, by the policy of that journey. Repeatable.

        Raises NotFound when the evaluation that it replaces was not made here, Invalid when that one is still open or was skipped.
        """
        old = await work.evaluations.lock(request.evaluation_id)
        if old is None:
            raise NotFound(f"there is no evaluation {request.evaluation_id}")
        if old.candidate is None or old.open:
            raise Invalid(f"evaluation {old.evaluation_id} is {old.status.value} and cannot be replaced")
        again = replace(
            old,
            evaluation_id=str(self._ids.uuid7()),
            status=Status.PENDING,
            created_at=self._clock.now(),
            replaces=old.evaluation_id,
            champion_at_least=request.champion_version,
            reason="",
            judgement=None,
            finished_at=None,
        )
        outcome = await self._record(work, again)
        if outcome is Outcome.RECORDED:
            await work.evaluations.save(old.superseded())
        return outcome

    async def champion_changed(self, work: UnitOfWork, model: str, champion: Champion | None) -> None:
        """Remembers whom the next challenger of a model is compared with. Repeatable."""
        await work.crown(model, champion)

    async def _record(self, work: UnitOfWork, evaluation: Evaluation) -> Outcome:
        if not await work.evaluations.add(evaluation):
            return Outcome.KNOWN
        await work.enqueue(evaluation)
        return Outcome.RECORDED

    async def _skip(self, work: UnitOfWork, claim: Claim, run: FinishedRun, reason: str) -> Outcome:
        now = self._clock.now()
        skipped = Evaluation(
            evaluation_id=str(self._ids.uuid7()),
            journey=self._journey(claim, run),
            model=claim.model,
            status=Status.SKIPPED,
            created_at=now,
            reason=reason,
            finished_at=now,
        )
        if not await work.evaluations.add(skipped):
            return Outcome.KNOWN
        await work.emit(RunSkipped(skipped.journey, claim.model, reason))
        return Outcome.SKIPPED

    def _journey(self, claim: Claim, run: FinishedRun) -> Journey:
        return Journey(str(self._ids.uuid7()), claim.delivery, claim.revision, run.run_id)


@dataclass(frozen=True, slots=True)
class Decision:
    """What an evaluation came to: `reason` is empty when it passed."""

    evaluation_id: str
    judgement: Judgement
    reason: str


@dataclass(frozen=True, slots=True)
class _Files:
    """What was fetched for one evaluation."""

    challenger: Path
    champion: Path | None
    holdout: Path
    samples: dict[str, Any] | None


class Evaluator:
    """Does evaluations: fetches, has each model predict in a process of its own, judges, reports, decides."""

    def __init__(
        self,
        store: Store,
        objects: ArtifactStore,
        datasets: Datasets,
        holdouts: HoldoutReader,
        predictor: Predictor,
        reporter: Reporter,
        clock: Clock,
        *,
        work_dir: Path | None = None,
        max_holdout_bytes: int = 2 * 1024**3,
    ) -> None:
        self._store = store
        self._objects = objects
        self._datasets = datasets
        self._holdouts = holdouts
        self._predictor = predictor
        self._reporter = reporter
        self._clock = clock
        self._work_dir = work_dir
        self._max_holdout_bytes = max_holdout_bytes

    async def evaluate(self, evaluation_id: str) -> Decision | None:
        """Does one evaluation and returns what is to be decided; None when it was decided before.

        May be repeated after a crash at any point: what it stores is named by its content. Raises Transient when it is to be tried
        again, NotFound when there is no such evaluation.
        """
        async with self._store.transaction() as work:
            evaluation = await self._found(work, evaluation_id)
            if not evaluation.open:
                return None
            await work.evaluations.save(evaluation.begun())
        judgement, policy = evaluation.blank_judgement(), evaluation.policy
        if policy is None:
            raise Invalid(f"evaluation {evaluation_id} has no policy to judge by")
        try:
            judgement = replace(judgement, champion=await self._champion(evaluation))
            stored = await self._holdout(policy)
            judgement = replace(judgement, holdout=stored.ref)
            judgement, reason = await self._judge(policy, judgement, stored)
        except Unjudgeable as error:
            reason = str(error)
        return Decision(evaluation_id, judgement, reason)

    async def decide(self, work: UnitOfWork, decision: Decision) -> None:
        """Stores an outcome and tells the world, in the caller's transaction. What was decided before stays. Repeatable."""
        evaluation = await self._found(work, decision.evaluation_id)
        if not evaluation.open:
            return
        decided, event = evaluation.decided(decision.judgement, decision.reason, self._clock.now())
        await work.evaluations.save(decided)
        await work.emit(event)
        _log.info("evaluation %s %s", decided.evaluation_id, decided.status.value, extra={"model": decided.model, "reason": decided.reason})

    async def give_up(self, work: UnitOfWork, evaluation_id: str, cause: str) -> None:
        """Decides an evaluation that could not be done, although it was tried, as failed. Repeatable."""
        evaluation = await self._found(work, evaluation_id)
        await self.decide(work, Decision(evaluation_id, evaluation.blank_judgement(), f"it could not be evaluated: {cause}"))

    async def _found(self, work: UnitOfWork, evaluation_id: str) -> Evaluation:
        evaluation = await work.evaluations.lock(evaluation_id)
        if evaluation is None:
            raise NotFound(f"there is no evaluation {evaluation_id}")
        return evaluation

    async def _champion(self, evaluation: Evaluation) -> Champion | None:
        """Who is champion now. The registry may know of a new one before the deployer's event is here; that is waited for."""
        deadline = self._clock.monotonic() + _CHAMPION_PATIENCE_S
        while True:
            async with self._store.transaction() as work:
                champion = await work.champion(evaluation.model)
            if (champion.version if champion else 0) >= evaluation.champion_at_least:
                return champion
            if self._clock.monotonic() >= deadline:
                raise Unavailable(f"version {evaluation.champion_at_least} of {evaluation.model} is not known here as champion yet")
            await self._clock.sleep(_CHAMPION_POLL_S)

    async def _holdout(self, policy: Policy) -> StoredHoldout:
        wanted = policy.holdout
        try:
            stored = await self._datasets.find(wanted.dataset, wanted.version)
        except NotFound as error:
            raise Unjudgeable(f"the holdout {wanted.dataset} version {wanted.version} does not exist") from error
        if not stored.marked:
            raise Unjudgeable(f"{wanted.dataset} version {wanted.version} was not registered as a holdout: trainings may have read it")
        if stored.size_bytes > self._max_holdout_bytes:
            raise Unjudgeable(f"the holdout has {stored.size_bytes} bytes, and {self._max_holdout_bytes} is the most that is read")
        return stored

    async def _judge(self, policy: Policy, judgement: Judgement, stored: StoredHoldout) -> tuple[Judgement, str]:
        candidate, champion = judgement.candidate, judgement.champion
        with tempfile.TemporaryDirectory(prefix="headrace-evaluate-", dir=self._work_dir) as folder:
            directory = Path(folder)
            files = await self._fetch(directory, candidate, champion, stored)
            rows = directory / "rows.arrow"
            labels = await asyncio.to_thread(self._holdouts.split, files.holdout, policy.holdout.label, rows)
            if unfit := unfit_labels(labels):
                raise Unjudgeable(f"the holdout {stored.ref.name} version {stored.ref.version} cannot judge: {unfit}")
            ours = await self._predict("the candidate", files.challenger, candidate.model, rows, files.samples, len(labels))
            theirs = None
            if champion is not None and files.champion is not None:
                whose = f"the champion, version {champion.version},"
                theirs = await self._predict(whose, files.champion, None, rows, None, len(labels))
        if ours.latency is None:
            raise WorkerDied("the process that runs the model measured no latency")
        evidence = Evidence(
            labels=labels,
            challenger=ours.scores,
            champion=theirs.scores if theirs else None,
            latency=ours.latency,
            parity_error=_parity(ours.samples, files.samples),
        )
        seed = bootstrap_seed(stored.ref.sha256, candidate.model.blob.sha256, champion.blob.sha256 if champion else "")
        verdict = await asyncio.to_thread(judge, policy, evidence, seed)
        judgement = replace(judgement, comparison=verdict.comparison, gates=verdict.gates)
        return await self._report(judgement, verdict, evidence), verdict.reason

    async def _fetch(self, directory: Path, candidate: Candidate, champion: Champion | None, stored: StoredHoldout) -> _Files:
        challenger_file, holdout_file = directory / "challenger.onnx", directory / "holdout"
        await self._download_model("the candidate's model", candidate.model.blob, challenger_file)
        champion_file = None
        if champion is not None:
            champion_file = directory / "champion.onnx"
            await self._download_model("the champion's model", champion.blob, champion_file)
        await self._download("the holdout", stored.key, stored.ref.sha256, holdout_file)
        samples = None
        if candidate.model.samples is not None:
            samples = await self._samples(candidate.model.samples)
        return _Files(challenger_file, champion_file, holdout_file, samples)

    async def _download_model(self, what: str, blob: Blob, path: Path) -> None:
        if blob.size_bytes > MAX_MODEL_BYTES:
            raise Unjudgeable(f"{what} has {blob.size_bytes} bytes, and {MAX_MODEL_BYTES} is the most that is evaluated")
        # By the key that follows from the content, whatever key the event names.
        await self._download(what, blob_key(blob.sha256), blob.sha256, path)
        try:
            await asyncio.to_thread(check_one_file, path)
        except Invalid as error:
            raise Unjudgeable(f"{what} cannot be evaluated: {error}") from error

    async def _download(self, what: str, key: str, sha256: str, path: Path) -> None:
        try:
            await self._objects.download(key, path, sha256=sha256)
        except NotFound as error:
            raise Unjudgeable(f"{what} is missing in the artifact store: {key}") from error
        except Invalid as error:  # another hash than the one asked for, above all
            raise Unjudgeable(f"{what} is not what it was: {error}") from error

    async def _samples(self, blob: Blob) -> dict[str, Any]:
        try:
            text = await self._objects.read(blob.key, sha256=blob.sha256, max_bytes=MAX_SAMPLES_BYTES)
            samples = json.loads(text)
            if not isinstance(samples, dict) or not all(isinstance(samples.get(part), dict) for part in ("inputs", "outputs")):
                raise ValueError("not {inputs, outputs}")
        except (Invalid, ValueError) as error:
            raise Unjudgeable(f"the sample rows logged with the model cannot be read: {error}") from error
        return samples

    async def _predict(
        self, whose: str, file: Path, declared: Model | None, rows: Path, samples: dict[str, Any] | None, count: int
    ) -> Prediction:
        """Scores of one model for `count` rows. The candidate is held to what its run declared, and its latency is measured."""
        inputs = samples["inputs"] if samples else None
        try:
            prediction = await self._predictor.predict(file, declared, rows, inputs, measure=declared is not None)
        except Unjudgeable as error:
            raise Unjudgeable(f"{whose} cannot be evaluated: {error}") from error
        if unfit := unfit_scores(prediction.scores, count):
            raise Unjudgeable(f"{whose} cannot be evaluated: {unfit}")
        return prediction

    async def _report(self, judgement: Judgement, verdict: Verdict, evidence: Evidence) -> Judgement:
        stored: dict[str, Blob] = {}
        for name, make in (("report_json", self._reporter.json), ("report_html", self._reporter.html)):
            data = await asyncio.to_thread(make, judgement, verdict, evidence)
            stored[name] = await self._keep(data)
        return replace(judgement, report_json=stored["report_json"], report_html=stored["report_html"])

    async def _keep(self, data: bytes) -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        kept = await self._objects.put(blob_key(sha256), data, sha256=sha256)
        return Blob(kept.sha256, kept.size, kept.key)


def _parity(answers: dict[str, Any] | None, samples: dict[str, Any] | None) -> float | None:
    if answers is None or samples is None or not samples["outputs"]:
        return None
    try:
        return largest_difference(answers, samples["outputs"])
    except ValueError as error:
        raise Unjudgeable(f"the exported model and the training code cannot be compared: {error}") from error


class Holdouts:
    """Says whether what a delivery names as its holdout can be one."""

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets

    async def wrong_with(self, holdout: Holdout) -> list[Violation]:
        """What is wrong with it, and what to do; empty: nothing. Raises Transient when the tracker does not answer."""
        name, version = holdout.dataset, holdout.version
        try:
            stored = await self._datasets.find(name, version)
        except NotFound:
            push = f"push it with `headrace data push {name} FILE --holdout` and name the version that this answers"
            return [Violation("evaluate.holdout.version", f"there is no version {version} of {name}: {push}")]
        if stored.marked:
            return []
        push = "push the rows under another name with `headrace data push NAME FILE --holdout`"
        return [Violation("evaluate.holdout.dataset", f"{name} version {version} is no holdout, so trainings may read it: {push}")]


class Evaluations:
    """What others may ask."""

    def __init__(self, store: Store, objects: ArtifactStore, *, url_ttl_s: int = 3600) -> None:
        self._store = store
        self._objects = objects
        self._url_ttl_s = url_ttl_s

    async def get(self, evaluation_id: str) -> Evaluation:
        """Raises NotFound."""
        async with self._store.transaction() as work:
            evaluation = await work.evaluations.get(evaluation_id)
        if evaluation is None:
            raise NotFound(f"there is no evaluation {evaluation_id}")
        return evaluation

    async def page(self, delivery: str, run_id: str, before: str, limit: int) -> Sequence[Evaluation]:
        """Newest first."""
        async with self._store.transaction() as work:
            return await work.evaluations.page(delivery, run_id, before, limit)

    async def report(self, evaluation_id: str, form: str) -> tuple[str, str]:
        """A URL from which anybody can read the report for a while, and its SHA-256. Raises NotFound, Invalid for an unknown form."""
        if form not in ("json", "html"):
            raise Invalid(f"a report has the form json or html, not {form!r}")
        judgement = (await self.get(evaluation_id)).judgement
        blob = None if judgement is None else judgement.report_json if form == "json" else judgement.report_html
        if blob is None:
            raise NotFound(f"evaluation {evaluation_id} has no report")
        return await self._objects.presign_get(blob.key, self._url_ttl_s), blob.sha256
