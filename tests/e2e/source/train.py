"""A user's training script, as small as one can be: a logistic regression on two inputs, exported and logged.

With `--wait` it first waits for a signal, so that a test can act in the middle.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import headrace
import numpy as np
import onnx
from onnx import TensorProto, helper

INPUTS = ("x0", "x1")


def wait() -> None:
    """Until it is sent SIGUSR1, for which it is ready once it has said so."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    print(f"run {os.environ['HEADRACE_RUN_ID']} waits", flush=True)
    signal.sigwait({signal.SIGUSR1})


def train(run: headrace.Run) -> np.ndarray:
    """The weights, by gradient descent on rows whose label depends on both inputs, with noise."""
    random = np.random.default_rng(int(os.environ["HEADRACE_SEED"]))
    x = random.normal(size=(4000, 2))
    label = x @ [1.0, 0.5] + random.normal(scale=0.8, size=4000) > 0
    weights = np.zeros(2)
    for epoch in range(60):
        chance = 1 / (1 + np.exp(-x @ weights))
        run.log_metric("loss", float(-np.mean(np.log(np.where(label, chance, 1 - chance)))), epoch)
        weights -= x.T @ (chance - label) / len(x)
    return weights


def export(weights: np.ndarray) -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("Concat", list(INPUTS), ["x"], axis=1),
            helper.make_node("MatMul", ["x", "weights"], ["score"]),
            helper.make_node("Sigmoid", ["score"], ["probability"]),
        ],
        "trained",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in INPUTS],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor("weights", TensorProto.FLOAT, [2, 1], weights.tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def main() -> None:
    if "--wait" in sys.argv:
        wait()
    with headrace.start_run() as run, tempfile.TemporaryDirectory() as folder:
        weights = train(run)
        rows = np.linspace(-2, 2, 8)
        expected = 1 / (1 + np.exp(-np.stack([rows, -rows], axis=1) @ weights))
        file = Path(folder) / "model.onnx"
        file.write_bytes(export(weights))
        columns = [[[float(value)] for value in values] for values in (rows, -rows, expected)]
        tensor = {"datatype": "FP32", "shape": [-1, 1]}
        run.log_model(
            file,
            signature={"inputs": [{"name": name, **tensor} for name in INPUTS], "outputs": [{"name": "probability", **tensor}]},
            samples={"inputs": dict(zip(INPUTS, columns[:2], strict=True)), "outputs": {"probability": columns[2]}},
        )


if __name__ == "__main__":
    main()
