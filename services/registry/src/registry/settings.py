"""The registry's settings."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, SecretStr, model_validator
from servicekit.settings import ServiceSettings


class RegistrySettings(ServiceSettings):
    """The shared settings and the registry's own."""

    service_name: ClassVar[str] = "registry"

    trainer_address: str = Field(default="127.0.0.1:7003", description="gRPC address of the trainer, which validates `train` sections.")
    evaluator_address: str = Field(
        default="127.0.0.1:7004", description="gRPC address of the evaluator, which validates `evaluate` sections."
    )
    deployer_address: str = Field(default="127.0.0.1:7005", description="gRPC address of the deployer, which validates `serve` sections.")
    bootstrap_admin_key_hash: str = Field(
        default="",
        repr=False,
        description="The first admin key, as `<key id>:<sha256 of its text in hex>`: stored at start when no key has this id. Empty: none.",
    )
    webhook_url: str = Field(
        default="", description="Where approvers are told that they are awaited (http or https). Empty: nobody is told."
    )
    webhook_secret: SecretStr = Field(default=SecretStr(""), description="The key that signs webhooks; required with a URL.")
    webhook_allow_private: bool = Field(default=False, description="Whether webhooks may go to private, loopback and link-local addresses.")

    @model_validator(mode="after")
    def _signs_webhooks(self) -> RegistrySettings:
        if self.webhook_url and not self.webhook_url.startswith(("http://", "https://")):
            raise ValueError("HEADRACE_WEBHOOK_URL must begin with http:// or https://")
        if self.webhook_url and len(self.webhook_secret.get_secret_value()) < 16:
            raise ValueError("HEADRACE_WEBHOOK_SECRET needs 16 characters or more when HEADRACE_WEBHOOK_URL is set")
        return self
