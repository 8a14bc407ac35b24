"""The tracker's settings, read once."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, SecretStr
from servicekit.settings import ServiceSettings


class TrackerSettings(ServiceSettings):
    service_name: ClassVar[str] = "tracker"

    s3_endpoint: str = Field(default="127.0.0.1:9000", description="The object store as this service reaches it, `host:port`.")
    s3_public_endpoint: str = Field(
        default="", description="The object store as clients reach it, `host:port`, in presigned URLs; empty: the same."
    )
    s3_access_key: str = Field(default="", description="Access key of the object store.")
    s3_secret_key: SecretStr = Field(default=SecretStr(""), description="Secret key of the object store.")
    s3_bucket: str = Field(default="headrace", description="Bucket of all artifacts.")
    s3_secure: bool = Field(default=False, description="Whether the object store is reached by TLS.")
    run_token_secret: SecretStr = Field(min_length=16, description="Signs run tokens; the same as the gateway's, which verifies them.")
    run_token_ttl_s: int = Field(default=7 * 86_400, gt=0, description="Seconds that a run token is good for.")
    lease_check_s: float = Field(default=1.0, gt=0, description="Seconds between two looks for runs whose lease is over.")
    lease_grace_s: float = Field(
        default=30,
        ge=0,
        description="Seconds for holders to renew after a start, or after the database was away, before leases are looked at.",
    )
    download_url_ttl_s: int = Field(default=3_600, gt=0, le=7 * 86_400, description="Seconds that a presigned download URL is good for.")
