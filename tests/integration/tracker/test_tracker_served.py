"""The whole tracker over gRPC with real PostgreSQL, Kafka and S3: uploads, models, data sets, access, and events that arrive."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from artifacts import Part
from artifacts.s3 import S3Store
from contracts.tracker.v1 import events_pb2, model_pb2
from contracts.tracker.v1 import service_pb2 as pb
from eventing.envelope import decode_headers
from eventing.kafka import KafkaBroker
from onnx import TensorProto, helper, numpy_helper
from servicekit import rpc, runtoken
from servicekit.access import Caller
from servicekit.clock import SystemClock
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound, Unauthenticated
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

SECRET = "a secret of the tests"
ADA = Caller("gateway", "ada", frozenset({"editor"}))
SIGNATURE = model_pb2.ModelSignature(
    inputs=[model_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1, 2])],
    outputs=[model_pb2.TensorSpec(name="y", datatype="FP32", shape=[-1])],
)
ONE_FILE = b"\x08\x08\x12\xa0\x8d\x06" + os.urandom(100_000)
"""As protobuf a model of ONNX: its ir_version, and a long name of who made it."""

SAMPLES = json.dumps({"inputs": {"x": [[1, 2], [3, 4]]}, "outputs": {"y": [0.1, 0.9]}}).encode()


async def upload(stub: Any, data: bytes, *, announced: bytes | None = None, **where: Any) -> tuple[str, list[str]]:
    """PUTs the parts of an upload; returns its id and the ETags."""
    claimed = data if announced is None else announced
    request = pb.StartUploadRequest(size_bytes=len(claimed), sha256=hashlib.sha256(claimed).hexdigest(), **where)
    ticket = await stub.StartUpload(request)
    assert not ticket.complete
    etags = []
    async with httpx.AsyncClient(trust_env=False) as http:
        for number, url in enumerate(ticket.part_urls):
            part = data[number * ticket.part_size_bytes : (number + 1) * ticket.part_size_bytes]
            answer = await http.put(url, content=part)
            answer.raise_for_status()
            etags.append(answer.headers["etag"].strip('"'))
    return ticket.upload_id, etags


async def put(stub: Any, data: bytes, **where: Any) -> tuple[str, model_pb2.BlobRef]:
    upload_id, etags = await upload(stub, data, **where)
    done = await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags))
    return upload_id, done.object


async def fetch(url: str) -> bytes:
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(url)
        answer.raise_for_status()
        return answer.content


async def test_a_run_with_a_model_goes_from_upload_to_event(running: Any) -> None:
    stub = running.stub("gateway")
    model, more = ONE_FILE, os.urandom(7)
    with rpc.acting_for(ADA):
        experiment = (await stub.CreateExperiment(pb.CreateExperimentRequest(name="flights"))).experiment
        created = await stub.CreateRun(pb.CreateRunRequest(experiment_id=experiment.id, name="first", tags={"a": "b"}))
    run_id = created.run.run_id
    told = runtoken.verify(SECRET, created.run_token, SystemClock().now())
    with rpc.acting_for(Caller("gateway", "run", frozenset(), told.run_id, told.fencing_token)):
        await put(stub, model, run_id=run_id, path="model/model.onnx")
        await put(stub, SAMPLES, run_id=run_id, path="model/samples.json")
        await put(stub, more, run_id=run_id, path="notes.txt")
        await put(stub, b"", run_id=run_id, path="empty")
        metric = pb.Metric(key="auc", value=0.7, timestamp_ms=1, step=0)
        await stub.LogBatch(pb.LogBatchRequest(run_id=run_id, metrics=[metric], params={"lr": "0.1"}))
        request = pb.LogModelRequest(
            run_id=run_id, name="model", path="model/model.onnx", format="onnx", signature=SIGNATURE, samples_path="model/samples.json"
        )
        logged = (await stub.LogModel(request)).model
        assert (await stub.LogModel(request)).model == logged
        listed = (await stub.ListArtifacts(pb.ListArtifactsRequest(run_id=run_id))).artifacts
        assert [one.path for one in listed] == ["empty", "model/model.onnx", "model/samples.json", "notes.txt"]
        below = (await stub.ListArtifacts(pb.ListArtifactsRequest(run_id=run_id, path="model"))).artifacts
        assert [one.size_bytes for one in below] == [len(model), len(SAMPLES)]
        download = await stub.GetDownload(pb.GetDownloadRequest(run_id=run_id, path="notes.txt"))
        assert (await fetch(download.url), download.key) == (more, "")
    digest = hashlib.sha256(model).hexdigest()
    assert (logged.blob.sha256, logged.blob.size_bytes) == (digest, len(model))
    assert logged.blob.key == f"blobs/sha256/{digest[:2]}/{digest}"
    with rpc.acting_for(ADA):
        await stub.FinishRun(pb.FinishRunRequest(run_id=run_id, status="FINISHED"))
    as_service = running.stub("evaluator")
    assert (await as_service.GetDownload(pb.GetDownloadRequest(run_id=run_id, path="notes.txt"))).key.startswith(f"runs/{run_id}/")

    events = await received(running, 2)
    assert [(headers.type, headers.sequence, headers.subject) for headers, _ in events] == [
        ("run.started", 1, run_id),
        ("run.finished", 2, run_id),
    ]
    finished = events_pb2.RunFinished.FromString(events[1][1])
    assert finished.models[0] == logged
    assert (dict(finished.metrics), dict(finished.params), dict(finished.tags)) == ({"auc": 0.7}, {"lr": "0.1"}, {"a": "b"})


async def received(running: Any, count: int) -> list[Any]:
    """The first records of headrace.runs."""
    broker = KafkaBroker(running.settings.kafka_bootstrap, "test")
    reader = broker.reader([f"{running.topic_prefix}headrace.runs"])
    await reader.start()
    found: list[Any] = []
    try:
        async with asyncio.timeout(30):
            while len(found) < count:
                polled = await reader.poll(100, 0.2)
                for partition in polled.assigned or ():
                    reader.seek(partition, 0)
                found += [(decode_headers(record.headers), record.value) for record in polled.records]
    finally:
        await reader.stop()
        await broker.close()
    return found


async def test_bytes_that_are_not_those_announced_are_refused_and_forgotten(running: Any) -> None:
    stub = running.stub("gateway")
    with rpc.acting_for(ADA):
        run_id = (await stub.CreateRun(pb.CreateRunRequest())).run.run_id
        _, good = await put(stub, b"good", run_id=run_id, path="x")
        for announced in (b"evil", b"longer than what comes"):
            upload_id, etags = await upload(stub, b"good!", announced=announced, run_id=run_id, path="x")
            with pytest.raises(Invalid, match="not those that were announced"):
                await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags))
            with pytest.raises(NotFound):
                await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags))
        listed = (await stub.ListArtifacts(pb.ListArtifactsRequest(run_id=run_id))).artifacts
        assert [(one.path, one.sha256) for one in listed] == [("x", good.sha256)]
        download = await stub.GetDownload(pb.GetDownloadRequest(run_id=run_id, path="x"))
        assert await fetch(download.url) == b"good"


async def test_completing_twice_at_once_and_uploading_the_same_again_cost_nothing(running: Any) -> None:
    stub = running.stub("gateway")
    data = os.urandom(50_000)
    with rpc.acting_for(ADA):
        run_id = (await stub.CreateRun(pb.CreateRunRequest())).run.run_id
        upload_id, etags = await upload(stub, data, run_id=run_id, path="x")
        request = pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags)
        answers = await asyncio.gather(*(stub.CompleteUpload(request) for _ in range(4)))
        assert len({answer.object.key for answer in answers}) == 1
        again = pb.StartUploadRequest(run_id=run_id, path="x", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        ticket = await stub.StartUpload(again)
        assert (ticket.complete, ticket.upload_id, list(ticket.part_urls)) == (True, upload_id, [])
        assert (await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=ticket.upload_id))).object == answers[0].object
        await put(stub, b"newer", run_id=run_id, path="x")
        assert not (await stub.StartUpload(again)).complete  # the path holds other bytes now: these must be sent again


async def test_a_completion_that_was_cut_off_after_joining_goes_on(running: Any, stack_servers: Any) -> None:
    """The tracker died between joining the parts in the store and noting it: the repeated call finds the object there."""
    stub = running.stub("gateway")
    with rpc.acting_for(ADA):
        run_id = (await stub.CreateRun(pb.CreateRunRequest())).run.run_id
        upload_id, etags = await upload(stub, b"joined", run_id=run_id, path="x")
        engine = create_async_engine(running.settings.database_url)
        async with engine.begin() as conn:
            row = (await conn.execute(text("SELECT key, store_id FROM tracker.upload WHERE upload_id = :id"), {"id": upload_id})).one()
        await engine.dispose()
        await S3Store(stack_servers.s3).complete_multipart(row.key, row.store_id, [Part(1, etags[0])])
        done = await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags))
        assert done.object.size_bytes == 6


def external_model() -> bytes:
    """A model whose weights a runtime would read from a file of the author's choice."""
    weights = numpy_helper.from_array(np.ones((2, 1), np.float32), "w")
    onnx.external_data_helper.set_external_data(weights, location="/proc/self/environ")
    weights.ClearField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [weights],
    )
    made: bytes = helper.make_model(graph).SerializeToString()
    return made


async def test_a_model_that_cannot_be_delivered_is_refused_with_the_reason(running: Any) -> None:
    stub = running.stub("gateway")
    good: dict[str, Any] = {"name": "model", "path": "m.onnx", "format": "onnx", "signature": SIGNATURE, "samples_path": "s.json"}
    with rpc.acting_for(ADA):
        run_id = (await stub.CreateRun(pb.CreateRunRequest())).run.run_id
        await put(stub, b"model", run_id=run_id, path="m.onnx")
        await put(stub, b"weights", run_id=run_id, path="other.onnx")
        await put(stub, external_model(), run_id=run_id, path="external.onnx")
        await put(stub, SAMPLES, run_id=run_id, path="s.json")
        await put(stub, b'{"inputs": {}, "outputs": {}}', run_id=run_id, path="empty.json")
        await put(stub, b" " * (8 * 1024 * 1024 + 1), run_id=run_id, path="large.json")
        for change, field in (
            ({"format": "pickle"}, "format"),
            ({"signature": model_pb2.ModelSignature()}, "signature.inputs"),
            ({"samples_path": ""}, "samples_path"),
            ({"samples_path": "empty.json"}, "samples.inputs.x"),
            ({"samples_path": "large.json"}, "samples_path"),
            ({"path": "missing.onnx"}, "path"),
            ({"path": "other.onnx"}, "path"),
            ({"path": "external.onnx"}, "path"),
        ):
            with pytest.raises(Invalid) as caught:
                await stub.LogModel(pb.LogModelRequest(**{"run_id": run_id, **good, **change}))
            assert caught.value.violations[0].field == field
        assert "keeps the tensor 'w' in another file" in caught.value.violations[0].message
        assert not (await stub.GetRun(pb.GetRunRequest(run_id=run_id))).run.models
        await stub.FinishRun(pb.FinishRunRequest(run_id=run_id, status="FINISHED"))
        with pytest.raises(Conflict, match="has ended"):
            await stub.LogModel(pb.LogModelRequest(run_id=run_id, **good))


async def test_a_data_set_is_uploaded_registered_and_read_by_version(running: Any) -> None:
    stub = running.stub("gateway")
    with rpc.acting_for(ADA):
        upload_id, etags = await upload(stub, b"rows", dataset="flights")
        register = pb.RegisterDatasetRequest(name="flights", upload_id=upload_id, schema_json='[{"name": "a", "type": "int64"}]')
        with pytest.raises(Conflict, match="not complete"):
            await stub.RegisterDataset(register)
        await stub.CompleteUpload(pb.CompleteUploadRequest(upload_id=upload_id, part_etags=etags))
        made = (await stub.RegisterDataset(register)).dataset
        assert (made.ref.version, made.schema_json) == (1, '[{"name":"a","type":"int64"}]')
        second, _ = await put(stub, b"other rows", dataset="flights")
        assert (await stub.RegisterDataset(pb.RegisterDatasetRequest(name="flights", upload_id=second))).dataset.ref.version == 2
        assert (await stub.RegisterDataset(register)).dataset == made
        with pytest.raises(Conflict, match="is for data set flights"):
            await stub.RegisterDataset(pb.RegisterDatasetRequest(name="else", upload_id=second))
        run = await stub.CreateRun(pb.CreateRunRequest())
    token = Caller("gateway", "run", frozenset(), run.run.run_id, 0)
    with rpc.acting_for(token):
        first = await stub.GetDownload(pb.GetDownloadRequest(dataset=model_pb2.DatasetRef(name="flights", version=1)))
        newest = await stub.GetDownload(pb.GetDownloadRequest(dataset=model_pb2.DatasetRef(name="flights")))
        assert (await fetch(first.url), await fetch(newest.url)) == (b"rows", b"other rows")
        await stub.LogInputs(pb.LogInputsRequest(run_id=run.run.run_id, inputs=[made.ref]))
        with pytest.raises(NotFound):
            await stub.LogInputs(pb.LogInputsRequest(run_id=run.run.run_id, inputs=[model_pb2.DatasetRef(name="flights", version=9)]))
        with pytest.raises(Forbidden):
            await stub.StartUpload(pb.StartUploadRequest(dataset="flights", size_bytes=1, sha256="0" * 64))


async def test_a_holdout_is_kept_from_runs(running: Any) -> None:
    stub = running.stub("gateway")
    with rpc.acting_for(ADA):
        copied, _ = await put(stub, b"april", dataset="copy")  # before there is a holdout of it
        copy = (await stub.RegisterDataset(pb.RegisterDatasetRequest(name="copy", upload_id=copied))).dataset
        assert not copy.holdout
        exam, _ = await put(stub, b"april", dataset="exam")
        register = pb.RegisterDatasetRequest(name="exam", upload_id=exam, holdout=True)
        holdout = (await stub.RegisterDataset(register)).dataset
        assert holdout.holdout
        assert (await stub.RegisterDataset(register)).dataset == holdout
        with pytest.raises(Conflict, match="exam version 1 has this content and is a holdout, which never changes"):
            await stub.RegisterDataset(pb.RegisterDatasetRequest(name="exam", upload_id=exam))
        late, _ = await put(stub, b"april", dataset="late")
        with pytest.raises(
            Conflict, match="this content is version 1 of the holdout exam; a training may not read it: push it with --holdout"
        ):
            await stub.RegisterDataset(pb.RegisterDatasetRequest(name="late", upload_id=late))
        with pytest.raises(Conflict, match="copy version 1 has this content and is not a holdout"):
            await stub.RegisterDataset(pb.RegisterDatasetRequest(name="copy", upload_id=copied, holdout=True))
        march, _ = await put(stub, b"march", dataset="exam")  # another version of the same data set may be read
        rows = (await stub.RegisterDataset(pb.RegisterDatasetRequest(name="exam", upload_id=march))).dataset
        assert [(one.ref.version, one.holdout) for one in (await stub.ListDatasets(pb.ListDatasetsRequest())).datasets] == [
            (1, False),
            (2, False),
            (1, True),
        ]
        download = await stub.GetDownload(pb.GetDownloadRequest(dataset=holdout.ref))
        assert await fetch(download.url) == b"april"  # people may
        run = await stub.CreateRun(pb.CreateRunRequest())
    with rpc.acting_for(Caller("gateway", "run", frozenset(), run.run.run_id, 0)):
        # What counts is the content, not the name.
        for kept, why in (
            (holdout.ref, "exam version 1 is a holdout"),
            (copy.ref, "copy version 1 is the same content as the holdout exam version 1"),
        ):
            with pytest.raises(Forbidden, match=f"{why}: models are judged on it, so no run may read it"):
                await stub.GetDownload(pb.GetDownloadRequest(dataset=kept))
            with pytest.raises(Conflict, match=rf"{why}.*; train on other rows"):
                await stub.LogInputs(pb.LogInputsRequest(run_id=run.run.run_id, inputs=[kept]))
        await stub.LogInputs(pb.LogInputsRequest(run_id=run.run.run_id, inputs=[rows.ref]))
        assert await fetch((await stub.GetDownload(pb.GetDownloadRequest(dataset=rows.ref))).url) == b"march"
        assert (await stub.GetDataset(pb.GetDatasetRequest(name="exam", version=1))).dataset.holdout  # that there is one is no secret


async def test_who_may_not_is_told_so(running: Any) -> None:
    with pytest.raises(Unauthenticated):
        await running.stub("mallory").GetExperiment(pb.GetExperimentRequest())
    stub = running.stub("gateway")
    with pytest.raises(Forbidden):  # no end user
        await stub.GetExperiment(pb.GetExperimentRequest())
    with rpc.acting_for(Caller("gateway", "vic", frozenset({"viewer"}))):
        await stub.GetExperiment(pb.GetExperimentRequest())
        with pytest.raises(Forbidden):
            await stub.CreateRun(pb.CreateRunRequest())
    with rpc.acting_for(Caller("gateway", "inference-only", frozenset())), pytest.raises(Forbidden):
        await stub.GetExperiment(pb.GetExperimentRequest())
    with rpc.acting_for(Caller("gateway", "run", frozenset(), "0" * 32, 0)), pytest.raises(Forbidden):  # other runs are not its business
        await stub.ListRuns(pb.ListRunsRequest())
    with pytest.raises(Forbidden):
        await running.stub("evaluator").LogBatch(pb.LogBatchRequest(run_id="0" * 32))


async def test_pages_follow_one_another_and_a_foreign_token_is_refused(running: Any) -> None:
    trainer, stub = running.stub("trainer"), running.stub("gateway")
    for n in range(5):
        await trainer.CreateRun(pb.CreateRunRequest(name=f"r{n}", started_ms=n + 1))
    names, token = [], ""
    while True:
        with rpc.acting_for(ADA):
            page = await stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token))
        names += [run.name for run in page.runs]
        if not (token := page.next_page_token):
            break
        last = token
    assert names == ["r4", "r3", "r2", "r1", "r0"]
    for wrong in ("nonsense", last):
        with rpc.acting_for(ADA), pytest.raises(Invalid, match="page_token"):
            await stub.ListExperiments(pb.ListExperimentsRequest(page_token=wrong))


async def test_the_lease_watch_of_a_served_tracker_ends_a_dead_run(running: Any) -> None:
    stub = running.stub("trainer")
    run = (await stub.CreateRun(pb.CreateRunRequest(lease_seconds=1))).run
    async with asyncio.timeout(30):
        view = run
        while view.status == "RUNNING":
            await asyncio.sleep(0.05)
            view = (await stub.GetRun(pb.GetRunRequest(run_id=run.run_id))).run
    assert (view.status, view.reason) == ("FAILED", "lease expired")
    assert [headers.type for headers, _ in await received(running, 2)] == ["run.started", "run.failed"]


def test_it_starts_from_settings_alone_and_stops_on_sigterm(database: Any, stack_servers: Any, topic_prefix: str, tmp_path: Path) -> None:
    s3 = stack_servers.s3
    environment = {
        "PATH": os.environ["PATH"],
        "HEADRACE_DATABASE_URL": database.sqlalchemy,
        "HEADRACE_KAFKA_BOOTSTRAP": stack_servers.kafka,
        "HEADRACE_TOPIC_PREFIX": topic_prefix,
        "HEADRACE_S3_ENDPOINT": s3.endpoint,
        "HEADRACE_S3_ACCESS_KEY": s3.access_key,
        "HEADRACE_S3_SECRET_KEY": s3.secret_key,
        "HEADRACE_S3_BUCKET": s3.bucket,
        "HEADRACE_RUN_TOKEN_SECRET": SECRET,
        "HEADRACE_STATE_DIR": str(tmp_path / "state"),
        "HEADRACE_ANNOUNCE_FILE": str(tmp_path / "announced"),
    }
    command = [sys.executable, "-m", "tracker"]
    subprocess.run([*command, "migrate"], env=environment, check=True, timeout=60)
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "announced").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            port = json.loads((tmp_path / "announced").read_text())["http"]
            while httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
