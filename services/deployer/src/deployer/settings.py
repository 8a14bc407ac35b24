"""The deployer's settings, read once."""

from __future__ import annotations

from typing import ClassVar, Literal

from artifacts.settings import S3Settings
from pydantic import Field, SecretStr


class DeployerSettings(S3Settings):
    service_name: ClassVar[str] = "deployer"

    triton_grpc: str = Field(default="127.0.0.1:8001", description="Triton's gRPC address, `host:port`, for loading models.")
    triton_http: str = Field(
        default="127.0.0.1:8000", description="Triton's HTTP address, `host:port`, as gateways reach it; it stands in routes."
    )
    triton_secret: SecretStr = Field(default=SecretStr(""), description="Secret that opens Triton's model control.")
    triton_backend: Literal["python", "onnxruntime"] = Field(
        default="python",
        description="How Triton runs ONNX: by its own backend `onnxruntime` (NVIDIA's images), or by `python` with onnxruntime beside it.",
    )
    load_timeout_s: float = Field(default=120, gt=0, description="Seconds that a runtime gets to load a model.")
    load_concurrency: int = Field(default=2, ge=1, description="Versions that are brought up at once.")
    max_model_bytes: int = Field(default=1024**3, gt=0, description="Largest model file that is loaded; it is held in memory meanwhile.")
    reconcile_s: float = Field(
        default=2, gt=0, description="Seconds between two comparisons of what runtimes have loaded with what they should."
    )
