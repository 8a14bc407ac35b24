"""Trainings from submission to their end: real sandbox, real tracker, real PostgreSQL, Kafka and S3."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from contracts.trainer.v1 import service_pb2 as pb
from servicekit import rpc
from servicekit.access import Caller
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, TooLarge

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADA = Caller("gateway", "ada", frozenset({"editor"}))


async def test_a_training_runs_and_its_run_is_finished_with_log_and_provenance(shared: Any) -> None:
    script = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "files": sorted(os.listdir(".")), "hash": hash("x")}))
open("written-beside-the-code", "w").write("yes")
"""
    source = await shared.upload({"train.py": script, "sub/data.txt": "1"})
    source = pb.Source(upload_id=source.upload_id, commit="abc123", dirty=True, diff="--- a\n+++ b\n")
    training = await shared.submit(
        "",
        source=source,
        command=["python", "train.py", "--lr", "0.1"],
        environment={"MODE": "fast"},
        seed=7,
        experiment="flights",
        run_name="first",
    )
    followed = asyncio.create_task(shared.log(training.training_id, follow=True))
    ended = await shared.ended(training.training_id)
    assert (ended.status, ended.attempt, ended.reason) == ("succeeded", 1, "")
    log = await followed
    told = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert told["argv"] == ["--lr", "0.1"]
    assert told["files"] == ["requirements.lock", "sub", "train.py"]
    environment = told["env"]
    token = environment.pop("HEADRACE_TOKEN")
    assert token.startswith("hrr_")
    venv = environment.pop("VIRTUAL_ENV")
    assert environment.pop("PATH").startswith(f"{venv}/bin:")
    environment.pop("LC_CTYPE", None)
    proxy = "http://127.0.0.1:3128"
    assert [environment.pop(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")] == [
        proxy
    ] * 6
    assert environment.pop("HEADRACE_PROXY") == proxy
    assert environment.pop("NO_PROXY") == environment.pop("no_proxy") == "localhost,::1"  # the gateway here is 127.0.0.1
    assert environment == {
        "HOME": "/headrace/home",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "MODE": "fast",
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": "/headrace/sdk",
        "HEADRACE_PACKAGES": "/headrace/packages",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "7",
        "HEADRACE_SEED": "7",
        "HEADRACE_URL": "http://127.0.0.1:1",
        "HEADRACE_RUN_ID": ended.run_id,
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "MLFLOW_TRACKING_TOKEN": token,
        "MLFLOW_RUN_ID": ended.run_id,
    }

    run = await shared.run(ended.run_id)
    assert (run.status, run.name, run.user) == ("FINISHED", "first", "ada")
    source_told = run.source
    assert (source_told.commit, source_told.dirty, source_told.training_id) == ("abc123", True, training.training_id)
    assert source_told.command == "python train.py --lr 0.1"
    assert source_told.diff_key.startswith("blobs/sha256/")
    assert run.tags["headrace.seed"] == "7"
    assert run.tags["headrace.python"].startswith("3.")
    assert {"headrace.cpu_count", "headrace.memory_bytes", "headrace.platform", "headrace.lock_sha256"} <= set(run.tags)
    assert await shared.artifact(ended.run_id, "source.diff") == b"--- a\n+++ b\n"
    stored = (await shared.artifact(ended.run_id, "log.txt")).decode()
    assert "succeeded, peak memory" in stored
    assert stored in log
    assert await shared.events(training.training_id) == ["job.submitted", "job.started", "job.succeeded"]


async def test_code_that_fails_fails_its_run_with_its_last_words_and_is_not_run_again(shared: Any) -> None:
    training = await shared.submit("print('before'); raise SystemExit('no such month')")
    ended = await shared.ended(training.training_id)
    assert (ended.status, ended.attempt) == ("failed", 1)
    assert ended.reason == "exit code 1\nbefore\nno such month"
    run = await shared.run(ended.run_id)
    assert (run.status, run.reason) == ("FAILED", ended.reason)
    assert await shared.events(training.training_id) == ["job.submitted", "job.started", "job.failed"]


async def test_code_that_may_fail_is_run_again_each_time_in_a_run_of_its_own(shared: Any) -> None:
    training = await shared.submit("raise SystemExit(3)", max_attempts=2)
    ended = await shared.ended(training.training_id)
    assert (ended.status, ended.attempt, ended.reason) == ("failed", 2, "exit code 3")
    assert [run.status for run in await shared.runs(training.training_id)] == ["FAILED", "FAILED"]
    assert await shared.events(training.training_id) == ["job.submitted", "job.started", "job.started", "job.failed"]


async def test_out_of_memory_fails_the_run_with_the_reason(shared: Any) -> None:
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; block = bytearray(80_000_000); time.sleep(600)"])
block = bytearray(80_000_000)
time.sleep(600)
"""
    training = await shared.submit(script, resources=pb.Resources(memory_bytes=128 * 1024**2))
    ended = await shared.ended(training.training_id)
    assert ended.status == "failed"
    assert ended.reason.startswith("out of memory: used ")
    assert ended.reason.endswith("of 128.0 MiB")
    assert (await shared.run(ended.run_id)).reason == ended.reason


async def test_a_full_disk_fails_the_run_with_the_reason(shared: Any) -> None:
    script = "with open('big', 'wb') as file:\n    for _ in range(64):\n        file.write(bytes(1 << 20))\n"
    training = await shared.submit(script, resources=pb.Resources(disk_bytes=8 * 1024**2))
    ended = await shared.ended(training.training_id)
    assert ended.status == "failed"
    assert ended.reason.startswith("disk full: no space left of 8.0 MiB")
    assert (await shared.run(ended.run_id)).reason == ended.reason


async def test_time_that_runs_out_fails_the_run_with_the_reason(shared: Any) -> None:
    training = await shared.submit("import time; time.sleep(600)", resources=pb.Resources(timeout_seconds=1))
    ended = await shared.ended(training.training_id)
    assert (ended.status, ended.reason) == ("failed", "timed out after 1 s")


async def test_cancelled_while_it_waits_it_never_runs(shared: Any) -> None:
    running = await shared.submit("import time; print('up'); time.sleep(600)")
    waiting = await shared.submit("print('never')")
    await shared.until_logged(running.training_id, "up\n")
    cancelled = await shared.cancel(waiting.training_id)
    assert (cancelled.status, cancelled.reason, cancelled.attempt) == ("cancelled", "cancelled by ada", 0)
    assert await shared.cancel(waiting.training_id) == cancelled
    assert await shared.events(waiting.training_id) == ["job.submitted", "job.cancelled"]
    await shared.cancel(running.training_id)
    assert (await shared.ended(running.training_id)).status == "cancelled"


async def test_cancelled_while_it_runs_it_is_gone_and_its_run_killed(shared: Any) -> None:
    trainer = shared.started[0]
    training = await shared.submit("import time; print('up', flush=True); time.sleep(600)")
    await shared.until_logged(training.training_id, "up\n")
    await shared.cancel(training.training_id)
    ended = await shared.ended(training.training_id)
    assert (ended.status, ended.reason) == ("cancelled", "cancelled by ada")
    run = await shared.run(ended.run_id)
    assert (run.status, run.reason) == ("KILLED", "cancelled")
    assert b"up" in await shared.artifact(ended.run_id, "log.txt")
    assert trainer.descendants() == []
    assert await shared.events(training.training_id) == ["job.submitted", "job.started", "job.cancelled"]


async def test_cancelled_while_it_starts_it_ends_as_cancelled(shared: Any) -> None:
    trainer = shared.started[0]
    training = await shared.submit("import time; time.sleep(600)")
    await trainer.until_busy()
    await shared.cancel(training.training_id)
    ended = await shared.ended(training.training_id)
    assert ended.status == "cancelled"
    assert all(run.status == "KILLED" for run in await shared.runs(training.training_id))
    assert trainer.descendants() == []


async def test_a_source_that_cannot_be_used_fails_with_the_reason(shared: Any) -> None:
    unpinned = await shared.submit("", source=await shared.upload({"requirements.lock": "numpy>=1\n", "train.py": ""}))
    ended = await shared.ended(unpinned.training_id)
    assert ended.status == "failed"
    assert "requirements.lock, line 1: a pinned package is needed" in ended.reason
    assert ended.run_id == ""
    missing = await shared.submit("", command=["nosuchprogram"])
    ended = await shared.ended(missing.training_id)
    assert ended.reason.startswith("exit code 127\ncannot start nosuchprogram")


async def test_a_request_that_is_wrong_is_told_at_once(shared: Any) -> None:
    with rpc.acting_for(ADA):
        with pytest.raises(Invalid) as caught:
            await shared.trainer.SubmitTraining(
                pb.SubmitTrainingRequest(source=pb.Source(git_url="file:///etc", git_ref="main"), environment={"PATH": "x"})
            )
        assert [violation.field for violation in caught.value.violations] == ["source.git.url", "command", "environment.PATH"]
        with pytest.raises(NotFound):
            await shared.trainer.SubmitTraining(pb.SubmitTrainingRequest(delivery="nobody"))
        with pytest.raises(TooLarge):
            await shared.trainer.StartSourceUpload(pb.StartSourceUploadRequest(sha256="0" * 64, size_bytes=10**12))
        ticket = await shared.trainer.StartSourceUpload(pb.StartSourceUploadRequest(sha256="0" * 64, size_bytes=10))
        request = pb.SubmitTrainingRequest(source=pb.Source(upload_id=ticket.upload_id), command=["python", "x.py"])
        with pytest.raises(Conflict, match="nothing was uploaded"):
            await shared.trainer.SubmitTraining(request)
        with pytest.raises(NotFound):
            await shared.trainer.GetTraining(pb.GetTrainingRequest(training_id="nobody"))
    with rpc.acting_for(Caller("gateway", "vic", frozenset({"viewer"}))), pytest.raises(Forbidden):
        await shared.trainer.SubmitTraining(request)
    with rpc.acting_for(Caller("gateway", "eve", frozenset({"editor"}))), pytest.raises(NotFound):  # somebody else's upload
        await shared.trainer.SubmitTraining(request)


async def test_the_same_request_is_one_training_and_the_same_source_is_sent_once(shared: Any) -> None:
    source = await shared.upload({"train.py": "print(1)"})
    request = pb.SubmitTrainingRequest(source=source, command=["python", "train.py"], request_id="r1")
    with rpc.acting_for(ADA):
        answers = await asyncio.gather(*(shared.trainer.SubmitTraining(request) for _ in range(5)))
    assert len({answer.training.training_id for answer in answers}) == 1
    assert (await shared.upload({"train.py": "print(1)"})).upload_id == source.upload_id
    assert (await shared.ended(answers[0].training.training_id)).status == "succeeded"
    made = await shared.rows("SELECT count(*) AS n FROM trainer.training WHERE request_id = 'r1'")
    jobs = await shared.rows("SELECT count(*) AS n FROM trainer.job WHERE key NOT IN (SELECT training_id FROM trainer.training)")
    assert (made[0].n, jobs[0].n) == (1, 0)
    with rpc.acting_for(ADA):
        page = await shared.trainer.ListTrainings(pb.ListTrainingsRequest(page_size=1))
        assert [one.training_id for one in page.trainings] == [answers[0].training.training_id]
        older = await shared.trainer.ListTrainings(pb.ListTrainingsRequest(page_size=1, page_token=page.next_page_token))
        assert all(one.created_at.ToDatetime() < page.trainings[0].created_at.ToDatetime() for one in older.trainings)
