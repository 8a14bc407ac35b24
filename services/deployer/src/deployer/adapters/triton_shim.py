"""Pushed to Triton beside model.onnx as model.py, where Triton has only its python backend: runs the model with onnxruntime."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # exists only inside Triton
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument


class TritonPythonModel:
    """The class that Triton looks for: one instance per loaded model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: entry.type == "tensor(string)" for entry in self.session.get_inputs()}

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        names = request.requested_output_names()
        try:
            feed = {name: self.read(request, name, is_text) for name, is_text in self.inputs.items()}
            values = self.session.run(names, feed)
        except (InvalidArgument, UnicodeDecodeError) as error:  # the tensors are not what the model takes: the caller's fault
            return refusal(error, pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # the model failed on tensors that it takes; the next request is served all the same
            return refusal(error, pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, encoded(value)) for name, value in zip(names, values, strict=True)])

    def read(self, request: Any, name: str, is_text: bool) -> Any:
        value = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        if not is_text:
            return value
        return np.array([item.decode() for item in value.ravel()], dtype=object).reshape(value.shape)


def refusal(error: Exception, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def encoded(value: Any) -> Any:
    """Texts as bytes; everything else as it is."""
    if value.dtype != object:
        return value
    return np.array([str(item).encode() for item in value.ravel()], dtype=object).reshape(value.shape)
