"""What end-to-end tests are made of: a small data set, models of known quality, a delivery of the test's own, callers that keep count."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as parquet
from headrace.config import Connection
from headrace.datasets import DatasetVersion, push_dataset
from headrace.http import Client, HeadraceError
from headrace.runs import start_run
from localstack.layout import Stack
from onnx import TensorProto, helper

INPUTS = ("x0", "x1")
OUTPUT = "probability"
SIGNATURE = {
    "inputs": [{"name": name, "datatype": "FP32", "shape": [-1, 1]} for name in INPUTS],
    "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 1]}],
}
BREAKS_ABOVE = 1000.0
"""Models made with `breaks=True` fail on rows whose x0 is above this; no holdout row is."""

DELIVERY = """apiVersion: headrace/v1
kind: Delivery
metadata: {{name: {name}}}
evaluate:
  experiment: {name}
  holdout: {{dataset: {dataset}, version: {version}, label: label}}
  metric: {{name: auc, goal: maximize, margin: 0.01}}
  require: [auc.at_least 0.6, parity]
promote:
  model: {name}
  approvals: {{production: {approvals}}}
serve:
  endpoint: {endpoint}
  runtime: triton
  assign: request
  rollout:
    window: 250ms
    shadow: {{share: 1.0, requests: 20}}
    steps: [{{weight: 10%, requests: 10}}, {{weight: 50%, requests: 60}}]
    guards:
      - {{bad: error, margin: 20%, at_most: 60%}}
    deadline: 10m
    on_deadline: abort
"""


def model_bytes(weights: tuple[float, float], *, breaks: bool = False, seed: int = 0) -> bytes:
    """A logistic model of x0 and x1; another seed gives other bytes that predict alike."""
    nodes = [
        helper.make_node("Concat", list(INPUTS), ["x"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["score"]),
        helper.make_node("Sigmoid", ["score"], ["healthy"]),
    ]
    initializers = [helper.make_tensor("w", TensorProto.FLOAT, [2, 1], list(weights))]
    if breaks:
        # Row number 0 of a table of one row, unless x0 is so large that it becomes row 1, which is not there.
        nodes += [
            helper.make_node("ReduceMax", ["x0"], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "limit"], ["over"]),
            helper.make_node("Cast", ["over"], ["row"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "row"], ["zero"]),
            helper.make_node("Add", ["healthy", "zero"], [OUTPUT]),
        ]
        initializers += [
            helper.make_tensor("limit", TensorProto.FLOAT, [], [BREAKS_ABOVE]),
            helper.make_tensor("table", TensorProto.FLOAT, [1], [0.0]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["healthy"], [OUTPUT]))
    graph = helper.make_graph(
        nodes,
        f"g{seed}",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in INPUTS],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", 1])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


HEARD = {"completed": ("Production", "Archived"), "rolled_back": ("Archived",)}
"""Stages of a version whose rollout has ended so, once the registry has heard it, an event after the deployer has said it."""

GOOD, WEAK, NOISE = (1.0, 0.5), (1.0, -0.4), (0.05, -1.0)


def samples_of(model: bytes) -> dict[str, dict[str, list[Any]]]:
    """Some rows and what the model says of them."""
    rows = np.linspace(-2, 2, 8, dtype=np.float32).reshape(-1, 1)
    feed = {"x0": rows, "x1": -rows}
    (out,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed)
    return {"inputs": {name: values.tolist() for name, values in feed.items()}, "outputs": {OUTPUT: out.tolist()}}


def request_body(x0: float = 0.3, x1: float = -0.2) -> bytes:
    """One row as an Open Inference Protocol V2 request."""
    tensors = [{"name": name, "datatype": "FP32", "shape": [1, 1], "data": [value]} for name, value in zip(INPUTS, (x0, x1), strict=True)]
    return json.dumps({"inputs": tensors}).encode()


def eventually(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """The condition's first truthy value; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"it did not come to pass: {what or condition}"
        time.sleep(0.05)


class Callers:
    """A client application in a thread: a steady rate of requests to one endpoint, and a count of every answer."""

    def __init__(self, url: str, key: str, endpoint: str, rate: float, rows: Callable[[int], bytes]) -> None:
        self.answers: Counter[str] = Counter()
        self.fallbacks = 0
        self.failures: Counter[str] = Counter()
        self.sent = 0
        self._url, self._rate, self._rows = f"{url}/v2/models/{endpoint}/infer", rate, rows
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(number,), daemon=True) for number in range(4)]

    def _send(self, number: int) -> None:
        pause = len(self._threads) / self._rate
        with httpx.Client(headers=self._headers, timeout=30, trust_env=False) as client:
            due = time.monotonic() + pause * number / len(self._threads)
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                due = max(due + pause, time.monotonic() - 1)
                self.sent += 1
                try:
                    answer = client.post(self._url, content=self._rows(self.sent))
                except httpx.HTTPError as error:
                    self.failures[type(error).__name__] += 1
                    continue
                if answer.status_code != 200:
                    self.failures[f"{answer.status_code} {answer.text[:120]}"] += 1
                    continue
                self.answers[answer.headers["x-headrace-model-version"]] += 1
                self.fallbacks += "x-headrace-fallback" in answer.headers

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class World:
    """A running system seen by an admin, and one delivery in it."""

    def __init__(self, system: Stack, name: str) -> None:
        self.system = system
        self.name = name
        self.url = system.gateway_url
        self.key = system.addresses.admin_key

    @cached_property
    def client(self) -> Client:
        return Client(Connection(self.url, self.key))

    def close(self) -> None:
        self.client.close()

    @cached_property
    def holdout(self) -> DatasetVersion:
        """2,000 rows whose label depends on x0 and x1, with noise."""
        random = np.random.default_rng(7)
        x = random.normal(size=(2000, 2)).astype(np.float32)
        label = (x @ np.array(GOOD) + random.normal(scale=0.8, size=2000) > 0).astype(np.int64)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "holdout.parquet"
            parquet.write_table(pa.table({"x0": x[:, 0], "x1": x[:, 1], "label": label}), file)
            return push_dataset("e2e-holdout", file, holdout=True, client=self.client)

    @cached_property
    def training_data(self) -> DatasetVersion:
        """What runs of this world say that they were trained on."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.csv"
            file.write_text("x0,x1,label\n0.5,0.25,1\n-0.5,-0.25,0\n")
            return push_dataset("e2e-rows", file, client=self.client)

    def delivery(self, *, endpoint: str = "", approvals: int = 0) -> str:
        """The text of this test's delivery file."""
        return DELIVERY.format(
            name=self.name, endpoint=endpoint or self.name, dataset=self.holdout.name, version=self.holdout.version, approvals=approvals
        )

    def apply(self, text: str = "", **options: Any) -> dict[str, Any]:
        return self.client.post("/api/v1/deliveries/apply", {"yaml": text or self.delivery(**options)}, repeatable=True)

    def finish_run(self, model: bytes) -> str:
        """A run of this delivery's experiment that logs this model, as a script by hand would; returns its id."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            file.write_bytes(model)
            client = Client(Connection(self.url, self.key))
            with start_run(self.name, client=client) as run:
                run.log_params({"kind": "e2e"})
                run.log_metric("loss", 0.5)
                run.log_input(self.training_data.name, self.training_data.version)
                run.log_model(file, signature=SIGNATURE, samples=samples_of(model))
        return run.id

    def journey(self, run_id: str) -> dict[str, Any]:
        found = self.client.get(f"/api/v1/deliveries/{self.name}/journeys", run_id=run_id)["journeys"]
        return dict(found[0]) if found else {"state": "waiting"}

    def arrives(self, run_id: str, state: str, seconds: float = 90.0) -> dict[str, Any]:
        """Waits until a run's journey is in this state, and the registry knows; fails at once when it has ended in another."""
        ends = {"completed", "failed", "skipped", "rolled_back", "superseded", "rejected", "archived"}
        deadline = time.monotonic() + seconds
        while True:
            try:
                journey = self.journey(run_id)
            except HeadraceError as error:  # a service may be away for a moment
                journey = {"state": f"unknown: {error}"}
            if journey["state"] == state and journey.get("stage") in HEARD.get(state, (journey.get("stage"),)):
                return journey
            assert journey["state"] not in ends - {state}, f"it ended as {journey}"
            assert time.monotonic() < deadline, f"after {seconds:.0f} s it is {journey}"
            time.sleep(0.05)

    def versions(self) -> dict[int, dict[str, Any]]:
        return {v["ref"]["version"]: v for v in self.client.get(f"/api/v1/models/{self.name}/versions")["versions"]}

    def infer(self, body: bytes | None = None, *, key: str | None = None, endpoint: str = "") -> httpx.Response:
        headers = {"content-type": "application/json"} | ({} if key == "" else {"authorization": f"Bearer {key or self.key}"})
        return httpx.post(
            f"{self.url}/v2/models/{endpoint or self.name}/infer",
            content=body or request_body(),
            headers=headers,
            timeout=30,
            trust_env=False,
        )

    @contextmanager
    def calling(self, rate: float = 60.0, rows: Callable[[int], bytes] = lambda _: request_body()) -> Iterator[Callers]:
        with Callers(self.url, self.key, self.name, rate, rows) as callers:
            yield callers
