"""Pushed to Triton beside model.onnx as model.py, where Triton has only its python backend: runs the model with onnxruntime."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # exists only inside Triton


class TritonPythonModel:
    """The class that Triton looks for: one instance per loaded model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        entries = self.session.get_inputs()
        self.inputs = {entry.name: entry.type == "tensor(string)" for entry in entries}
        # The first dimension is the batch where its length is open.
        self.batched = [entry.name for entry in entries if entry.shape and not isinstance(entry.shape[0], int)]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        names = request.requested_output_names()
        # Triton has checked names, types and shapes. What is left for the caller to get wrong:
        try:
            feed = {name: self.read(request, name, is_text) for name, is_text in self.inputs.items()}
        except UnicodeDecodeError as error:
            return refusal(f"a text is not UTF-8: {error}", pb_utils.TritonError.INVALID_ARG)
        rows = {name: len(feed[name]) for name in self.batched}
        if len(set(rows.values())) > 1:
            return refusal(f"the inputs have different numbers of rows: {rows}", pb_utils.TritonError.INVALID_ARG)
        try:
            values = self.session.run(names, feed)
        except Exception as error:  # the model fails on tensors that it takes; the next request is served all the same
            return refusal(str(error), pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, encoded(value)) for name, value in zip(names, values, strict=True)])

    def read(self, request: Any, name: str, is_text: bool) -> Any:
        value = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        if not is_text:
            return value
        return np.array([item.decode() for item in value.ravel()], dtype=object).reshape(value.shape)


def refusal(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def encoded(value: Any) -> Any:
    """Texts as bytes; everything else as it is."""
    if value.dtype != object:
        return value
    return np.array([str(item).encode() for item in value.ravel()], dtype=object).reshape(value.shape)
