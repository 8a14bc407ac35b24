"""Where a service finds the object store, as settings: a service that uses it subclasses these in place of ServiceSettings."""

from __future__ import annotations

from pydantic import Field, SecretStr
from servicekit.settings import ServiceSettings

from artifacts.port import S3Location


class S3Settings(ServiceSettings):
    """For a service that reads and writes objects."""

    s3_endpoint: str = Field(default="127.0.0.1:9000", description="The object store as this service reaches it, `host:port`.")
    s3_access_key: str = Field(default="", description="Access key of the object store.")
    s3_secret_key: SecretStr = Field(default=SecretStr(""), description="Secret key of the object store.")
    s3_bucket: str = Field(default="headrace", description="Bucket of all artifacts.")
    s3_secure: bool = Field(default=False, description="Whether the object store is reached by TLS.")

    @property
    def s3(self) -> S3Location:
        """The object store as `artifacts.s3` takes it."""
        return S3Location(
            endpoint=self.s3_endpoint,
            access_key=self.s3_access_key,
            secret_key=self.s3_secret_key.get_secret_value(),
            bucket=self.s3_bucket,
            secure=self.s3_secure,
            public_endpoint=self._public_endpoint(),
        )

    def _public_endpoint(self) -> str | None:
        return None


class PresigningSettings(S3Settings):
    """For a service that also hands out presigned URLs."""

    s3_public_endpoint: str = Field(
        default="", description="The object store as clients reach it, `host:port`, in presigned URLs; empty: the same."
    )

    def _public_endpoint(self) -> str | None:
        return self.s3_public_endpoint or None
