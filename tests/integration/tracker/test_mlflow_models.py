"""Logged models by plain HTTP through the gateway's door, and how a model of the flavor onnx becomes deliverable by itself."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from artifacts.blobs import blob_key
from artifacts.s3 import S3Store
from contracts.tracker.v1 import events_pb2, model_pb2
from contracts.tracker.v1 import service_pb2 as pb
from onnx import TensorProto, helper, numpy_helper
from servicekit import db
from servicekit.errors import Forbidden, NotFound, Unauthenticated
from sqlalchemy import text

EDITOR, VIEWER = "key-of-ada", "key-of-vic"
STORE = "/api/2.0/mlflow-artifacts/artifacts"
EXAMPLE = {"inputs": {"x": [[1.0, 2.0], [3.0, 4.0]]}}


async def new_run(door: Any, **fields: Any) -> str:
    return str((await door.post("/runs/create", {"experiment_id": "0", **fields}))["run"]["info"]["run_id"])


async def new_model(door: Any, **fields: Any) -> str:
    made = await door.post("/logged-models", {"experiment_id": "0", **fields})
    return str(made["model"]["info"]["model_id"])


async def get(door: Any, model_id: str, **query: Any) -> Any:
    answer = await door.call("GET", f"/logged-models/{model_id}", **query)
    assert answer.status_code == 200, answer.text
    return answer.json()["model"]


async def finalize(door: Any, model_id: str, status: Any = "LOGGED_MODEL_READY") -> Any:
    answer = await door.call("PATCH", f"/logged-models/{model_id}", {"model_id": model_id, "status": status})
    assert answer.status_code == 200, answer.text
    return answer.json()["model"]


async def put(door: Any, where: str, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        sent = await door.client.put(f"{STORE}/0/{where}/artifacts/{path}", content=data, headers={"authorization": f"Bearer {EDITOR}"})
        assert sent.status_code == 200, sent.text


async def finished(door: Any, run_id: str) -> list[events_pb2.RunFinished]:
    """What run.finished told of a run, each time."""
    engine = db.create_engine(door.running.settings.database_url)
    async with engine.connect() as conn:
        statement = "SELECT payload FROM tracker.outbox WHERE key = :key AND type = 'run.finished' ORDER BY sequence"
        found = [events_pb2.RunFinished.FromString(bytes(row.payload)) for row in await conn.execute(text(statement), {"key": run_id})]
    await engine.dispose()
    return found


def tag(model: Any) -> str:
    found: str = {one["key"]: one["value"] for one in model["info"]["tags"]}["headrace.deliverable"]
    return found


def onnx_model(batch: Any = "n", weights: int = 1) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((2, weights), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weights])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def mlmodel(**flavors: Any) -> bytes:
    info = {"artifact_path": "input_example.json", "serving_input_path": "serving_input_example.json", "type": "ndarray"}
    document = {"flavors": flavors or {"onnx": {"data": "model.onnx"}, "python_function": {}}, "saved_input_example_info": info}
    return json.dumps(document).encode()


def files(**changes: bytes) -> dict[str, bytes]:
    example = json.dumps(EXAMPLE).encode()
    made = {"MLmodel": mlmodel(), "model.onnx": onnx_model().SerializeToString(), "serving_input_example.json": example}
    return made | {name.replace("__", "."): data for name, data in changes.items()}


async def test_a_logged_model_is_made_described_and_found(door: Any) -> None:
    run_id = await new_run(door)
    made = await door.post(
        "/logged-models",
        {
            "experiment_id": "0", "name": "model", "model_type": "classifier", "source_run_id": run_id,
            "params": [{"key": "depth", "value": "3"}], "tags": [{"key": "team", "value": "blue"}],
        },
    )  # fmt: skip
    info = made["model"]["info"]
    model_id = info["model_id"]
    assert info["artifact_uri"] == f"mlflow-artifacts:/0/models/{model_id}/artifacts"
    assert (info["status"], info["source_run_id"], info["name"]) == ("LOGGED_MODEL_PENDING", run_id, "model")
    assert made["model"]["data"]["params"] == [{"key": "depth", "value": "3"}]
    assert await get(door, model_id) == made["model"]
    await door.post(f"/logged-models/{model_id}/params", {"params": [{"key": "rate", "value": "0.1"}]})
    await door.call("PATCH", f"/logged-models/{model_id}/tags", {"tags": [{"key": "a/b", "value": "x"}, {"key": "team", "value": "red"}]})
    found = await get(door, model_id)
    assert {one["key"]: one["value"] for one in found["data"]["params"]} == {"depth": "3", "rate": "0.1"}
    assert {one["key"]: one["value"] for one in found["info"]["tags"]} == {"team": "red", "a/b": "x"}
    assert (await door.call("DELETE", f"/logged-models/{model_id}/tags/a/b")).status_code == 200
    assert (await door.call("DELETE", f"/logged-models/{model_id}/tags/a/b")).status_code == 404
    metric = {"run_id": run_id, "key": "auc", "value": 0.7, "timestamp": 5, "step": 1, "model_id": model_id}
    await door.post("/runs/log-metric", {**metric, "dataset_name": "holdout", "dataset_digest": "d1"})
    await door.post("/runs/log-metric", metric)
    assert [(one["key"], one["value"], one.get("dataset_name")) for one in (await get(door, model_id))["data"]["metrics"]] == [
        ("auc", 0.7, None),
        ("auc", 0.7, "holdout"),
    ]
    gone = await door.call("DELETE", f"/logged-models/{model_id}", {"model_id": model_id})
    assert gone.status_code == 200
    assert (await door.call("GET", f"/logged-models/{model_id}")).status_code == 404
    await get(door, model_id, allow_deleted="true")


async def test_logged_models_are_searched_page_by_page(door: Any) -> None:
    run_id = await new_run(door)
    ids = []
    for number in range(5):
        params, tags = [{"key": "n", "value": str(number)}], [{"key": "odd", "value": str(number % 2)}]
        model_id = await new_model(door, name=f"model-{number}", source_run_id=run_id, params=params, tags=tags)
        metric = {"key": "auc", "value": number / 10, "timestamp": 1, "model_id": model_id}
        await door.post("/runs/log-metric", {"run_id": run_id, **metric})
        ids.append(model_id)

    async def search(**asked: Any) -> Any:
        return await door.post("/logged-models/search", {"experiment_ids": ["0"], **asked})

    async def names(**asked: Any) -> list[str]:
        return [one["info"]["name"].removeprefix("model-") for one in (await search(**asked))["models"]]

    by_auc = [{"field_name": "metrics.auc", "ascending": False}]
    assert await names(order_by=by_auc) == ["4", "3", "2", "1", "0"]
    assert await names(order_by=[{"field_name": "name", "ascending": True}]) == ["0", "1", "2", "3", "4"]
    assert await names(filter="name = 'model-3'") == ["3"]
    assert await names(filter="metrics.auc > 0.15 AND tags.odd = '1'") == ["3"]
    assert await names(filter="params.n IN ('0', '2')", order_by=by_auc) == ["2", "0"]
    assert await names(filter=f"source_run_id = '{run_id}' AND name ILIKE 'MODEL-%'", max_results=2, order_by=by_auc) == ["4", "3"]
    assert await names(filter="metrics.auc > 0", datasets=[{"dataset_name": "other"}]) == []
    page = await search(order_by=by_auc, max_results=3)
    rest = await search(order_by=by_auc, max_results=3, page_token=page["next_page_token"])
    assert [one["info"]["model_id"] for one in page["models"] + rest["models"]] == ids[::-1]
    assert "next_page_token" not in rest
    asked: list[dict[str, Any]] = [
        {"page_token": page["next_page_token"], "filter": "name = 'other'"}, {"page_token": "nonsense"}, {"filter": "name = 'x' OR 1"},
        {"filter": "nonsense.a = 'b'"}, {"order_by": [{"field_name": "params.n"}]}, {"max_results": 1_000_000}, {"max_results": -1},
        {"datasets": [{}]}, {"experiment_ids": ["x"]}, {"experiment_ids": []}, {"filter": "name = 'a\x00'"},
    ]  # fmt: skip
    for wrong in asked:
        status, code, _ = await door.refused("/logged-models/search", {"experiment_ids": ["0"], **wrong})
        assert (status, code) == (400, "INVALID_PARAMETER_VALUE"), wrong


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"name": "a/b"}, 400), ({"name": "a" * 501}, 400), ({"name": "a:b"}, 400), ({"model_type": "x\x00"}, 400),
        ({"experiment_id": "99"}, 404), ({"experiment_id": "x"}, 400), ({"source_run_id": "0" * 32}, 404),
        ({"params": [{"key": "k", "value": "v" * 6001}]}, 400), ({"tags": [{"key": "../k", "value": "v"}]}, 400),
    ],
)  # fmt: skip
async def test_what_a_logged_model_cannot_be(door: Any, fields: dict[str, Any], status: int) -> None:
    assert (await door.refused("/logged-models", {"experiment_id": "0", **fields}))[0] == status
    assert (await door.post("/logged-models/search", {"experiment_ids": ["0"]}))["models"] == []


async def test_what_is_ready_stays_so_and_viewers_change_nothing(door: Any) -> None:
    model_id = await new_model(door)
    assert (await door.call("PATCH", f"/logged-models/{model_id}", {"status": "LOGGED_MODEL_PENDING"})).status_code == 400
    assert (await door.call("PATCH", f"/logged-models/{model_id}", {"status": 2}, VIEWER)).status_code == 403
    failed = await finalize(door, model_id, 3)
    assert failed["info"]["status"] == "LOGGED_MODEL_UPLOAD_FAILED"
    assert await finalize(door, model_id, "LOGGED_MODEL_UPLOAD_FAILED") == failed
    assert (await door.call("PATCH", f"/logged-models/{model_id}", {"status": 2})).status_code == 400
    assert (await door.call("GET", f"/logged-models/m-{uuid.uuid4().hex}")).status_code == 404


async def test_a_model_of_onnx_that_is_ready_is_delivered_with_its_run(door: Any) -> None:
    run_id = await new_run(door)
    model_id = await new_model(door, name="flights", source_run_id=run_id)
    await put(door, f"models/{model_id}", files())
    first = await finalize(door, model_id)
    assert (first["info"]["status"], tag(first)) == ("LOGGED_MODEL_READY", "yes")
    await finalize(door, model_id)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    [told] = await finished(door, run_id)
    [model] = told.models
    assert (model.name, model.format, model.logged_model_id) == ("flights", "onnx", model_id)
    assert model.blob.sha256 == hashlib.sha256(files()["model.onnx"]).hexdigest()
    assert [(one.name, one.datatype, list(one.shape)) for one in model.signature.inputs] == [("x", "FP32", [-1, 2])]
    assert [(one.name, one.datatype, list(one.shape)) for one in model.signature.outputs] == [("y", "FP32", [-1, 1])]
    store = S3Store(door.running.settings.s3)
    assert json.loads(await store.read(model.samples.key, sha256=model.samples.sha256, max_bytes=10_000)) == {**EXAMPLE, "outputs": {}}
    assert await store.read(model.blob.key, sha256=model.blob.sha256, max_bytes=10_000) == files()["model.onnx"]
    await store.stop()
    # What was delivered stays; the same again is no change.
    await put(door, f"models/{model_id}", {"MLmodel": mlmodel(), "notes.txt": b"new"})
    headers = {"authorization": f"Bearer {EDITOR}"}
    where = f"{STORE}/0/models/{model_id}/artifacts"
    assert (await door.client.put(f"{where}/model.onnx", content=b"other", headers=headers)).status_code == 400
    assert (await door.client.delete(f"{where}/model.onnx", headers=headers)).status_code == 400
    listed = await door.call("GET", f"/logged-models/{model_id}/artifacts/directories")
    assert [one["path"] for one in listed.json()["files"]] == ["MLmodel", "model.onnx", "notes.txt", "serving_input_example.json"]
    fetched = await door.call("GET", f"/logged-models/{model_id}/artifacts/files", artifact_file_path="model.onnx")
    assert fetched.content == files()["model.onnx"]


async def test_a_model_that_becomes_ready_after_its_run_is_told_by_one_more_event(door: Any) -> None:
    run_id = await new_run(door)
    model_id = await new_model(door, name="late", source_run_id=run_id)
    await put(door, f"models/{model_id}", files())
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    await asyncio.gather(*(finalize(door, model_id) for _ in range(3)))
    assert [[model.name for model in told.models] for told in await finished(door, run_id)] == [[], ["late"]]


async def test_a_model_among_a_runs_artifacts_is_delivered_when_the_run_ends(door: Any) -> None:
    run_id = await new_run(door)
    await put(door, run_id, {f"model/{name}": data for name, data in files().items()})
    await put(door, run_id, {"other/MLmodel": mlmodel(sklearn={"pickled_model": "model.pkl"}), "other/model.pkl": b"pickle"})
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    [told] = await finished(door, run_id)
    assert [model.name for model in told.models] == ["model"]
    tags = {one["key"]: one["value"] for one in (await door.run(run_id))["data"]["tags"]}
    assert tags["headrace.deliverable"] == (
        "model: yes; other: not yet: its flavor is sklearn; it is converted when its run has finished and a delivery claims the experiment"
    )
    # What the run has is enough to be a candidate.
    assert not told.HasField("conversion")


async def test_weights_in_a_file_of_their_own_are_put_into_the_one_that_is_delivered(door: Any, tmp_path: Path) -> None:
    made = onnx_model(weights=1000)
    onnx.save_model(made, str(tmp_path / "model.onnx"), save_as_external_data=True, location="weights", size_threshold=100)
    run_id = await new_run(door)
    model_id = await new_model(door, name="big", source_run_id=run_id)
    beside = {name: (tmp_path / name).read_bytes() for name in ("model.onnx", "weights")}
    await put(door, f"models/{model_id}", files() | beside)
    assert tag(await finalize(door, model_id)) == "yes"
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    [model] = (await finished(door, run_id))[0].models
    store = S3Store(door.running.settings.s3)
    delivered = await store.read(model.blob.key, sha256=model.blob.sha256, max_bytes=1_000_000)
    await store.stop()
    loaded = onnx.load_from_string(delivered)
    assert numpy_helper.to_array(loaded.graph.initializer[0]).tolist() == [[1.0] * 1000] * 2
    assert len(delivered) >= 8000


def external(location: str) -> bytes:
    made = onnx_model()
    tensor = made.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"MLmodel": b"a: &a [1]\nb: *a"}, "no: its MLmodel file cannot be read: it has aliases"),
        ({"MLmodel": b"!!python/object/apply:os.system ['true']"}, "no: its MLmodel file cannot be read"),
        ({"MLmodel": b"[" * 100_000}, "no: its MLmodel file cannot be read"),
        ({"MLmodel": b"x" * 1_000_001}, "no: MLmodel has 1000001 bytes"),
        ({"MLmodel": b"- 1"}, "no: its MLmodel file names no flavors"),
        ({"MLmodel": mlmodel(onnx={"data": "../../secret"})}, "no: its ONNX file has no path"),
        ({"MLmodel": mlmodel(onnx={"data": "missing.onnx"})}, "no: it has no file missing.onnx"),
        ({"MLmodel": mlmodel(pytorch={"model_data": "data"})}, "not yet: its flavor is pytorch"),
        ({"model__onnx": b"pickle"}, "no: the file is no ONNX model"),
        ({"model__onnx": b""}, "no: the file is no ONNX model"),
        ({"model__onnx": onnx_model(batch=1).SerializeToString()}, "no: its input 'x' takes 1 rows"),
        ({"model__onnx": external("../../etc/passwd")}, "no: its tensors lie in '../../etc/passwd', which is no file beside it"),
        ({"model__onnx": external("/etc/passwd")}, "no: its tensors lie in '/etc/passwd'"),
        ({"model__onnx": external("missing")}, "no: it has no file missing"),
        ({"serving_input_example__json": b"nonsense"}, "yes; its input example is not used"),
        ({"serving_input_example__json": b'{"inputs": {"z": [[1, 2]]}}'}, "yes; its input example is not used"),
        ({"serving_input_example__json": b'{"inputs": [[1, 2], [3, 4]]}'}, "yes"),
        ({"serving_input_example__json": b'{"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}}'}, "yes"),
    ],
)
async def test_a_model_says_why_it_is_delivered_or_not(door: Any, changes: dict[str, bytes], says: str) -> None:
    run_id = await new_run(door)
    model_id = await new_model(door, name="model", source_run_id=run_id)
    await put(door, f"models/{model_id}", files(**changes))
    assert tag(await finalize(door, model_id)).startswith(says)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    assert len((await finished(door, run_id))[0].models) == (1 if says.startswith("yes") else 0)


SKLEARN = {"sklearn": {"pickled_model": "model.pkl"}, "python_function": {}}
SAMPLES = json.dumps({"inputs": {"x": [[1, 2]]}, "outputs": {"y": [[3.0]]}}).encode()


async def pickled(door: Any, run_id: str, name: str = "model") -> str:
    model_id = await new_model(door, name=name, source_run_id=run_id)
    await put(door, f"models/{model_id}", {"MLmodel": mlmodel(**SKLEARN), "model.pkl": b"pickle"})
    await finalize(door, model_id)
    return model_id


async def stored(door: Any, content: bytes) -> model_pb2.BlobRef:
    store = S3Store(door.running.settings.s3)
    sha256 = hashlib.sha256(content).hexdigest()
    put_there = await store.put(blob_key(sha256), content, sha256=sha256)
    await store.stop()
    return model_pb2.BlobRef(sha256=sha256, size_bytes=put_there.size, key="somewhere/else")


async def test_a_converted_model_makes_its_run_a_candidate_once(door: Any) -> None:
    run_id = await new_run(door)
    model_id = await pickled(door, run_id)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    [told] = await finished(door, run_id)
    assert (told.conversion.owner, told.conversion.folder, told.conversion.name) == (model_id, "", "model")
    assert list(told.conversion.flavors) == ["sklearn"]
    trainer = door.running.stub("trainer")
    listed = await trainer.ListModelFiles(pb.ListModelFilesRequest(run_id=run_id, owner=model_id))
    assert sorted(file.path for file in listed.files) == ["MLmodel", "model.pkl"]
    blob, samples = await stored(door, onnx_model().SerializeToString()), await stored(door, SAMPLES)
    settle = pb.SettleConversionRequest(run_id=run_id, owner=model_id, blob=blob, samples=samples)
    await asyncio.gather(*(trainer.SettleConversion(settle) for _ in range(3)))
    await trainer.SettleConversion(pb.SettleConversionRequest(run_id=run_id, owner=model_id, refused="the first answer counts"))
    [_, again] = await finished(door, run_id)
    assert not again.HasField("conversion")
    [model] = again.models
    assert (model.name, model.logged_model_id, model.blob.sha256) == ("model", model_id, blob.sha256)
    assert model.blob.key == blob_key(blob.sha256)  # not where the caller said
    assert [(tensor.name, tensor.datatype) for tensor in model.signature.inputs] == [("x", "FP32")]
    assert tag(await get(door, model_id)) == "yes, converted from sklearn"


@pytest.mark.parametrize(
    ("content", "samples", "says"),
    [
        (b"pickle", SAMPLES, "what its conversion made cannot be delivered: the file is no ONNX model"),
        (external("/etc/passwd"), SAMPLES, "what its conversion made cannot be delivered"),
        (onnx_model().SerializeToString(), b"{}", "what its conversion made cannot be delivered: samples"),
        (None, None, "no input example"),
    ],
)
async def test_what_cannot_be_converted_says_why(door: Any, content: bytes | None, samples: bytes | None, says: str) -> None:
    run_id = await new_run(door)
    model_id = await pickled(door, run_id)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    request = pb.SettleConversionRequest(run_id=run_id, owner=model_id, refused="no input example")
    if content is not None and samples is not None:
        request.blob.CopyFrom(await stored(door, content))
        request.samples.CopyFrom(await stored(door, samples))
    await door.running.stub("trainer").SettleConversion(request)
    [_, again] = await finished(door, run_id)
    assert not again.models
    assert not again.HasField("conversion")
    assert again.tags["headrace.deliverable"].startswith(f"model: no: {says}")
    assert tag(await get(door, model_id)).startswith(f"no: {says}")


@pytest.mark.parametrize("tags", [{}, {"headrace.candidate": "second"}, {"headrace.candidate": "absent"}])
async def test_of_several_models_the_one_that_is_named_is_converted(door: Any, tags: dict[str, str]) -> None:
    run_id = await new_run(door)
    for name in ("first", "second"):
        await pickled(door, run_id, name)
    for key, value in tags.items():
        await door.post("/runs/set-tag", {"run_id": run_id, "key": key, "value": value})
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    [told] = await finished(door, run_id)
    assert told.conversion.name == ("second" if tags.get("headrace.candidate") == "second" else "")


async def test_parts_of_a_run_are_not_converted(door: Any) -> None:
    parent, child = await new_run(door), await new_run(door)
    await door.post("/runs/set-tag", {"run_id": child, "key": "mlflow.parentRunId", "value": parent})
    await pickled(door, child)
    await door.post("/runs/update", {"run_id": child, "status": "FINISHED"})
    [told] = await finished(door, child)
    assert not told.HasField("conversion")


async def test_conversions_are_the_trainers_alone(door: Any) -> None:
    run_id = await new_run(door)
    model_id = await pickled(door, run_id)
    for service in ("gateway", "evaluator"):
        with pytest.raises((Forbidden, Unauthenticated)):
            await door.running.stub(service).ListModelFiles(pb.ListModelFilesRequest(run_id=run_id, owner=model_id))
    with pytest.raises(NotFound):
        await door.running.stub("trainer").SettleConversion(pb.SettleConversionRequest(run_id=run_id, owner=run_id, refused="x"))
