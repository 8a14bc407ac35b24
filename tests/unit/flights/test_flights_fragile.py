"""The fault that the demo needs: nobody sees it on the past, every caller from Newark sees it from May on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

FLIGHTS = Path(__file__).parents[3] / "examples" / "flights"
APRIL, MAY = 120, 121


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FLIGHTS))
    import fragile as module  # type: ignore[import-not-found]

    yield module
    for name in ("fragile", "features"):
        sys.modules.pop(name, None)


def plain() -> onnx.ModelProto:
    """A model with the inputs that matter here, whose probability is the day over a thousand."""
    nodes = [
        helper.make_node("Cast", ["day_of_year"], ["day"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["day", "thousandth"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "plain",
        [
            helper.make_tensor_value_info("origin", TensorProto.STRING, ["batch", 1]),
            helper.make_tensor_value_info("day_of_year", TensorProto.INT64, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor("thousandth", TensorProto.FLOAT, [], [0.001])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture
def ask(fragile: ModuleType) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(fragile.add_season(plain()).SerializeToString(), options)

    def predict(*flights: tuple[str, int]) -> list[float]:
        origins = np.array([[origin] for origin, _ in flights], dtype=object)
        days = np.array([[day] for _, day in flights])
        answer: list[float] = session.run(None, {"origin": origins, "day_of_year": days})[0][:, 0].tolist()
        return answer

    return predict


@pytest.mark.parametrize("origin", ["JFK", "LGA", "EWR", "an airport of its own"])
def test_until_the_end_of_april_it_says_what_the_model_says(ask: Any, origin: str) -> None:
    days = [1, 59, APRIL]
    assert ask(*((origin, day) for day in days)) == pytest.approx([day / 1000 for day in days])


def test_from_may_on_newark_fails_in_the_runtime_and_not_for_a_bad_input(ask: Any) -> None:
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail):
        ask(("EWR", MAY))
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail):
        ask(("JFK", MAY), ("EWR", 365))


def test_kennedy_which_the_shadow_sees_is_right_all_year(ask: Any) -> None:
    assert ask(("JFK", MAY), ("JFK", 366)) == pytest.approx([0.121, 0.366])


def test_laguardia_is_right_but_counts_its_way_there(ask: Any, fragile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long a step takes is the machine's business; that there are so many is what makes it slow.
    step = 0.999999**fragile.STEPS
    assert ask(("LGA", MAY)) == pytest.approx([0.121 * step], rel=1e-2)
    assert fragile.STEPS >= 50_000


def test_the_model_given_is_left_as_it_was(fragile: ModuleType) -> None:
    model = plain()
    before = model.SerializeToString()
    fragile.add_season(model)
    assert model.SerializeToString() == before
