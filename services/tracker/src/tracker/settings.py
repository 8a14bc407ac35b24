"""The tracker's settings, read once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from artifacts.settings import PresigningSettings
from pydantic import Field, SecretStr


class TrackerSettings(PresigningSettings):
    service_name: ClassVar[str] = "tracker"

    run_token_secret: SecretStr = Field(min_length=16, description="Signs run tokens; the same as the gateway's, which verifies them.")
    run_token_ttl_s: int = Field(default=7 * 86_400, gt=0, description="Seconds that a run token is good for.")
    lease_check_s: float = Field(default=1.0, gt=0, description="Seconds between two looks for runs whose lease is over.")
    lease_grace_s: float = Field(
        default=30,
        ge=0,
        description="Seconds for holders to renew after a start, or after the database was away, before leases are looked at.",
    )
    search_timeout_s: float = Field(default=10, gt=0, le=25, description="Seconds that a statement of a search may take.")
    extended_filters: bool = Field(
        default=False, description="Whether filters may hold OR, NOT and parentheses without the header X-Headrace-Filter: extended."
    )
    state_dir: Path = Field(
        default=Path(".headrace/tracker"), description="Folder in which models lie that are looked at for a while. Processes may share it."
    )
    download_url_ttl_s: int = Field(default=3_600, gt=0, le=7 * 86_400, description="Seconds that a presigned download URL is good for.")
