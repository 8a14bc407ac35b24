"""NVIDIA Triton as a runtime: models are pushed over gRPC, and nothing that Triton says about readiness is believed but an answer.

Triton keeps saying "ready" after a model's process has died, says OK to a load of other bytes under a loaded name and serves the old
ones, and does not list pushed models in its repository index. Hence: names are never used again, models are listed by statistics, and
ready is what has answered.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from servicekit.clock import Clock
from servicekit.errors import DeadlineExceeded, Unavailable
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from deployer.domain.signature import Rows, Signature, Tensor
from deployer.ports import LoadTooSlow, Refused, RuntimeLost

SECRET_METADATA = "triton-grpc-protocol-headrace-secret"  # noqa: S105 - a header's name
"""gRPC metadata whose value opens Triton's restricted interfaces (its --grpc-restricted-protocol)."""

Backend = Literal["python", "onnxruntime"]

_TYPES = {"BYTES": "TYPE_STRING"}
_POLL_S = 0.05
_log = logging.getLogger(__name__)


def configuration(model: str, signature: Signature, backend: Backend) -> str:
    """Triton's model configuration as JSON. Batching is left to the client: the first dimension is part of the shape."""
    return json.dumps(
        {
            "name": model,
            "backend": backend,
            "max_batch_size": 0,
            "input": [_tensor(tensor) for tensor in signature.inputs],
            "output": [_tensor(tensor) for tensor in signature.outputs],
            "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        }
    )


def _tensor(tensor: Tensor) -> dict[str, Any]:
    # The batch may have any length, whatever length the exporter wrote down.
    return {
        "name": tensor.name,
        "data_type": _TYPES.get(tensor.datatype, f"TYPE_{tensor.datatype}"),
        "dims": [-1, *tensor.shape[1:]],
    }


class TritonRuntime:
    """One Triton server. Connects at first use, and again by itself."""

    name = "triton"

    def __init__(
        self,
        grpc_address: str,
        http_address: str,
        secret: str,
        clock: Clock,
        *,
        backend: Backend = "python",
        load_timeout_s: float = 120.0,
        call_timeout_s: float = 10.0,
    ) -> None:
        """`backend`: `onnxruntime` in NVIDIA's images; `python`, with onnxruntime beside Triton, where it has only that."""
        self.upstream = http_address
        self._clock = clock
        self._backend: Backend = backend
        self._headers = {SECRET_METADATA: secret}
        self._load_timeout_s = load_timeout_s
        self._call_timeout_s = call_timeout_s
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._client = triton.InferenceServerClient(grpc_address, channel_args=options)

    async def load(self, model: str, content: bytes, signature: Signature) -> None:
        if model in await self.models():
            return
        files = {"file:1/model.onnx": content}
        if self._backend == "python":
            files["file:1/model.py"] = resources.files("deployer.adapters").joinpath("triton_shim.py").read_bytes()
        config = configuration(model, signature, self._backend)
        try:
            await self._client.load_model(model, self._headers, config, files, self._load_timeout_s)
        except InferenceServerException as error:
            translated = _translate(error, f"loading {model}")
            if isinstance(translated, Unavailable):
                raise RuntimeLost(f"the runtime went away while it loaded {model}: {translated.message}") from error
            if isinstance(translated, DeadlineExceeded):
                raise LoadTooSlow(f"the runtime has not loaded {model} within {self._load_timeout_s:g} s") from error
            raise translated from error
        _log.info("loaded %s, %d bytes", model, len(content))

    async def unload(self, model: str) -> None:
        if model not in await self.models():
            return
        try:
            await self._client.unload_model(model, self._headers, client_timeout=self._call_timeout_s)
        except InferenceServerException as error:
            raise _translate(error, f"unloading {model}") from error
        # Triton answers before the model is gone.
        deadline = self._clock.monotonic() + self._call_timeout_s
        while model in await self.models():
            if self._clock.monotonic() > deadline:
                raise DeadlineExceeded(f"{model} is still there {self._call_timeout_s:g} s after it was unloaded")
            await self._clock.sleep(_POLL_S)
        _log.info("unloaded %s", model)

    async def infer(self, model: str, inputs: Rows, signature: Signature) -> Rows:
        fed = [_input(tensor, inputs[tensor.name]) for tensor in signature.inputs]
        wanted = [triton.InferRequestedOutput(tensor.name) for tensor in signature.outputs]
        try:
            result = await self._client.infer(model, fed, outputs=wanted, client_timeout=self._call_timeout_s)
        except InferenceServerException as error:
            raise _translate(error, f"asking {model}") from error
        return {tensor.name: _rows(result.as_numpy(tensor.name)) for tensor in signature.outputs}

    async def models(self) -> frozenset[str]:
        try:
            statistics = await self._client.get_inference_statistics(headers=self._headers, client_timeout=self._call_timeout_s)
        except InferenceServerException as error:
            raise _translate(error, "listing models") from error
        return frozenset(entry.name for entry in statistics.model_stats)

    async def close(self) -> None:
        await self._client.close()


_NUMPY: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
    **{f"{sign}{bits}": np.dtype(sign.lower() + str(bits)) for sign in ("INT", "UINT") for bits in (8, 16, 32, 64)},
}


def _input(tensor: Tensor, rows: list[Any]) -> Any:
    try:
        values = np.array(rows, dtype=_NUMPY[tensor.datatype])
        values = values.reshape((len(rows), *tensor.shape[1:]))
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(f"the sample rows of {tensor.name} are not {tensor.datatype} of shape {list(tensor.shape)}: {error}") from error
    fed = triton.InferInput(tensor.name, list(values.shape), np_to_triton_dtype(values.dtype))
    fed.set_data_from_numpy(values)
    return fed


def _rows(values: Any) -> list[Any]:
    if values is None:
        return []
    if values.dtype == object:
        values = np.array([item.decode() for item in values.ravel()], dtype=object).reshape(values.shape)
    rows: list[Any] = values.tolist()
    return rows


def _translate(error: InferenceServerException, doing: str) -> Refused | Unavailable | DeadlineExceeded:
    """Triton's errors in our terms: away, too late, or a refusal with its own words."""
    status = error.status()
    message = _first_sentence(error.message() or status)
    if status == str(grpc.StatusCode.DEADLINE_EXCEEDED):
        return DeadlineExceeded(f"{doing}: {message}")
    if status in (str(grpc.StatusCode.UNAVAILABLE), str(grpc.StatusCode.CANCELLED)) and not _is_triton(message):
        return Unavailable(f"{doing}: {message}")
    return Refused(message)


def _is_triton(message: str) -> bool:
    """Triton itself answers UNAVAILABLE for a model that it does not have, whose process died, or that our secret does not open."""
    return any(word in message.lower() for word in ("model", "stub", "restricted"))


def _first_sentence(message: str) -> str:
    """Triton's message without the Python stack that its python backend appends."""
    return message.split("\n\nAt:", 1)[0].strip()
