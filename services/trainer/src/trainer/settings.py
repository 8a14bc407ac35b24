"""The trainer's settings, read once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from artifacts.settings import PresigningSettings
from pydantic import Field, field_validator

from trainer.runner.egress import HTTPS, destination_of, destinations


class TrainerSettings(PresigningSettings):
    service_name: ClassVar[str] = "trainer"

    tracker_address: str = Field(default="127.0.0.1:7001", description="The tracker's gRPC address, `host:port`.")
    public_url: str = Field(default="http://127.0.0.1:8080", description="The gateway's URL, as training scripts reach it.")
    training_egress: str = Field(
        default="",
        description="What training scripts may reach besides the gateway and the object store: `host:port`, separated by commas. Names "
        "are compared as they are written, before they are resolved; an address in numbers allows that address alone.",
    )
    git_hosts: str = Field(
        default="",
        description="Servers that sources may be fetched from by git over https: `host` or `host:port`, separated by commas; empty: none.",
    )
    conversion_slots: int = Field(default=1, gt=0, description="Logged models that are converted to ONNX at once.")
    conversion_memory_bytes: int = Field(default=4 * 1024**3, gt=0, description="Resident memory of a conversion.")
    conversion_disk_bytes: int = Field(default=4 * 1024**3, gt=0, description="Space for files of a conversion.")
    conversion_timeout_s: int = Field(default=1_800, gt=0, description="Seconds that a conversion may take, without installing packages.")
    state_dir: Path = Field(
        default=Path(".headrace/trainer"),
        description="Folder of logs, running attempts and installed packages. One trainer at a time may use it.",
    )
    training_slots: int = Field(default=1, gt=0, description="Trainings that run at once.")
    default_memory_bytes: int = Field(default=4 * 1024**3, gt=0, description="Resident memory of a training that asks for none.")
    default_disk_bytes: int = Field(default=2 * 1024**3, gt=0, description="Space for files of a training that asks for none.")
    default_timeout_s: int = Field(default=3_600, gt=0, description="Seconds that a training may take that does not say.")
    max_memory_bytes: int = Field(default=0, ge=0, description="Most memory that a training may ask for; 0: any.")
    max_disk_bytes: int = Field(default=0, ge=0, description="Most space for files that a training may ask for; 0: any.")
    max_timeout_s: int = Field(default=0, ge=0, description="Longest time that a training may ask for, in seconds; 0: 30 days.")
    max_attempts: int = Field(default=1, ge=1, le=20, description="Times that a training's own code may be run when it fails.")
    max_source_bytes: int = Field(default=256 * 1024**2, gt=0, description="Size of a packed source folder; ten times as much unpacked.")
    max_log_bytes: int = Field(default=64 * 1024**2, gt=0, description="What one attempt may print; the rest is left out.")
    venv_dir: str = Field(
        default="", description="Where the environments of trainings are kept, one per lock file; empty: below the state folder."
    )
    max_venv_bytes: int = Field(
        default=30 * 1024**3,
        gt=0,
        description="Space for the environments that are kept. Above it those not used for longest are removed, never one in use.",
    )
    sandbox_visible: str = Field(
        default="", description="Folders that training scripts may read besides their own, separated by `:`, such as local data."
    )
    job_lease_s: float = Field(default=120, gt=0, description="Seconds after which a job whose trainer is not heard of is run elsewhere.")
    run_lease_s: int = Field(default=60, gt=0, description="Seconds after which the run of a dead attempt is marked failed.")

    @field_validator("training_egress")
    @classmethod
    def _names_destinations(cls, value: str) -> str:
        destinations(value)
        return value

    @field_validator("git_hosts")
    @classmethod
    def _names_servers(cls, value: str) -> str:
        destinations(value, HTTPS)
        return value

    @field_validator("public_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        destination_of(value)
        return value
