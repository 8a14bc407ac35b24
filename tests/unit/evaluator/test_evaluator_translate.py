"""Protobuf and back, the gRPC face, and the pages of an evaluation's report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.evaluator.v1 import service_pb2
from contracts.registry.v1 import events_pb2 as registry_pb
from contracts.registry.v1 import service_pb2 as registry_service_pb
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from evaluator.adapters.report import Reports
from evaluator.domain.candidate import Blob, Candidate, DataVersion, Model, Source, Tensor
from evaluator.domain.evaluation import (
    Champion,
    Evaluation,
    EvaluationFailed,
    EvaluationPassed,
    Evidence,
    Journey,
    Judgement,
    Latency,
    RunSkipped,
    Status,
    judge,
)
from evaluator.domain.policy import parse
from evaluator.entrypoints import translate
from evaluator.entrypoints.grpc import EvaluatorServicer, SectionServicer
from evaluator.handlers import Holdouts
from evaluator.ports import StoredHoldout
from google.protobuf.timestamp_pb2 import Timestamp
from servicekit.clock import FakeClock, SequentialIds
from servicekit.errors import Invalid, NotFound
from servicekit.paging import MOST

NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
SHA = "ab" * 32
LABELS = (np.random.default_rng(1).random(300) < 0.4).astype(float)
POLICY = parse(
    {
        "experiment": "flights",
        "holdout": {"dataset": "april", "version": 2, "label": "late"},
        "metric": {"name": "auc"},
        "require": ["auc.at_least 0.5", "calibration", "parity", "latency_p99_ms < 20"],
    }
)


def evidence(champion: bool) -> Evidence:
    random = np.random.default_rng(2)
    ours = np.clip(0.4 + 0.3 * (LABELS - 0.4) + 0.2 * random.normal(size=300), 0, 1)
    theirs = np.clip(0.4 + 0.1 * (LABELS - 0.4) + 0.2 * random.normal(size=300), 0, 1)
    return Evidence(LABELS, ours, theirs if champion else None, Latency(0.5, 1.5, 100), 1e-6)


def blob(name: str) -> Blob:
    return Blob(SHA, 10, f"blobs/{name}")


def judgement(champion: bool = True, author: str = "ada") -> Judgement:
    found = judge(POLICY, evidence(champion), 1)
    model = Model("net", "onnx", blob("model"), (Tensor("x", "FP32", (-1, 1)),), (Tensor("p", "FP32", (-1, 1)),), blob("samples"))
    source = Source("c0ffee", True, "diffs/1", "python train.py <script>", "t1")
    return Judgement(
        evaluation_id="e1",
        journey=Journey("j1", "delays", 3, "r" * 32),
        model="flight-delays",
        candidate=Candidate("r" * 32, model, author, source, (DataVersion("2013", 1, SHA),)),
        champion=Champion(4, blob("champion")) if champion else None,
        holdout=DataVersion("april", 2, SHA),
        comparison=found.comparison,
        gates=found.gates,
        report_json=blob("json"),
        report_html=blob("html"),
    )


def encode(event: Any) -> Any:
    return translate.EventEncoder(FakeClock(NOW), SequentialIds())(event, 7)


# -- out


def test_a_passed_evaluation_says_everything_that_the_registry_needs() -> None:
    envelope = encode(EvaluationPassed(judgement()))
    assert (envelope.type, envelope.topic, envelope.key, envelope.sequence) == ("eval.passed", "headrace.evals", "flight-delays", 7)
    assert (envelope.subject, envelope.time) == ("r" * 32, NOW)
    told = evaluator_pb.EvalPassed.FromString(envelope.payload).judgement
    assert told.journey == registry_pb.Journey(journey_id="j1", delivery="delays", delivery_revision=3, run_id="r" * 32)
    assert (told.evaluation_id, told.model, told.champion_version, told.champion_sha256) == ("e1", "flight-delays", 4, SHA)
    assert told.candidate.blob == model_pb2.BlobRef(sha256=SHA, size_bytes=10, key="blobs/model")
    assert told.candidate.samples.key == "blobs/samples"
    assert list(told.candidate.signature.inputs[0].shape) == [-1, 1]
    assert told.holdout == model_pb2.DatasetRef(name="april", version=2, sha256=SHA)
    assert told.comparison.champion == judgement().comparison.champion  # type: ignore[union-attr]
    assert told.comparison.difference_low == told.gates[0].value
    assert [gate.name for gate in told.gates] == ["auc", "auc.at_least", "calibration", "parity", "latency_p99_ms"]
    assert (told.author, told.source.commit, told.source.dirty, told.source.training_id) == ("ada", "c0ffee", True, "t1")
    assert told.training_data == [model_pb2.DatasetRef(name="2013", version=1, sha256=SHA)]
    assert (told.report_json.key, told.report_html.key) == ("blobs/json", "blobs/html")


def test_without_a_champion_its_fields_are_empty() -> None:
    told = evaluator_pb.EvalPassed.FromString(encode(EvaluationPassed(judgement(champion=False))).payload).judgement
    assert (told.champion_version, told.champion_sha256, told.comparison.HasField("champion")) == (0, "", False)


def test_a_failure_before_anything_was_measured() -> None:
    blank = Evaluation("e1", judgement().journey, "m", Status.RUNNING, NOW, judgement().candidate, POLICY).blank_judgement()
    told = evaluator_pb.EvalFailed.FromString(encode(EvaluationFailed(blank, "missing")).payload)
    assert told.reason == "missing"
    assert not told.judgement.HasField("holdout")
    assert not told.judgement.HasField("report_html")


def test_a_skipped_run() -> None:
    envelope = encode(RunSkipped(judgement().journey, "flight-delays", "no model"))
    assert (envelope.type, envelope.key, envelope.subject) == ("eval.skipped", "flight-delays", "r" * 32)
    assert evaluator_pb.EvalSkipped.FromString(envelope.payload).reason == "no model"


# -- in


def test_a_finished_run() -> None:
    message = tracker_pb.RunFinished(
        run_id="r" * 32,
        experiment_name="flights",
        user="ada",
        parent_run_id="p",
        tags={"headrace.candidate": "net"},
        inputs=[model_pb2.DatasetRef(name="2013", version=1, sha256=SHA)],
        source=tracker_pb.RunSource(commit="c0ffee", training_id="t1"),
        models=[
            model_pb2.DeliverableModel(
                name="net",
                format="onnx",
                blob=model_pb2.BlobRef(sha256=SHA, size_bytes=1, key="k"),
                signature=model_pb2.ModelSignature(inputs=[model_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1, 1])]),
            )
        ],
    )
    run = translate.run_finished(message.SerializeToString())
    assert (run.run_id, run.experiment, run.user, run.parent_run_id) == ("r" * 32, "flights", "ada", "p")
    assert run.tags == {"headrace.candidate": "net"}
    assert run.models == (Model("net", "onnx", Blob(SHA, 1, "k"), (Tensor("x", "FP32", (-1, 1)),), (), None),)
    assert (run.source.commit, run.inputs) == ("c0ffee", (DataVersion("2013", 1, SHA),))


def rollout(version: int = 3) -> deployer_pb.RolloutRef:
    return deployer_pb.RolloutRef(rollout_id="o", version=registry_pb.VersionRef(model="flight-delays", version=version))


def test_a_completed_rollout_makes_a_champion_and_a_reverted_one_gives_it_back() -> None:
    stored = model_pb2.BlobRef(sha256=SHA, size_bytes=5, key="k")
    completed = deployer_pb.DeployCompleted(rollout=rollout(), blob=stored).SerializeToString()
    assert translate.champion_changed("deploy.completed", completed) == ("flight-delays", Champion(3, Blob(SHA, 5, "k")))
    reverted = deployer_pb.DeployReverted(rollout=rollout(), to_version=2, to_blob=stored).SerializeToString()
    assert translate.champion_changed("deploy.reverted", reverted) == ("flight-delays", Champion(2, Blob(SHA, 5, "k")))
    nobody = deployer_pb.DeployReverted(rollout=rollout()).SerializeToString()
    assert translate.champion_changed("deploy.reverted", nobody) == ("flight-delays", None)


@pytest.mark.parametrize(
    "call",
    [
        lambda: translate.run_finished(b"\xff\xff"),
        lambda: translate.run_finished(b""),
        lambda: translate.delivery_applied(b"\xff"),
        lambda: translate.champion_changed("deploy.completed", deployer_pb.DeployCompleted().SerializeToString()),
        lambda: translate.champion_changed("deploy.completed", deployer_pb.DeployCompleted(rollout=rollout()).SerializeToString()),
        lambda: translate.page_place("ä"),
        lambda: translate.page_place("abc"),
    ],
)
def test_what_cannot_be_read_is_the_senders_fault(call: Any) -> None:
    with pytest.raises(Invalid):
        call()


def test_a_delivery() -> None:
    message = registry_pb.DeliveryApplied(
        name="d", revision=2, experiment="e", model="m", evaluate_json="{}", applied_at=Timestamp(seconds=60)
    )
    snapshot = translate.delivery_applied(message.SerializeToString())
    assert (snapshot.name, snapshot.revision, snapshot.deleted, snapshot.evaluate_json) == ("d", 2, False, "{}")
    assert snapshot.applied_at == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)


# -- asked for


def evaluation(**changes: Any) -> Evaluation:
    one = Evaluation("e1", judgement().journey, "flight-delays", Status.PENDING, NOW, judgement().candidate, POLICY)
    return replace(one, **changes)


def test_an_evaluation_at_each_stage_of_its_life() -> None:
    waiting = translate.evaluation(evaluation())
    assert (waiting.status, waiting.judgement.candidate.name, waiting.HasField("finished_at")) == ("pending", "net", False)
    done = translate.evaluation(evaluation(status=Status.PASSED, judgement=judgement(), finished_at=NOW))
    assert (done.status, done.judgement.champion_version, done.finished_at.seconds) == ("passed", 4, int(NOW.timestamp()))
    skipped = translate.evaluation(evaluation(status=Status.SKIPPED, candidate=None, policy=None, reason="no model"))
    assert (skipped.reason, skipped.judgement.journey.run_id, skipped.judgement.HasField("candidate")) == ("no model", "r" * 32, False)


class Pages:
    """Three evaluations, newest first."""

    async def page(self, delivery: str, run_id: str, before: str, limit: int) -> list[Evaluation]:
        self.asked = (delivery, run_id, before, limit)
        names = [name for name in ("e3", "e2", "e1") if not before or name < before]
        return [evaluation(evaluation_id=name) for name in names[:limit]]


async def test_pages_follow_one_another_to_the_end() -> None:
    pages: Any = Pages()
    servicer = EvaluatorServicer(pages)
    first = await servicer.ListEvaluations(service_pb2.ListEvaluationsRequest(delivery="d", page_size=2), None)
    assert [one.evaluation_id for one in first.evaluations] == ["e3", "e2"]
    second = await servicer.ListEvaluations(service_pb2.ListEvaluationsRequest(page_size=2, page_token=first.next_page_token), None)
    assert [one.evaluation_id for one in second.evaluations] == ["e1"]
    assert second.next_page_token == ""
    await servicer.ListEvaluations(service_pb2.ListEvaluationsRequest(page_size=10**6), None)
    assert pages.asked[3] == MOST + 1
    with pytest.raises(Invalid):
        await servicer.ListEvaluations(service_pb2.ListEvaluationsRequest(page_size=-1), None)


SECTION = {"experiment": "e", "holdout": {"dataset": "d", "version": 1}, "metric": {"name": "auc"}, "require": ["auc.at_least 0.6"]}


class DataSets:
    """Knows the version 1 of d."""

    marked = True

    async def find(self, name: str, version: int) -> StoredHoldout:
        if (name, version) != ("d", 1):
            raise NotFound("none")
        return StoredHoldout(DataVersion(name, version, "a" * 64), "key", 1, self.marked)


async def validate(
    section: object, previous: object = None, name: str = "evaluate", datasets: DataSets | None = None
) -> registry_service_pb.ValidateSectionResponse:
    request = registry_service_pb.ValidateSectionRequest(
        delivery="d",
        section=name,
        section_json=section if isinstance(section, str) else json.dumps(section),
        previous_json="" if previous is None else json.dumps(previous),
    )
    return await SectionServicer(Holdouts(datasets or DataSets())).ValidateSection(request, None)


async def test_a_section_is_validated_field_by_field() -> None:
    assert not (await validate(SECTION)).violations
    wrong = await validate(SECTION | {"require": ["auc.at_least 0.6", "nonsense"]})
    assert [one.field for one in wrong.violations] == ["evaluate.require[1]"]


async def test_a_holdout_has_to_be_one() -> None:
    unmarked = DataSets()
    unmarked.marked = False
    (wrong,) = (await validate(SECTION, SECTION, datasets=unmarked)).violations
    assert wrong.field == "evaluate.holdout.dataset"
    assert "d version 1 is no holdout" in wrong.message
    assert "headrace data push NAME FILE --holdout" in wrong.message
    (missing,) = (await validate(SECTION | {"holdout": {"dataset": "d", "version": 2}})).violations
    assert missing.field == "evaluate.holdout.version"
    assert "headrace data push d FILE --holdout" in missing.message


async def test_a_looser_section_is_told() -> None:
    assert (await validate(SECTION | {"require": ["auc.at_least 0.5"]}, SECTION)).loosened == ["evaluate.require[0]"]
    assert not (await validate(SECTION, SECTION)).loosened
    assert not (await validate(SECTION, {"was": "never valid"})).loosened


async def test_another_section_or_no_json_is_refused() -> None:
    with pytest.raises(Invalid, match="serve"):
        await validate(SECTION, name="serve")
    with pytest.raises(Invalid, match="not JSON"):
        await validate("{")


# -- reports


@pytest.mark.parametrize("champion", [True, False])
def test_the_page_needs_nothing_else_and_tells_the_verdict(champion: bool) -> None:
    found = judge(POLICY, evidence(champion), 1)
    page = Reports().html(judgement(champion, author="<b>eve</b>"), found, evidence(champion)).decode()
    figures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(figures) == (4 if champion else 3)
    for figure in figures:
        ElementTree.fromstring(figure.replace("xlink:href", "href"))
    assert not re.findall(r"(?:src|href)=\"(?!#)", re.sub(r"xmlns(?::\w+)?=\"[^\"]*\"", "", page))
    assert "<b>eve" not in page
    assert "<script" not in page
    assert found.gates[0].detail.replace("'", "&#39;") in page
    ids = re.findall(r"<path id=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))


def test_the_same_evidence_gives_the_same_bytes() -> None:
    found = judge(POLICY, evidence(True), 1)
    one, two = (Reports().html(judgement(), found, evidence(True)) for _ in range(2))
    assert one == two
    assert Reports().json(judgement(), found, evidence(True)) == Reports().json(judgement(), found, evidence(True))


def test_the_report_for_programs() -> None:
    verdict = judge(POLICY, evidence(True), 1)
    unknown = replace(verdict, gates=(replace(verdict.gates[0], value=float("nan")), *verdict.gates[1:]))
    told = json.loads(Reports().json(judgement(), unknown, evidence(True)))
    assert told["verdict"]["passed"] == (not verdict.reason)
    assert told["gates"][0]["value"] is None
    assert told["judgement"]["candidate"]["run_id"] == "r" * 32
    assert set(told["models"]) == {"challenger", "champion"}
    assert sum(told["models"]["challenger"]["scores"]["counts"]) == 300
    assert sum(told["bootstrap"]["counts"]) == 1000


def test_a_failed_verdict_is_seen_at_once() -> None:
    strict = parse(
        {"experiment": "e", "holdout": {"dataset": "d", "version": 1}, "metric": {"name": "auc"}, "require": ["auc.at_least 0.9999"]}
    )
    verdict = judge(strict, evidence(False), 1)
    page = Reports().html(judgement(False), verdict, evidence(False)).decode()
    assert page.index("failed") < page.index("Gates")
    assert verdict.reason in page
