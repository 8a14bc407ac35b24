"""Runs in a real PostgreSQL: batches, limits, leases, fencing, request ids, and the events written with them."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Any

import pytest
from contracts.tracker.v1 import events_pb2
from servicekit import runtoken
from servicekit.access import Caller
from servicekit.clock import SystemClock
from servicekit.errors import AlreadyExists, Conflict, Forbidden, Invalid, NotFound, Unauthenticated
from tracker.domain.artifact import Dataset
from tracker.domain.model import BlobRef, DeliverableModel, Signature, TensorSpec
from tracker.domain.run import DatasetRef, Metric, RunSource, Status
from tracker.handlers import LEASE_EXPIRED, NewRun, end_run

SECRET = "a secret of the tests"
VIEWER = Caller("gateway", "vic", frozenset({"viewer"}))


def token_caller(token: str) -> Caller:
    """What the gateway makes of a run token."""
    told = runtoken.verify(SECRET, token, SystemClock().now())
    return Caller("gateway", f"run:{told.run_id}", frozenset(), told.run_id, told.fencing_token)


async def test_there_is_a_default_experiment_and_names_are_unique(stored: Any, editor: Caller) -> None:
    experiments = stored.experiments
    assert (await experiments.get(editor, 0, "")).name == "Default"
    made = await experiments.create(editor, "flights", "r1")
    assert made.id > 0
    assert await experiments.create(editor, "flights", "r1") == made
    with pytest.raises(AlreadyExists):
        await experiments.create(editor, "flights", "r2")
    with pytest.raises(AlreadyExists):  # somebody else's request of the same id is not this one
        await experiments.create(Caller("gateway", "bob", frozenset({"editor"})), "flights", "r1")
    with pytest.raises(Forbidden):
        await experiments.create(VIEWER, "mine", "")
    with pytest.raises(NotFound):
        await experiments.get(editor, 99, "")
    assert await experiments.get(editor, 0, "flights") == made
    assert [one.name for one in await experiments.page(VIEWER, -1, 0)] == ["Default", "flights"]


async def test_a_request_id_answers_the_run_made_before_also_when_asked_twice_at_once(stored: Any, trainer: Caller) -> None:
    command = NewRun(0, name="once", request_id="job:1", tags={"a": "b"})
    answers = await asyncio.gather(*(stored.tracker.create_run(trainer, command) for _ in range(8)))
    assert len({view.run.run_id for view, _ in answers}) == 1
    run_id = answers[0][0].run.run_id
    assert [(event.type, event.sequence) for event in await stored.events(run_id)] == [("run.started", 1)]
    other, _ = await stored.tracker.create_run(Caller("gateway", "eve", frozenset({"editor"})), NewRun(0, request_id="job:1"))
    assert other.run.run_id != run_id


async def test_a_newer_attempt_takes_the_run_over_and_the_older_one_is_refused(stored: Any, trainer: Caller) -> None:
    tracker = stored.tracker
    first = NewRun(0, request_id="job:1", lease_seconds=60, fencing_token=5)
    view, old_token = await tracker.create_run(trainer, first)
    run_id = view.run.run_id
    old = token_caller(old_token)
    await tracker.log_batch(old, run_id, [Metric("loss", 1.0, 1, 0)], {}, {})
    view, new_token = await tracker.create_run(trainer, NewRun(0, request_id="job:1", lease_seconds=60, fencing_token=6))
    assert (view.run.run_id, view.run.fencing_token) == (run_id, 6)
    with pytest.raises(Conflict, match="newer attempt"):
        await tracker.log_batch(old, run_id, [Metric("loss", 2.0, 2, 1)], {}, {})
    with pytest.raises(Conflict, match="newer attempt"):
        await tracker.create_run(trainer, first)
    with pytest.raises(Conflict, match="newer attempt"):
        await tracker.finish_run(trainer, run_id, "FINISHED", 0, "", fencing_token=5)
    with pytest.raises(Conflict, match="newer attempt"):
        await tracker.renew_lease(trainer, run_id, fencing_token=5)
    await tracker.log_batch(token_caller(new_token), run_id, [Metric("loss", 3.0, 3, 2)], {}, {})
    assert [point.value for point in await tracker.metric_history(trainer, run_id, "loss", None, 0)] == [1.0, 3.0]


async def test_a_run_token_writes_to_its_own_run_and_nothing_else(stored: Any, editor: Caller) -> None:
    tracker = stored.tracker
    view, token = await tracker.create_run(editor, NewRun(0))
    other, _ = await tracker.create_run(editor, NewRun(0))
    caller = token_caller(token)
    await tracker.log_batch(caller, view.run.run_id, [], {"lr": "0.1"}, {})
    assert (await tracker.get_run(caller, view.run.run_id)).facts.params == {"lr": "0.1"}
    with pytest.raises(Forbidden):
        await tracker.log_batch(caller, other.run.run_id, [], {"lr": "0.1"}, {})
    with pytest.raises(Forbidden):
        await tracker.get_run(caller, other.run.run_id)
    with pytest.raises(Forbidden):
        await tracker.create_run(caller, NewRun(0))
    with pytest.raises(Forbidden):
        await tracker.log_batch(VIEWER, view.run.run_id, [], {"lr": "0.1"}, {})
    with pytest.raises(Unauthenticated):
        runtoken.verify("another secret", token, SystemClock().now())
    with pytest.raises(Unauthenticated):
        runtoken.verify(SECRET, token, SystemClock().now() + timedelta(hours=2))
    await tracker.finish_run(editor, view.run.run_id, "FINISHED", 0, "")
    with pytest.raises(Conflict, match="has ended"):
        await tracker.log_batch(caller, view.run.run_id, [], {}, {"late": "true"})
    await tracker.log_batch(editor, view.run.run_id, [], {}, {"note": "added by hand"})


async def test_a_batch_sent_twice_adds_nothing_and_the_last_value_is_the_latest_step(stored: Any, editor: Caller) -> None:
    tracker = stored.tracker
    view, _ = await tracker.create_run(editor, NewRun(0))
    run_id = view.run.run_id
    points = [Metric("loss", 1.0 / (n + 1), 1_000 + n, n) for n in range(1_000)]
    for _ in range(2):
        await tracker.log_batch(editor, run_id, points, {"lr": "0.1"}, {"stage": "train"})
    await tracker.log_batch(
        editor, run_id, [Metric("loss", 9.0, 5, 3), Metric("odd", math.nan, 1, 0), Metric("odd", math.nan, 1, 0)], {}, {}
    )
    facts = (await tracker.get_run(editor, run_id)).facts
    assert facts.metrics["loss"] == pytest.approx(0.001)
    assert math.isnan(facts.metrics["odd"])
    history = await tracker.metric_history(editor, run_id, "loss", None, 1_000)
    rest = await tracker.metric_history(editor, run_id, "loss", history[-1], 1_000)
    assert len(history) + len(rest) == 1_001
    assert [point.step for point in history[:6]] == [0, 1, 2, 3, 3, 4]
    assert len(await tracker.metric_history(editor, run_id, "odd", None, 0)) == 1


async def test_batches_that_meet_lose_nothing(stored: Any, editor: Caller) -> None:
    tracker = stored.tracker
    view, _ = await tracker.create_run(editor, NewRun(0))
    batches = [[Metric(f"m{key}", float(step), 1, step) for key in range(20)] for step in range(30)]
    keys = [list(reversed(batch)) if n % 2 else batch for n, batch in enumerate(batches)]
    await asyncio.gather(*(tracker.log_batch(editor, view.run.run_id, batch, {}, {f"t{n}": "x"}) for n, batch in enumerate(keys)))
    facts = (await tracker.get_run(editor, view.run.run_id)).facts
    assert facts.metrics == {f"m{key}": 29.0 for key in range(20)}
    assert len(facts.tags) == 30
    count = await stored.rows("SELECT count(*) AS n FROM tracker.metric_point")
    assert count[0].n == 600


async def test_a_param_never_changes_and_the_batch_that_tries_leaves_nothing(stored: Any, editor: Caller) -> None:
    tracker = stored.tracker
    view, _ = await tracker.create_run(editor, NewRun(0))
    await tracker.log_batch(editor, view.run.run_id, [], {"lr": "0.1", "depth": "3"}, {})
    with pytest.raises(Conflict) as caught:
        await tracker.log_batch(editor, view.run.run_id, [Metric("loss", 1.0, 1, 0)], {"lr": "0.2", "depth": "3", "new": "x"}, {"t": "u"})
    assert [violation.field for violation in caught.value.violations] == ["params['lr']"]
    facts = (await tracker.get_run(editor, view.run.run_id)).facts
    assert (facts.params, facts.metrics, facts.tags) == ({"lr": "0.1", "depth": "3"}, {}, {})


async def test_a_batch_over_the_limits_is_told_what_is_too_much(stored: Any, editor: Caller) -> None:
    view, _ = await stored.tracker.create_run(editor, NewRun(0))
    metrics = [Metric("loss", 1.0, 1, step) for step in range(1_001)]
    with pytest.raises(Invalid) as caught:
        await stored.tracker.log_batch(editor, view.run.run_id, metrics, {f"p{n}": "" for n in range(101)}, {})
    assert [violation.field for violation in caught.value.violations] == ["metrics", "params"]
    with pytest.raises(NotFound):
        await stored.tracker.log_batch(editor, "0" * 32, [], {}, {"a": "b"})


async def test_finishing_writes_its_event_in_the_same_transaction_and_only_once(stored: Any, trainer: Caller) -> None:
    tracker = stored.tracker
    source = RunSource("abc", True, "blobs/x", "python train.py", "training-1")
    view, _ = await tracker.create_run(trainer, NewRun(0, name="n", user="ada", source=source))
    run_id = view.run.run_id
    blob, samples = BlobRef("1" * 64, 10, "blobs/sha256/11/1"), BlobRef("2" * 64, 5, "blobs/sha256/22/2")
    signature = Signature((TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),))
    async with stored.store.transaction() as work:
        for one in (blob, samples, blob):
            await work.artifacts.add_blob(one)
        for name in ("b", "a", "b"):
            await work.runs.log_model(run_id, DeliverableModel(name, "onnx", blob, signature, samples))
        await work.datasets.add(Dataset("flights", 0, BlobRef("3" * 64, 7, "datasets/flights/1"), "", 0))
    await tracker.log_inputs(trainer, run_id, [DatasetRef("flights", 1, "")])
    await tracker.log_inputs(trainer, run_id, [DatasetRef("flights", 1, "3" * 64)])
    await tracker.log_batch(trainer, run_id, [Metric("auc", 0.7, 1, 0)], {"lr": "0.1"}, {"headrace.candidate": "true"})
    ended = await asyncio.gather(*(tracker.finish_run(trainer, run_id, "FINISHED", 5_000, "") for _ in range(5)))
    assert {one.run.status for one in ended} == {Status.FINISHED}

    started, finished = await stored.events(run_id)
    assert [(event.type, event.sequence) for event in (started, finished)] == [("run.started", 1), ("run.finished", 2)]
    message = events_pb2.RunFinished.FromString(finished.payload)
    assert [model.name for model in message.models] == ["b", "a"]
    assert message.models[0].blob.key == blob.key
    assert message.models[0].signature.inputs[0].shape == [-1, 3]
    assert message.models[0].samples.sha256 == samples.sha256
    assert dict(message.metrics) == {"auc": 0.7}
    assert [(ref.name, ref.version, ref.sha256) for ref in message.inputs] == [("flights", 1, "3" * 64)]
    assert (message.source.commit, message.source.dirty, message.source.training_id) == ("abc", True, "training-1")
    assert (message.user, message.experiment_name, message.finished_at.ToMilliseconds()) == ("ada", "Default", 5_000)
    with pytest.raises(Conflict):
        await tracker.finish_run(trainer, run_id, "FAILED", 0, "late")
    with pytest.raises(Conflict, match="has ended"):
        await tracker.log_inputs(trainer, run_id, [DatasetRef("flights", 1, "")])


async def test_an_end_that_is_undone_leaves_no_event(stored: Any, editor: Caller) -> None:
    view, _ = await stored.tracker.create_run(editor, NewRun(0))

    async def end_and_break() -> None:
        async with stored.store.transaction() as work:
            run = await work.runs.lock(view.run.run_id)
            await end_run(work, run, Status.FINISHED, 1, "")
            raise RuntimeError("undone")

    with pytest.raises(RuntimeError, match="undone"):
        await end_and_break()
    assert [event.type for event in await stored.events(view.run.run_id)] == ["run.started"]
    assert (await stored.tracker.get_run(editor, view.run.run_id)).run.status is Status.RUNNING


async def test_a_run_whose_process_died_is_found_by_its_lease(stored: Any, editor: Caller, trainer: Caller) -> None:
    tracker = stored.tracker
    dead, token = await tracker.create_run(trainer, NewRun(0, lease_seconds=60, fencing_token=1))
    alive, _ = await tracker.create_run(trainer, NewRun(0, lease_seconds=60))
    by_hand, _ = await tracker.create_run(editor, NewRun(0))
    assert await tracker.fail_expired() == 0
    # The lease is the database's to judge: only it is told that time has passed.
    past = "UPDATE tracker.run SET lease_expires_at = now() - interval '1 second' WHERE run_id = ANY(:runs)"
    await stored.rows(past + " RETURNING 1", runs=[dead.run.run_id, alive.run.run_id])
    await tracker.renew_lease(trainer, alive.run.run_id)
    counts = await asyncio.gather(*(tracker.fail_expired() for _ in range(4)))
    assert sum(counts) == 1
    ended = (await tracker.get_run(editor, dead.run.run_id)).run
    assert (ended.status, ended.reason) == (Status.FAILED, LEASE_EXPIRED)
    assert ended.finished_ms > 0
    kinds = [(event.type, event.sequence) for event in await stored.events(dead.run.run_id)]
    assert kinds == [("run.started", 1), ("run.failed", 2)]
    failed = events_pb2.RunFailed.FromString((await stored.events(dead.run.run_id))[1].payload)
    assert (failed.status, failed.reason) == ("FAILED", LEASE_EXPIRED)
    with pytest.raises(Conflict, match="lease expired"):
        await tracker.log_batch(token_caller(token), dead.run.run_id, [], {}, {"zombie": "true"})
    with pytest.raises(Conflict, match="lease expired"):
        await tracker.renew_lease(trainer, dead.run.run_id)
    for view in (alive, by_hand):
        assert (await tracker.get_run(editor, view.run.run_id)).run.status is Status.RUNNING
    with pytest.raises(Conflict, match="no lease"):
        await tracker.renew_lease(editor, by_hand.run.run_id)


async def test_only_the_trainer_ends_the_run_of_a_training(stored: Any, editor: Caller, trainer: Caller) -> None:
    view, token = await stored.tracker.create_run(trainer, NewRun(0, source=RunSource(training_id="t")))
    for caller in (editor, token_caller(token)):
        with pytest.raises(Forbidden, match="training t"):
            await stored.tracker.finish_run(caller, view.run.run_id, "FINISHED", 0, "")
    with pytest.raises(Forbidden, match="trainer only"):
        await stored.tracker.create_run(editor, NewRun(0, source=RunSource(training_id="t")))
    ended = await stored.tracker.finish_run(trainer, view.run.run_id, "FAILED", 0, "exit code 1")
    assert (ended.run.status, ended.run.reason) == (Status.FAILED, "exit code 1")


async def test_an_end_user_is_who_the_gateway_says(stored: Any, editor: Caller, trainer: Caller) -> None:
    view, _ = await stored.tracker.create_run(editor, NewRun(0, user="somebody else"))
    assert view.run.user == "ada"
    view, _ = await stored.tracker.create_run(trainer, NewRun(0, user="bob"))
    assert view.run.user == "bob"


async def test_runs_are_listed_newest_first_page_by_page(stored: Any, editor: Caller) -> None:
    tracker = stored.tracker
    made = [(await tracker.create_run(editor, NewRun(0, name=f"r{n}", started_ms=1_000 + n // 2)))[0].run for n in range(7)]
    await tracker.finish_run(editor, made[3].run_id, "FINISHED", 0, "")
    seen: list[str] = []
    before = None
    while page := await tracker.list_runs(editor, 0, "", before, 3):
        seen += [view.run.run_id for view in page]
        before = (page[-1].run.started_ms, page[-1].run.run_id)
    assert seen == [run.run_id for run in sorted(made, key=lambda run: (run.started_ms, run.run_id), reverse=True)]
    assert [view.run.name for view in await tracker.list_runs(editor, 0, "FINISHED", None, 0)] == ["r3"]
    with pytest.raises(Invalid):
        await tracker.list_runs(editor, 0, "DONE", None, 0)


async def test_the_same_content_is_the_same_version_of_a_data_set(stored: Any) -> None:
    async def add(digit: str) -> int:
        async with stored.store.transaction() as work:
            return int((await work.datasets.add(Dataset("flights", 0, BlobRef(digit * 64, 7, f"datasets/{digit}"), "", 0))).version)

    assert sorted(await asyncio.gather(*(add(digit) for digit in "aabbcc"))) == [1, 1, 2, 2, 3, 3]
    assert await add("d") == 4
    newest = await stored.tracker.get_dataset(VIEWER, "flights", 0)
    assert (newest.version, newest.blob.sha256) == (4, "d" * 64)
    with pytest.raises(NotFound):
        await stored.tracker.get_dataset(VIEWER, "flights", 5)
    assert [one.version for one in await stored.tracker.list_datasets(VIEWER)] == [4, 3, 2, 1]
