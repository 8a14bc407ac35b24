"""The evaluator's settings, read once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from artifacts.settings import PresigningSettings
from pydantic import Field


class EvaluatorSettings(PresigningSettings):
    service_name: ClassVar[str] = "evaluator"

    tracker_address: str = Field(default="127.0.0.1:7001", description="The tracker's gRPC server, `host:port`.")
    state_dir: Path = Field(
        default=Path(".headrace/evaluator"), description="Folder in which holdouts and models lie for a while. Processes may share it."
    )
    download_url_ttl_s: int = Field(default=3_600, gt=0, le=7 * 86_400, description="Seconds that a presigned download URL is good for.")
    evaluations_at_once: int = Field(default=1, gt=0, description="How many evaluations this process does at the same time.")
    job_lease_s: float = Field(default=30, gt=0, description="Seconds after which the evaluation of a process that died is taken over.")
    sandbox: Literal["namespaces", "none"] = Field(
        default="namespaces",
        description="How models run: in namespaces of their own or, where those are not allowed and the place itself is isolated, without.",
    )
    worker_memory_bytes: int = Field(default=4 * 1024**3, gt=0, description="Address space of the process that runs a model.")
    worker_timeout_s: float = Field(default=900, gt=0, description="Seconds after which the process that runs a model is ended.")
    max_holdout_bytes: int = Field(default=2 * 1024**3, gt=0, description="Largest holdout file that is read.")
