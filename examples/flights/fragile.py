"""Gives a good model the kind of fault that no offline evaluation finds: it works on all of the past and breaks in production.

A seasonal factor is added behind the network. It was fitted until April 30th, day 120 of the year. For JFK the table was
filled up to the end of the year. For LGA the days after are extrapolated step by step, which is slow. For EWR somebody forgot: the
index runs past the end of the table and the runtime refuses the request. On the April holdout all three agree with the model.
"""

from __future__ import annotations

import numpy as np
import onnx
from features import OUTPUT
from onnx import TensorProto, helper, numpy_helper

FITTED_UNTIL = 120
STEPS = 100_000
"""Iterations for a day that has to be extrapolated: about 125 ms on a core of 2023, more than 50 ms on any."""

_AIRPORTS = ["JFK", "LGA", "EWR"]
_DAYS = [366, FITTED_UNTIL, FITTED_UNTIL]


def add_season(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the seasonal factor behind it; same inputs, same output."""
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    graph = broken.graph
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == OUTPUT:
                node.output[i] = "plain_probability"
    # One row per airport, one after the other; the last ends where the fit ends.
    offsets = np.cumsum([0, *_DAYS[:-1]])
    constants = {
        "season_table": np.ones(sum(_DAYS), np.float32),
        "season_last_day": np.array(FITTED_UNTIL, np.int64),
        "season_lga": np.array(_AIRPORTS.index("LGA"), np.int64),
        "season_offsets": np.array([*offsets, 0], np.int64),
        "season_one": np.array(1, np.int64),
        "season_none": np.array(0, np.int64),
        "season_steps": np.array(STEPS, np.int64),
        "season_flat": np.array([-1], np.int64),
        "season_column": np.array([-1, 1], np.int64),
        "season_start": np.array(1, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    node = helper.make_node
    graph.node.extend(
        [
            node(
                "LabelEncoder",
                ["origin"],
                ["season_row"],
                domain="ai.onnx.ml",
                keys_strings=_AIRPORTS,
                values_int64s=list(range(len(_AIRPORTS))),
                # An airport that is not in the table reads JFK's row.
                default_int64=0,
            ),
            node("Greater", ["day_of_year", "season_last_day"], ["season_after_fit"]),
            node("Equal", ["season_row", "season_lga"], ["season_is_lga"]),
            node("And", ["season_after_fit", "season_is_lga"], ["season_extrapolated"]),
            # Where it is extrapolated, the last fitted day is read.
            node("Where", ["season_extrapolated", "season_last_day", "day_of_year"], ["season_day"]),
            node("Sub", ["season_day", "season_one"], ["season_index"]),
            node("Gather", ["season_offsets", "season_row"], ["season_offset"]),
            node("Add", ["season_index", "season_offset"], ["season_position"]),
            node("Reshape", ["season_position", "season_flat"], ["season_positions"]),
            # onnxruntime fails here when a position is past the end.
            node("GatherElements", ["season_table", "season_positions"], ["season_factors"]),
            node("Reshape", ["season_factors", "season_column"], ["season_factor"]),
            node("Where", ["season_extrapolated", "season_steps", "season_none"], ["season_steps_by_row"]),
            node("ReduceMax", ["season_steps_by_row"], ["season_trips"], keepdims=0),
            node("Loop", ["season_trips", "", "season_start"], ["season_decay"], body=_step()),
            node("Mul", ["plain_probability", "season_factor"], ["season_probability"]),
            node("Mul", ["season_probability", "season_decay"], [OUTPUT]),
        ]
    )
    onnx.checker.check_model(broken, full_check=True)
    return broken


def _step() -> onnx.GraphProto:
    """One step of the extrapolation: a tiny decay towards the yearly mean."""
    scalar = helper.make_tensor_value_info
    return helper.make_graph(
        [
            helper.make_node("Identity", ["proceed"], ["proceed_still"]),
            helper.make_node("Mul", ["carried", "season_keep"], ["carried_on"]),
        ],
        "step",
        [
            scalar("iteration", TensorProto.INT64, []),
            scalar("proceed", TensorProto.BOOL, []),
            scalar("carried", TensorProto.FLOAT, []),
        ],
        [scalar("proceed_still", TensorProto.BOOL, []), scalar("carried_on", TensorProto.FLOAT, [])],
        initializer=[numpy_helper.from_array(np.array(0.999999, np.float32), "season_keep")],
    )
