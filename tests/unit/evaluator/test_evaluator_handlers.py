"""The use cases, on a store and a predictor in memory: what an event records, and what an evaluation comes to."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import HashMismatch
from artifacts.memory import MemoryStore
from evaluator.adapters.holdout import ParquetHoldout
from evaluator.domain.candidate import Blob, DataVersion, FinishedRun, Model, Tensor
from evaluator.domain.delivery import Deliveries, Snapshot
from evaluator.domain.evaluation import Champion, Evaluation, EvaluationFailed, EvaluationPassed, Event, Latency, RunSkipped, Status
from evaluator.handlers import Evaluations, Evaluator, Intake, Outcome, Reevaluation
from evaluator.ports import Prediction, StoredHoldout, Unjudgeable
from servicekit.clock import FakeClock, SequentialIds
from servicekit.errors import Invalid, NotFound, Unavailable

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 400
RANDOM = np.random.default_rng(3)
LABELS = (RANDOM.random(ROWS) < 0.4).astype(np.int8)
X = (LABELS + 0.7 * RANDOM.normal(size=ROWS)).astype(np.float32)


class MemoryWork:
    """A unit of work and its evaluations on dictionaries; nothing is undone."""

    def __init__(self) -> None:
        self.rows: dict[str, Evaluation] = {}
        self.champions: dict[str, Champion | None] = {}
        self.jobs: list[str] = []
        self.events: list[Event] = []

    @property
    def evaluations(self) -> MemoryWork:
        return self

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[MemoryWork]:
        yield self

    async def add(self, evaluation: Evaluation) -> bool:
        def identity(one: Evaluation) -> tuple[str, str, str]:
            return one.journey.run_id, one.candidate.model.blob.sha256 if one.candidate else "", one.replaces

        if identity(evaluation) in map(identity, self.rows.values()):
            return False
        self.rows[evaluation.evaluation_id] = evaluation
        return True

    async def get(self, evaluation_id: str) -> Evaluation | None:
        return self.rows.get(evaluation_id)

    async def lock(self, evaluation_id: str) -> Evaluation | None:
        return self.rows.get(evaluation_id)

    async def save(self, evaluation: Evaluation) -> None:
        self.rows[evaluation.evaluation_id] = evaluation

    async def page(self, delivery: str, run_id: str, before: str, limit: int) -> Sequence[Evaluation]:
        return [one for one in self.rows.values() if one.journey.delivery == delivery][:limit]

    async def champion(self, model: str) -> Champion | None:
        return self.champions.get(model)

    async def crown(self, model: str, champion: Champion | None) -> None:
        self.champions[model] = champion

    async def enqueue(self, evaluation: Evaluation) -> None:
        self.jobs.append(evaluation.evaluation_id)

    async def emit(self, event: Event) -> None:
        self.events.append(event)


def model_file(script: bytes) -> bytes:
    """What is an ONNX model as far as protobuf goes: the name of who made it, which is the script."""
    return bytes([0x12, len(script)]) + script


class Scripted:
    """Stands for the sandbox: scores by the bytes of the model's file (`slope`), or the error that they name."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, Model | None, bool, list[str]]] = []

    async def predict(
        self, model: Path, declared: Model | None, rows: Path, samples: dict[str, Any] | None, *, measure: bool
    ) -> Prediction:
        data = (await asyncio.to_thread(model.read_bytes))[2:]
        with pa.memory_map(str(rows)) as source:
            table = pa.ipc.open_file(source).read_all()
        self.seen.append((data, declared, measure, table.column_names))
        if data == b"refused":
            raise Unjudgeable("it cannot be loaded")
        if data == b"dies":
            raise Unavailable("it died")
        slope = float(data)
        scores = 1 / (1 + np.exp(-slope * np.asarray(table["x"], dtype=np.float64)))
        answers = {"p": np.asarray(samples["x"], dtype=np.float64) * slope} if samples else None
        return Prediction(scores * 2 if slope > 90 else scores, answers, Latency(0.1, 0.2, 9) if measure else None)


class PlainReports:
    def json(self, judgement: Any, verdict: Any, evidence: Any) -> bytes:
        return f"json {verdict.comparison.challenger}".encode()

    def html(self, judgement: Any, verdict: Any, evidence: Any) -> bytes:
        return b"html"


class OneDataset:
    def __init__(self, stored: StoredHoldout | None) -> None:
        self.stored = stored

    async def find(self, name: str, version: int) -> StoredHoldout:
        if self.stored is None or (name, version) != (self.stored.ref.name, self.stored.ref.version):
            raise NotFound("none")
        return self.stored


class World:
    """An evaluator with everything around it in memory, and a delivery that claims the experiment `flights`."""

    def __init__(self, **section: Any) -> None:
        self.clock, self.ids = FakeClock(NOW), SequentialIds()
        self.work, self.objects, self.predictor = MemoryWork(), MemoryStore(self.clock), Scripted()
        self.deliveries, self.datasets = Deliveries(), OneDataset(None)
        self.intake = Intake(self.deliveries, self.clock, self.ids)
        self.section = {
            "experiment": "flights",
            "holdout": {"dataset": "april", "version": 1, "label": "late"},
            "metric": {"name": "auc", "margin": 0.01},
            "require": ["auc.at_least 0.6", "parity"],
        } | section
        self.apply()
        self.evaluator = Evaluator(
            self.work, self.objects, self.datasets, ParquetHoldout(), self.predictor, PlainReports(), self.clock, max_holdout_bytes=10**6
        )

    def apply(self, **changes: Any) -> None:
        made = Snapshot("delays", 4, False, "flights", "flight-delays", json.dumps(self.section), NOW)
        self.deliveries.record(replace(made, **changes))

    async def put(self, data: bytes) -> Blob:

        sha256 = hashlib.sha256(data).hexdigest()
        stored = await self.objects.put(f"blobs/sha256/{sha256[:2]}/{sha256}", data)
        return Blob(stored.sha256, stored.size, stored.key)

    async def holdout(self, table: pa.Table | None = None) -> None:
        file = io.BytesIO()
        pq.write_table(table if table is not None else pa.table({"x": X, "late": LABELS}), file)
        blob = await self.put(file.getvalue())
        self.datasets.stored = StoredHoldout(DataVersion("april", 1, blob.sha256), blob.key, blob.size_bytes, marked=True)

    async def run(self, data: bytes = b"1.0", run_id: str = "r" * 32, samples: Any = None, **changes: Any) -> FinishedRun:
        logged = samples if samples is not None else {"inputs": {"x": [1.0, 2.0]}, "outputs": {"p": [1.0, 2.0]}}
        model = Model(
            "model",
            "onnx",
            await self.put(model_file(data)),
            (Tensor("x", "FP32", (-1, 1)),),
            (),
            await self.put(json.dumps(logged).encode()),
        )
        made = FinishedRun(run_id=run_id, experiment="flights", user="ada", models=(model,), inputs=(DataVersion("2013", 1, "c" * 64),))
        return replace(made, **changes)

    async def crown(self, data: bytes, version: int = 1) -> None:
        await self.work.crown("flight-delays", Champion(version, await self.put(model_file(data))))

    async def evaluated(self, run: FinishedRun) -> Evaluation:
        """Takes the run in, does the evaluation and decides it, as job and consumer would."""
        assert await self.intake.run_finished(self.work, run) is Outcome.RECORDED
        return await self.done(self.work.jobs[-1])

    async def done(self, evaluation_id: str) -> Evaluation:
        decision = await self.evaluator.evaluate(evaluation_id)
        assert decision is not None
        await self.evaluator.decide(self.work, decision)
        return self.work.rows[evaluation_id]


@pytest.fixture
async def world() -> World:
    made = World()
    await made.holdout()
    return made


# -- what an event records


async def test_a_candidate_of_a_claimed_experiment_begins_a_journey(world: World) -> None:
    assert await world.intake.run_finished(world.work, await world.run()) is Outcome.RECORDED
    (evaluation,) = world.work.rows.values()
    assert (evaluation.status, evaluation.model) == (Status.PENDING, "flight-delays")
    assert (evaluation.journey.delivery, evaluation.journey.delivery_revision, evaluation.journey.run_id) == ("delays", 4, "r" * 32)
    assert world.work.jobs == [evaluation.evaluation_id]
    assert world.work.events == []


async def test_the_same_run_again_changes_nothing(world: World) -> None:
    run = await world.run()
    await world.intake.run_finished(world.work, run)
    assert await world.intake.run_finished(world.work, run) is Outcome.KNOWN
    assert len(world.work.rows) == len(world.work.jobs) == 1


async def test_nobody_claims_it(world: World) -> None:
    assert await world.intake.run_finished(world.work, await world.run(experiment="other")) is Outcome.UNCLAIMED
    assert not world.work.rows
    assert not world.work.events


async def test_a_deleted_delivery_claims_nothing(world: World) -> None:
    world.apply(revision=5, deleted=True)
    assert await world.intake.run_finished(world.work, await world.run()) is Outcome.UNCLAIMED


async def test_a_run_that_is_no_candidate_is_skipped_with_the_reason_and_once(world: World) -> None:
    run = await world.run(models=())
    assert await world.intake.run_finished(world.work, run) is Outcome.SKIPPED
    assert await world.intake.run_finished(world.work, run) is Outcome.KNOWN
    (event,) = world.work.events
    assert isinstance(event, RunSkipped)
    assert (event.model, event.reason, event.journey.run_id) == ("flight-delays", "it logged no deliverable model", "r" * 32)
    (row,) = world.work.rows.values()
    assert (row.status, row.reason) == (Status.SKIPPED, event.reason)


async def test_a_policy_that_cannot_be_read_skips_and_says_so(world: World) -> None:
    world.apply(revision=5, evaluate_json='{"experiment": "flights"}')
    assert await world.intake.run_finished(world.work, await world.run()) is Outcome.SKIPPED
    assert "evaluate.holdout" in next(iter(world.work.rows.values())).reason


def test_of_a_delivery_the_highest_revision_counts_whatever_comes_last(world: World) -> None:
    world.apply(revision=9, model="newest")
    world.apply(revision=8, model="older")
    claim = world.deliveries.of_experiment("flights")
    assert claim is not None
    assert (claim.revision, claim.model) == (9, "newest")


def test_of_two_deliveries_the_one_that_was_applied_last_claims(world: World) -> None:
    world.apply(name="another", revision=1, model="other", applied_at=NOW.replace(hour=5))
    claim = world.deliveries.of_experiment("flights")
    assert claim is not None
    assert claim.delivery == "another"


# -- what an evaluation comes to


async def test_the_first_candidate_passes_the_absolute_gates(world: World) -> None:
    done = await world.evaluated(await world.run(b"1.0"))
    assert (done.status, done.reason) == (Status.PASSED, "")
    (event,) = world.work.events
    assert isinstance(event, EvaluationPassed)
    judgement = event.judgement
    assert judgement.champion is None
    assert judgement.holdout == DataVersion("april", 1, world.datasets.stored.ref.sha256 if world.datasets.stored else "")
    assert [gate.name for gate in judgement.gates] == ["auc.at_least", "parity"]
    assert (judgement.candidate.author, judgement.candidate.training_data) == ("ada", (DataVersion("2013", 1, "c" * 64),))
    for blob, text in ((judgement.report_json, b"json "), (judgement.report_html, b"html")):
        assert blob is not None
        assert (await world.objects.read(blob.key, sha256=blob.sha256, max_bytes=1000)).startswith(text)


async def test_a_model_never_sees_the_label(world: World) -> None:
    await world.crown(b"0.5")
    await world.evaluated(await world.run(b"1.0"))
    assert [names for *_, names in world.predictor.seen] == [["x"], ["x"]]


async def test_the_champion_is_held_to_nothing_that_it_declared_and_not_measured(world: World) -> None:
    await world.crown(b"0.5", version=7)
    done = await world.evaluated(await world.run(b"1.0"))
    (_, ours, measured, _), (_, theirs, not_measured, _) = world.predictor.seen
    assert ours is not None
    assert theirs is None
    assert (measured, not_measured) == (True, False)
    assert done.judgement is not None
    assert done.judgement.champion is not None
    assert done.judgement.champion.version == 7
    assert done.status is Status.PASSED


async def test_a_challenger_that_is_worse_than_the_champion_fails(world: World) -> None:
    await world.crown(b"1.0")
    done = await world.evaluated(await world.run(b"-1.0", samples={"inputs": {"x": [1.0]}, "outputs": {"p": [-1.0]}}))
    assert done.status is Status.FAILED
    (event,) = world.work.events
    assert isinstance(event, EvaluationFailed)
    assert "against the champion's" in event.reason
    assert event.judgement.report_html is not None


@pytest.mark.parametrize(
    ("data", "samples", "words"),
    [
        (b"refused", None, "the candidate cannot be evaluated: it cannot be loaded"),
        (b"99", None, "not probabilities"),
        (b"1.0", {"inputs": {"x": [1.0]}, "outputs": {"p": [5.0]}}, "differs from the training code by 4"),
        (b"1.0", {"inputs": {"x": [1.0]}, "outputs": {"z": [5.0]}}, "no output 'z'"),
        (b"1.0", {"inputs": {"x": [1.0]}, "outputs": {}}, "no sample rows"),
        (b"1.0", ["not", "samples"], "sample rows logged with the model cannot be read"),
    ],
)
async def test_what_is_wrong_with_a_candidate_is_the_reason(world: World, data: bytes, samples: Any, words: str) -> None:
    done = await world.evaluated(await world.run(data, samples=samples))
    assert done.status is Status.FAILED
    assert words in done.reason


async def test_a_run_without_samples_cannot_show_parity(world: World) -> None:
    run = await world.run()
    done = await world.evaluated(replace(run, models=(replace(run.models[0], samples=None),)))
    assert "no sample rows" in done.reason


async def test_an_artifact_that_is_missing(world: World) -> None:
    run = await world.run()
    await world.objects.delete(run.models[0].blob.key)
    done = await world.evaluated(run)
    assert (done.status, done.judgement is not None) == (Status.FAILED, True)
    assert f"the candidate's model is missing in the artifact store: {run.models[0].blob.key}" == done.reason


async def test_an_artifact_with_other_bytes_than_its_name_says(world: World) -> None:
    run = await world.run()
    await world.objects.put(run.models[0].blob.key, b"2.0")
    done = await world.evaluated(run)
    assert "the candidate's model is not what it was" in done.reason
    assert HashMismatch.__name__ not in done.reason
    assert not world.predictor.seen


async def test_a_champion_that_is_missing(world: World) -> None:
    await world.crown(b"0.5")
    champion = world.work.champions["flight-delays"]
    assert champion is not None
    await world.objects.delete(champion.blob.key)
    done = await world.evaluated(await world.run())
    assert "the champion's model is missing" in done.reason


async def test_a_key_of_the_event_s_choosing_is_not_followed(world: World) -> None:
    run = await world.run()
    blob = replace(run.models[0].blob, key="runs/somebody/else.onnx")
    done = await world.evaluated(replace(run, models=(replace(run.models[0], blob=blob),)))
    assert done.status is Status.PASSED


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"x": X}), "no column 'late'"),
        (pa.table({"x": X, "late": np.zeros(ROWS)}), "both 0 and 1"),
        (pa.table({"x": X, "late": LABELS * 3}), "other than 0 and 1"),
        (pa.table({"x": X, "late": [None, *LABELS[1:].tolist()]}), "1 gaps"),
        (pa.table({"x": X, "late": ["yes"] * ROWS}), "holds string"),
    ],
)
async def test_a_holdout_that_cannot_judge(table: pa.Table, words: str) -> None:
    world = World()
    await world.holdout(table)
    done = await world.evaluated(await world.run())
    assert words in done.reason


async def test_truth_values_are_labels_too() -> None:
    world = World()
    await world.holdout(pa.table({"x": X, "late": LABELS.astype(bool)}))
    assert (await world.evaluated(await world.run())).status is Status.PASSED


async def test_a_holdout_that_is_no_parquet_file(world: World) -> None:
    blob = await world.put(b"a,b\n1,2\n")
    world.datasets.stored = StoredHoldout(DataVersion("april", 1, blob.sha256), blob.key, blob.size_bytes, marked=True)
    assert "not a Parquet file" in (await world.evaluated(await world.run())).reason


async def test_a_holdout_that_does_not_exist_or_is_too_large(world: World) -> None:
    assert world.datasets.stored is not None
    world.datasets.stored = replace(world.datasets.stored, size_bytes=10**9)
    assert "the most that is read" in (await world.evaluated(await world.run(b"1.0"))).reason
    world.datasets.stored = None
    assert "april version 1 does not exist" in (await world.evaluated(await world.run(b"1.1", run_id="s" * 32))).reason


async def test_a_model_whose_weights_are_elsewhere_is_not_even_loaded(world: World, tiny: ModuleType) -> None:
    made = onnx.load_from_string(tiny.linear(1.0))
    weights = made.graph.initializer[0]
    onnx.external_data_helper.set_external_data(weights, location="/proc/self/environ")
    weights.ClearField("raw_data")
    run = await world.run()
    elsewhere = replace(run.models[0], blob=await world.put(made.SerializeToString()))
    judged = await world.evaluated(replace(run, models=(elsewhere,)))
    assert judged.status is Status.FAILED
    assert "the candidate's model cannot be evaluated: the model keeps the tensor" in judged.reason
    assert world.predictor.seen == []


async def test_nothing_is_judged_on_rows_that_trainings_may_have_read(world: World) -> None:
    assert world.datasets.stored is not None
    world.datasets.stored = replace(world.datasets.stored, marked=False)
    judged = await world.evaluated(await world.run())
    assert (judged.status, judged.reason) == (
        Status.FAILED,
        "april version 1 was not registered as a holdout: trainings may have read it",
    )


async def test_what_may_pass_is_raised_and_given_up_in_the_end(world: World) -> None:
    await world.intake.run_finished(world.work, await world.run(b"dies"))
    (evaluation_id,) = world.work.jobs
    with pytest.raises(Unavailable):
        await world.evaluator.evaluate(evaluation_id)
    assert world.work.rows[evaluation_id].status is Status.RUNNING
    await world.evaluator.give_up(world.work, evaluation_id, "Unavailable: it died")
    assert world.work.rows[evaluation_id].reason == "it could not be evaluated: Unavailable: it died"
    assert isinstance(world.work.events[0], EvaluationFailed)


async def test_what_was_decided_stays_decided(world: World) -> None:
    done = await world.evaluated(await world.run())
    assert await world.evaluator.evaluate(done.evaluation_id) is None
    await world.evaluator.give_up(world.work, done.evaluation_id, "its worker died")
    assert world.work.rows[done.evaluation_id] == done
    assert len(world.work.events) == 1


async def test_an_evaluation_that_nobody_knows(world: World) -> None:
    with pytest.raises(NotFound):
        await world.evaluator.evaluate("none")


# -- once more, against another champion


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the clock under test has no event to wait for
            await asyncio.sleep(0)


async def test_a_candidate_is_judged_again_on_the_same_journey_and_policy(world: World) -> None:
    first = await world.evaluated(await world.run())
    world.apply(revision=5, evaluate_json=json.dumps(world.section | {"require": ["auc.at_least 0.999"]}))
    await world.crown(b"0.9", version=2)
    request = Reevaluation(first.evaluation_id, 2, "the champion changed")
    assert await world.intake.reevaluation_requested(world.work, request) is Outcome.RECORDED
    assert await world.intake.reevaluation_requested(world.work, request) is Outcome.KNOWN
    assert world.work.rows[first.evaluation_id].status is Status.SUPERSEDED
    again = await world.done(world.work.jobs[-1])
    assert again.evaluation_id != first.evaluation_id
    assert (again.journey, again.policy, again.replaces) == (first.journey, first.policy, first.evaluation_id)
    assert again.status is Status.PASSED
    assert again.judgement is not None
    assert again.judgement.champion is not None
    assert again.judgement.champion.version == 2


async def test_it_waits_for_the_champion_that_the_registry_told_of(world: World) -> None:
    first = await world.evaluated(await world.run())
    await world.intake.reevaluation_requested(world.work, Reevaluation(first.evaluation_id, 3, ""))

    task = asyncio.create_task(world.evaluator.evaluate(world.work.jobs[-1]))
    await until(lambda: world.clock.sleeping == 1)
    assert not task.done()
    await world.crown(b"0.9", version=3)
    world.clock.advance(1)
    decision = await task
    assert decision is not None
    assert decision.judgement.champion is not None
    assert decision.judgement.champion.version == 3


async def test_it_does_not_wait_for_ever(world: World) -> None:
    first = await world.evaluated(await world.run())
    await world.intake.reevaluation_requested(world.work, Reevaluation(first.evaluation_id, 3, ""))

    task = asyncio.create_task(world.evaluator.evaluate(world.work.jobs[-1]))
    async with asyncio.timeout(10):
        while not task.done():
            if world.clock.sleeping:
                world.clock.advance(5)
            await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="version 3"):
        await task


async def test_what_cannot_be_judged_again(world: World) -> None:
    with pytest.raises(NotFound):
        await world.intake.reevaluation_requested(world.work, Reevaluation("none", 1, ""))
    await world.intake.run_finished(world.work, await world.run())
    with pytest.raises(Invalid, match="pending"):
        await world.intake.reevaluation_requested(world.work, Reevaluation(world.work.jobs[-1], 1, ""))


# -- what others may ask


async def test_a_report_is_a_url_and_its_hash(world: World) -> None:
    done = await world.evaluated(await world.run())
    asked = Evaluations(world.work, world.objects)
    assert done.judgement is not None
    assert done.judgement.report_html is not None
    url, sha256 = await asked.report(done.evaluation_id, "html")
    assert done.judgement.report_html.key in url
    assert sha256 == done.judgement.report_html.sha256
    with pytest.raises(Invalid, match="pdf"):
        await asked.report(done.evaluation_id, "pdf")
    with pytest.raises(NotFound):
        await asked.report("none", "html")


async def test_an_evaluation_that_came_to_nothing_has_no_report(world: World) -> None:
    done = await world.evaluated(await world.run(b"refused"))
    with pytest.raises(NotFound, match="no report"):
        await Evaluations(world.work, world.objects).report(done.evaluation_id, "html")
