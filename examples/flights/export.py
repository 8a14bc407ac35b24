"""Writes a trained network as one ONNX file that takes raw columns: a front that turns strings into codes, and the network behind it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import pyarrow as pa
import torch
from features import CATEGORIES, COLUMNS, OUTPUT
from model import encode
from onnx import TensorProto, compose, helper
from torch import nn

OPSET = 20
ML_OPSET = 4
"""ai.onnx.ml: the version whose LabelEncoder takes strings as tensors."""


def build(network: nn.Module, vocabulary: dict[str, list[str]], rows: pa.Table) -> onnx.ModelProto:
    """The whole model: inputs features.COLUMNS, each [batch, 1], output `probability` [batch, 1], all weights inside.

    `rows` are two or more rows to trace the network with; their values do not matter.
    """
    body = _network(network, rows)
    codes = {column: f"{column}_code" for column in CATEGORIES}
    body = compose.add_prefix(body, "network/", rename_inputs=False, rename_outputs=False)
    merged = compose.merge_models(_front(vocabulary, body.ir_version), body, io_map=[(codes[c], codes[c]) for c in CATEGORIES])
    inputs = {value.name: value for value in merged.graph.input}
    del merged.graph.input[:]
    merged.graph.input.extend(inputs[column] for column in COLUMNS)
    merged.graph.name = "flights"
    merged.producer_name = "flights"
    onnx.checker.check_model(merged, full_check=True)
    return merged


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes it as one file, without weights beside it."""
    onnx.save_model(model, path, save_as_external_data=False)


def _network(network: nn.Module, rows: pa.Table) -> onnx.ModelProto:
    arguments = [column[:2] for column in encode(rows, {column: [] for column in CATEGORIES})]
    batch = torch.export.Dim("batch", min=1)
    names = [f"{column}_code" if column in CATEGORIES else column for column in COLUMNS]
    # The exporter logs which packages it does not need, and warns of its own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            tuple(arguments),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=names,
            output_names=[OUTPUT],
            dynamic_shapes={"columns": tuple({0: batch} for _ in arguments)},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter writes where in the source each node comes from: paths of this machine that no one else can use.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in model.graph.value_info:
        del value.metadata_props[:]
    return model


def _front(vocabulary: dict[str, list[str]], ir_version: int) -> onnx.ModelProto:
    nodes, inputs, outputs = [], [], []
    for column in CATEGORIES:
        values = vocabulary[column]
        nodes.append(
            helper.make_node(
                "LabelEncoder",
                [column],
                [f"{column}_code"],
                name=f"encode_{column}",
                domain="ai.onnx.ml",
                keys_strings=values,
                values_int64s=list(range(1, len(values) + 1)),
                default_int64=0,
            )
        )
        inputs.append(helper.make_tensor_value_info(column, TensorProto.STRING, ["batch", 1]))
        outputs.append(helper.make_tensor_value_info(f"{column}_code", TensorProto.INT64, ["batch", 1]))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    return helper.make_model(helper.make_graph(nodes, "front", inputs, outputs), opset_imports=opsets, ir_version=ir_version)
