"""What a run may do and log, as plain Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracker.domain import run as rules
from tracker.domain.errors import NotAllowed, Refused, Rejected
from tracker.domain.run import EVENT_BUDGET, Facts, Metric, Run, RunFailed, RunFinished, RunSource, Status

RUN = Run(
    run_id="a" * 32,
    experiment_id=0,
    name="first",
    user="ada",
    status=Status.RUNNING,
    lifecycle_stage="active",
    started_ms=1_000,
    finished_ms=0,
    source=RunSource(),
    reason="",
    parent_run_id="",
    lease_seconds=30,
    fencing_token=7,
    event_sequence=1,
)


def test_an_end_counts_one_event_and_keeps_its_reason() -> None:
    ended = RUN.finish(Status.FAILED, 2_000, "lease expired")
    assert (ended.status, ended.finished_ms, ended.reason, ended.event_sequence) == (Status.FAILED, 2_000, "lease expired", 2)
    assert ended.ended
    assert not RUN.ended


def test_repeating_an_end_changes_nothing() -> None:
    ended = RUN.finish(Status.FINISHED, 2_000, "")
    assert ended.finish(Status.FINISHED, 9_000, "again") is ended


def test_another_end_is_refused_and_says_which_it_had() -> None:
    ended = RUN.finish(Status.FAILED, 2_000, "out of memory")
    with pytest.raises(Refused, match="FAILED, out of memory"):
        ended.finish(Status.FINISHED, 3_000, "")


@pytest.mark.parametrize("status", [Status.RUNNING, Status.SCHEDULED])
def test_a_run_does_not_end_as_running(status: Status) -> None:
    with pytest.raises(Rejected):
        RUN.finish(status, 2_000, "")


def test_a_token_is_good_for_its_own_run_and_attempt() -> None:
    RUN.check_owner(None, None)
    RUN.check_owner(RUN.run_id, 7)
    RUN.check_owner(RUN.run_id, 8)
    with pytest.raises(NotAllowed):
        RUN.check_owner("b" * 32, 7)
    with pytest.raises(Refused, match="newer attempt"):
        RUN.check_owner(RUN.run_id, 6)


def test_an_ended_or_deleted_run_is_not_open() -> None:
    RUN.check_open()
    with pytest.raises(Refused, match="has ended"):
        RUN.finish(Status.KILLED, 2_000, "").check_open()
    with pytest.raises(Refused, match="deleted"):
        dataclasses.replace(RUN, lifecycle_stage="deleted").check_open()


def test_a_finished_run_tells_what_it_logged_and_a_failed_one_does_not() -> None:
    facts = Facts(params={"lr": "0.1"}, metrics={"auc": 0.7}, tags={"headrace.candidate": "true"})
    finished = rules.ending(RUN.finish(Status.FINISHED, 2_000, ""), "flights", facts)
    assert isinstance(finished, RunFinished)
    assert (finished.facts, finished.truncated) == (facts, False)
    assert isinstance(rules.ending(RUN.finish(Status.FAILED, 2_000, ""), "flights", facts), RunFailed)


def test_what_is_too_large_for_an_event_is_left_out_but_never_what_headrace_reads() -> None:
    facts = Facts(
        params={f"p{n}": "x" * 6_000 for n in range(200)},
        metrics={f"m{n}": float(n) for n in range(100)},
        tags={"headrace.candidate": "y" * 8_000, "note": "z"},
    )
    event = rules.ending(RUN.finish(Status.FINISHED, 2_000, ""), "flights", facts)
    assert isinstance(event, RunFinished)
    assert event.truncated
    assert event.facts.metrics == facts.metrics
    assert event.facts.tags == facts.tags
    assert 0 < len(event.facts.params) < 200


@settings(deadline=None)  # a machine may be busy
@given(
    st.dictionaries(st.text(max_size=50), st.text(max_size=3_000), max_size=300),
    st.dictionaries(st.text(max_size=250), st.floats(), max_size=100),
)
def test_an_event_always_fits_and_says_when_something_is_missing(texts: dict[str, str], metrics: dict[str, float]) -> None:
    event = rules.ending(RUN.finish(Status.FINISHED, 2_000, ""), "flights", Facts(params=texts, metrics=metrics, tags=texts))
    assert isinstance(event, RunFinished)
    kept = [*event.facts.params.items(), *event.facts.tags.items()]
    size = sum(len(key.encode()) + len(value.encode()) for key, value in kept) + sum(len(key.encode()) for key in event.facts.metrics)
    assert size <= EVENT_BUDGET
    whole = len(texts) * 2 + len(metrics)
    assert event.truncated == (len(kept) + len(event.facts.metrics) < whole)


def test_batches_have_the_limits_of_mlflow() -> None:
    metrics = [Metric("loss", float(n), 1, n) for n in range(1_000)]
    texts = {f"k{n}": "v" for n in range(100)}
    rules.check_batch(metrics, texts, texts)
    with pytest.raises(Rejected) as caught:
        rules.check_batch([*metrics, metrics[0]], {**texts, "one": "more"}, {**texts, "one": "more"})
    assert [problem.field for problem in caught.value.problems] == ["metrics", "params", "tags"]


def test_not_a_number_is_a_metric() -> None:
    rules.check_batch([Metric("loss", math.nan, 1, 0), Metric("loss", math.inf, 1, 1)], {}, {})


@pytest.mark.parametrize("key", ["", "a" * 251, "../x", "/x", "a//b", "a/./b", "tab\t", "nul\x00", "line\n"])
def test_a_key_that_reads_like_a_path_or_does_not_print_is_named(key: str) -> None:
    with pytest.raises(Rejected) as caught:
        rules.check_batch([Metric("ok", 1.0, 1, 0), Metric(key, 1.0, 1, 0)], {}, {})
    assert [problem.field for problem in caught.value.problems] == ["metrics[1].key"]


def test_every_problem_of_a_batch_is_told_at_once() -> None:
    with pytest.raises(Rejected) as caught:
        rules.check_batch([Metric("m", 1.0, -1, 2**63)], {"p": "x" * 6_001}, {"t": "nul\x00"})
    assert [problem.field for problem in caught.value.problems] == [
        "metrics[0].timestamp_ms",
        "metrics[0].step",
        "params['p']",
        "tags['t']",
    ]


def test_what_is_wrong_with_a_new_run_is_told_at_once() -> None:
    rules.check_start("", 0, 0, 0, {}, {})
    with pytest.raises(Rejected) as caught:
        rules.check_start("n" * 501, -1, 86_401, -1, {f"t{n}": "" for n in range(101)}, {"user": "u" * 6_001})
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["name", "started_ms", "lease_seconds", "fencing_token", "tags", "user"]
