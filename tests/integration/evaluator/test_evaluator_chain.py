"""From run.finished to eval.passed, eval.failed or eval.skipped: real database, real object store, real sandbox."""

from __future__ import annotations

import json
import os
from typing import Any

import asyncpg
import httpx
import pytest
from contracts.evaluator.v1 import service_pb2
from contracts.registry.v1 import events_pb2 as registry_pb
from contracts.registry.v1 import service_pb2 as registry_service_pb
from eventing import topics
from servicekit.errors import Forbidden, NotFound

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


async def rows(dsn: str, query: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch(query, *values))
    finally:
        await connection.close()


async def test_the_first_good_model_passes_and_everything_about_it_is_told(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(2.0))
    run_id = await evaluator.finish_run(model, traceparent=TRACEPARENT)
    told = await evaluator.outcome_of(run_id)
    assert (told.type, told.key, told.sequence) == ("eval.passed", "flight-delays", 1)
    assert told.traceparent.split("-")[1] == TRACE
    judgement = told.message.judgement
    assert (judgement.journey.delivery, judgement.journey.delivery_revision, judgement.journey.run_id) == ("delays", 1, run_id)
    assert judgement.candidate == model
    assert (judgement.champion_version, judgement.champion_sha256) == (0, "")
    assert judgement.holdout == evaluator.holdout
    assert [gate.name for gate in judgement.gates] == ["auc.at_least", "calibration", "parity", "latency_p99_ms"]
    assert all(gate.passed for gate in judgement.gates)
    assert (judgement.author, judgement.source.commit, judgement.training_data[0].name) == ("ada", "c0ffee", "2013")
    for blob in (judgement.report_json, judgement.report_html):
        assert len(await evaluator.objects.read(blob.key, sha256=blob.sha256, max_bytes=10**6)) == blob.size_bytes


async def test_a_better_one_passes_against_the_champion_and_a_worse_one_fails(evaluator: Any) -> None:
    champion = await evaluator.logged(evaluator.tiny.linear(0.05), 0.05)
    await evaluator.complete_deploy(4, champion)
    better = await evaluator.logged(evaluator.tiny.linear(2.0))
    told = await evaluator.outcome_of(await evaluator.finish_run(better))
    assert told.type == "eval.passed"
    judgement = told.message.judgement
    assert (judgement.champion_version, judgement.champion_sha256) == (4, champion.blob.sha256)
    assert judgement.gates[0].name == "auc"
    comparison = judgement.comparison
    assert comparison.difference_low <= comparison.difference <= comparison.difference_high
    assert (comparison.rows, comparison.resamples) == (500, 1000)

    await evaluator.complete_deploy(5, better)
    worse = await evaluator.logged(evaluator.tiny.linear(-1.0), -1.0)
    told = await evaluator.outcome_of(await evaluator.finish_run(worse))
    assert (told.type, told.sequence) == ("eval.failed", 2)
    assert told.message.judgement.champion_version == 5
    failed = {gate.name for gate in told.message.judgement.gates if not gate.passed}
    assert {"auc", "auc.at_least"} <= failed
    assert "against the champion's" in told.message.reason
    assert told.message.judgement.report_html.key


async def test_duplicates_of_an_event_make_one_evaluation(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(2.1), 2.1)
    run_id = await evaluator.finish_run(model, again=5)
    await evaluator.outcome_of(run_id)
    # Another run behind them in the same partition would not do: what counts is that the copies have been read.
    other = await evaluator.finish_run(model)
    await evaluator.outcome_of(other)
    assert [told.message.judgement.journey.run_id for told in await evaluator.told()] == [run_id, other]
    (count,) = await rows(evaluator.dsn, "SELECT count(*) FROM evaluator.job")
    assert count["count"] == 2


async def test_a_run_that_is_no_candidate_is_skipped_with_the_reason(evaluator: Any) -> None:
    models = [await evaluator.logged(evaluator.tiny.linear(slope), slope) for slope in (1.0, 2.0)]
    for model, name in zip(models, ("a", "b"), strict=True):
        model.name = name
    told = await evaluator.outcome_of(await evaluator.finish_run(*models))
    assert (told.type, told.key) == ("eval.skipped", "flight-delays")
    assert "2 deliverable models (a, b)" in told.message.reason
    named = await evaluator.outcome_of(await evaluator.finish_run(*models, tags={"headrace.candidate": "b"}))
    assert (named.type, named.message.judgement.candidate.name) == ("eval.passed", "b")


async def test_of_an_experiment_that_nobody_claims_nothing_is_told(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(2.0))
    await evaluator.finish_run(model, experiment_name="private")
    await evaluator.outcome_of(await evaluator.finish_run(model))
    assert len(await evaluator.told()) == 1


# -- bad input


async def test_a_missing_model_file(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(0.123456789), 0.123456789)
    await evaluator.objects.delete(model.blob.key)
    told = await evaluator.outcome_of(await evaluator.finish_run(model))
    assert told.type == "eval.failed"
    assert told.message.reason == f"the candidate's model is missing in the artifact store: {model.blob.key}"


async def test_a_model_file_with_other_bytes(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(0.987654321), 0.987654321)
    await evaluator.objects.put(model.blob.key, evaluator.tiny.linear(5.0))
    told = await evaluator.outcome_of(await evaluator.finish_run(model))
    assert told.type == "eval.failed"
    assert "the candidate's model is not what it was" in told.message.reason
    assert model.blob.sha256 in told.message.reason
    await evaluator.objects.delete(model.blob.key)


async def test_a_champion_file_that_is_gone(evaluator: Any) -> None:
    champion = await evaluator.logged(evaluator.tiny.linear(0.1357911), 0.1357911)
    await evaluator.objects.delete(champion.blob.key)
    await evaluator.complete_deploy(1, champion)
    told = await evaluator.outcome_of(await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0))))
    assert "the champion's model is missing" in told.message.reason


async def test_a_model_that_fails_on_rows_of_the_holdout(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(2.0, breaks_above=2.0))
    told = await evaluator.outcome_of(await evaluator.finish_run(model))
    assert told.type == "eval.failed"
    assert "the model failed on rows" in told.message.reason


async def test_a_model_that_says_other_things_than_its_training_code_did(evaluator: Any) -> None:
    model = await evaluator.logged(evaluator.tiny.linear(2.0), slope=3.0)
    told = await evaluator.outcome_of(await evaluator.finish_run(model))
    assert [gate.name for gate in told.message.judgement.gates if not gate.passed] == ["parity"]


async def test_a_holdout_that_was_never_pushed(evaluator: Any) -> None:
    evaluator.datasets.known.clear()
    told = await evaluator.outcome_of(await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0))))
    assert told.message.reason == "the holdout april version 3 does not exist"


async def test_a_process_that_dies_is_tried_again_and_then_the_evaluation_fails_with_the_reason(start: Any) -> None:
    evaluator = await start(worker_timeout_s=1.5)
    await evaluator.apply()
    run_id = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(1.0, spins=evaluator.tiny.ENDLESS)))
    told = await evaluator.outcome_of(run_id)
    assert told.type == "eval.failed"
    assert "could not be evaluated" in told.message.reason
    assert "longer than 1.5 s" in told.message.reason
    (job,) = await rows(evaluator.dsn, "SELECT state, attempt, max_attempts FROM evaluator.job")
    assert (job["state"], job["attempt"]) == ("failed", 3)
    # The next candidate is not held up by it.
    good = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0)))
    assert (await evaluator.outcome_of(good)).type == "eval.passed"


# -- a new champion


async def test_a_candidate_is_judged_again_when_the_champion_has_changed(evaluator: Any) -> None:
    run_id = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0)))
    first = (await evaluator.outcome_of(run_id)).message.judgement
    request = registry_pb.ModelReevaluationRequested(
        model_id="m", journey=first.journey, evaluation_id=first.evaluation_id, champion_version=7, reason="v7 is champion"
    )
    await evaluator.publish(topics.MODELS, "model.reevaluation_requested", "m", request, again=2)
    # The registry may know of the new champion first.
    await evaluator.complete_deploy(7, await evaluator.logged(evaluator.tiny.linear(0.05), 0.05))
    again = (await evaluator.outcome_of(run_id, 2)).message.judgement
    assert again.journey == first.journey
    assert again.evaluation_id != first.evaluation_id
    assert again.champion_version == 7
    with evaluator.asking():
        listed = (await evaluator.stub.ListEvaluations(service_pb2.ListEvaluationsRequest(run_id=run_id))).evaluations
    assert [(one.evaluation_id, one.status) for one in listed] == [(again.evaluation_id, "passed"), (first.evaluation_id, "superseded")]


# -- asked for


async def test_what_the_gateway_asks_for(evaluator: Any) -> None:
    run_id = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0)))
    judgement = (await evaluator.outcome_of(run_id)).message.judgement
    with evaluator.asking():
        one = (await evaluator.stub.GetEvaluation(service_pb2.GetEvaluationRequest(evaluation_id=judgement.evaluation_id))).evaluation
        assert (one.status, one.judgement) == ("passed", judgement)
        assert one.finished_at.ToNanoseconds() >= one.created_at.ToNanoseconds()
        report = await evaluator.stub.GetReport(service_pb2.GetReportRequest(evaluation_id=judgement.evaluation_id, format="html"))
        async with httpx.AsyncClient(trust_env=False) as client:
            page = (await client.get(report.url)).text
        assert "<svg" in page
        assert judgement.evaluation_id in page
        told = json.loads(await evaluator.objects.read(judgement.report_json.key, sha256=judgement.report_json.sha256, max_bytes=10**6))
        assert told["comparison"]["challenger"] == pytest.approx(judgement.comparison.challenger)
        listed = await evaluator.stub.ListEvaluations(service_pb2.ListEvaluationsRequest(delivery="delays"))
        assert [found.evaluation_id for found in listed.evaluations] == [judgement.evaluation_id]
        assert not (await evaluator.stub.ListEvaluations(service_pb2.ListEvaluationsRequest(delivery="other"))).evaluations
        with pytest.raises(NotFound):
            await evaluator.stub.GetEvaluation(service_pb2.GetEvaluationRequest(evaluation_id="none"))


async def test_who_may_ask(evaluator: Any) -> None:
    with evaluator.asking("inference"), pytest.raises(Forbidden):
        await evaluator.stub.ListEvaluations(service_pb2.ListEvaluationsRequest())
    request = registry_service_pb.ValidateSectionRequest(section="evaluate", section_json="{}")
    assert (await evaluator.sections.ValidateSection(request)).violations


# -- over Kafka


async def test_the_whole_way_over_kafka(start: Any, topic_prefix: str) -> None:
    evaluator = await start(topic_prefix)
    await evaluator.apply()
    await evaluator.complete_deploy(1, await evaluator.logged(evaluator.tiny.linear(0.05), 0.05))
    good = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0)))
    bad = await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(-2.0), -2.0))
    skipped = await evaluator.finish_run()
    assert (await evaluator.outcome_of(good)).type == "eval.passed"
    assert (await evaluator.outcome_of(bad)).type == "eval.failed"
    assert (await evaluator.outcome_of(skipped)).type == "eval.skipped"
    assert sorted(told.sequence for told in await evaluator.told()) == [1, 2, 3]


async def test_nothing_is_left_behind(evaluator: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    await evaluator.outcome_of(await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0))))
    await evaluator.outcome_of(await evaluator.finish_run(await evaluator.logged(evaluator.tiny.linear(2.0, breaks_above=1.0))))
    assert os.listdir(elsewhere) == []
    (mine,) = [path for path in (evaluator.settings.state_dir / "scratch").iterdir() if path.is_dir()]
    assert os.listdir(mine) == []
