"""The settings that every service has, read once from the environment, and the table that documents them."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, SecretStr, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "HEADRACE_"
"""Every setting `x` is read from the environment variable `HEADRACE_X`."""


class ServiceSettings(BaseSettings):
    """The shared settings. A service subclasses it, sets `service_name` and adds its own fields, each with a description."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True)

    service_name: ClassVar[str] = ""

    database_url: str = Field(
        default="",
        repr=False,
        description="The service's own database and role: `postgresql+asyncpg://role:password@host:port/database`.",
    )
    kafka_bootstrap: str = Field(default="127.0.0.1:9092", description="Kafka brokers, `host:port`, several separated by commas.")
    topic_prefix: str = Field(default="", description="Put before every topic name, so that several systems can share a Kafka.")
    grpc_address: str = Field(default="127.0.0.1:0", description="Where the gRPC server listens; port 0 takes a free one.")
    http_address: str = Field(default="127.0.0.1:0", description="Where `/healthz` and `/readyz` are served; port 0 takes a free one.")
    grpc_max_message_bytes: int = Field(default=16 * 1024 * 1024, gt=0, description="Largest gRPC message that is sent or received.")
    otlp_endpoint: str = Field(default="", description="Base URL of an OTLP/HTTP collector for traces and metrics; empty: none are sent.")
    trace_sample_ratio: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of traces that are recorded, decided before a trace begins; errors always are.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Least severe level that is logged.")
    service_token: SecretStr = Field(
        default=SecretStr(""), description="This service's own token, `<name>.<secret>`, which it sends to the services it calls."
    )
    service_token_hashes: str = Field(
        default="",
        repr=False,
        description="The services that may call: `<name>=<sha256 of the whole token in hex>`, separated by commas. Empty: nobody may.",
    )
    shutdown_grace_s: float = Field(default=10, gt=0, description="Seconds that running work gets to end after SIGTERM.")

    @field_validator("grpc_address", "http_address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("service_token")
    @classmethod
    def _is_token(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        name, dot, secret = text.partition(".")
        if text and not (name and dot and secret):
            raise ValueError("a service token is written <name>.<secret>")
        return value

    @field_validator("service_token_hashes")
    @classmethod
    def _are_hashes(cls, value: str) -> str:
        parse_token_hashes(value)
        return value


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def load(cls: type[SettingsT]) -> SettingsT:
    """Reads the settings from the environment, and those not found there from files of the same (lower-case) name in HEADRACE_SECRETS_DIR.

    Raises pydantic.ValidationError, which names the fields but never the values given.
    """
    options: dict[str, Any] = {"_secrets_dir": os.environ.get(f"{PREFIX}SECRETS_DIR") or None}
    return cls(**options)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port); an IPv6 host stands in brackets, which are taken off. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("an address is written host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_token_hashes(text: str) -> dict[str, str]:
    """`name=<sha256 hex>,...` -> {name: hash}. Raises ValueError."""
    hashes: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, digest = entry.partition("=")
        if not name or not equals or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise ValueError("token hashes are written name=<64 hex digits>, separated by commas")
        if name in hashes:
            raise ValueError(f"two token hashes for {name}")
        hashes[name] = digest.lower()
    return hashes


def markdown(cls: type[ServiceSettings]) -> str:
    """The documented table of all settings of a class: variable, type, default, description. Reads no environment."""
    lines = ["| variable | type | default | description |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{PREFIX}{name.upper()}` | {_type_name(field)} | {_default(field)} | {description} |")
    return "\n".join(lines) + "\n"


def _type_name(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if annotation is SecretStr:
        return "secret"
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return ""
    value = default.get_secret_value() if isinstance(default, SecretStr) else default
    return f"`{value}`" if value != "" else ""
