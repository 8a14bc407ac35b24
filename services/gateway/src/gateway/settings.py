"""The gateway's settings, read once."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, SecretStr, field_validator
from servicekit.settings import ServiceSettings, split_address

from gateway.browser import Hosts


class GatewaySettings(ServiceSettings):
    service_name: ClassVar[str] = "gateway"

    gateway_address: str = Field(
        default="127.0.0.1:8080", description="Where callers are served: /v2 and /api/v1; port 0 takes a free one."
    )
    gateway_processes: int = Field(default=1, ge=1, le=256, description="Processes that share the address, each with a loop of its own.")
    gateway_index: int = Field(
        default=-1, ge=-1, description="Which of the processes this one is; set by the first. -1: the first, or the only one."
    )
    gateway_instance: str = Field(default="", description="Stable name of this gateway in traffic windows; empty: host name and port.")
    state_dir: str = Field(default=".headrace/gateway", description="Where the last routes and keys are kept for the next start.")
    triton_http: str = Field(
        default="127.0.0.1:8000", description="The runtimes that routes may name, `host:port` of Triton's HTTP, separated by commas."
    )
    max_body_bytes: int = Field(default=8 * 1024 * 1024, gt=0, description="Largest request body.")
    max_upload_bytes: int = Field(
        default=5 * 1024**4, gt=0, description="Largest artifact that is uploaded through the gateway, with a key or run token."
    )
    max_head_bytes: int = Field(default=32 * 1024, ge=1024, description="Largest request line and headers together.")
    head_timeout_s: float = Field(default=10, gt=0, description="Seconds that a client has to send a request's headers.")
    body_timeout_s: float = Field(
        default=30, gt=0, description="Seconds that a client has to send a request's body; of an artifact's: that it may be silent for."
    )
    keep_alive_s: float = Field(default=75, gt=0, description="Seconds that an idle client connection is kept.")
    max_connections: int = Field(default=4096, gt=0, description="Client connections per process.")
    newcomers_share: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Share of the connections that one client address (IPv6: /64) may hold without having sent a whole request with a valid"
        " key; its oldest such one goes for a new one. 1 behind a proxy, which has one address for all.",
    )
    arm_in_flight: int = Field(default=256, gt=0, description="Requests in flight per arm and process; more are refused, or fall back.")
    shadow_in_flight: int = Field(default=16, gt=0, description="Shadow copies in flight per process.")
    shadow_waiting: int = Field(default=256, ge=0, description="Shadow copies that may wait per process; more are dropped and counted.")
    run_token_secret: SecretStr = Field(
        default=SecretStr(""), description="Verifies run tokens; the same as the tracker's, which signs them. Empty: none is accepted."
    )
    tracker_address: str = Field(default="127.0.0.1:7001", description="The tracker's gRPC address.")
    tracker_http: str = Field(default="127.0.0.1:8091", description="The tracker's HTTP address: MLflow's API on runs is passed to it.")
    registry_http: str = Field(default="127.0.0.1:8092", description="The registry's HTTP address: MLflow's API on models is passed to it.")
    public_urls: str = Field(
        default="",
        description="Where people reach the gateway by a name, `https://headrace.example.org`, separated by commas. Browsers may use these,"
        " IP addresses and localhost; with https, sessions are kept for https only.",
    )
    session_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Signs the sessions of browsers; the same on all gateways. Empty: derived from the service token.",
    )
    session_ttl_s: int = Field(default=12 * 3600, gt=0, description="Seconds after which a browser has to sign in again.")
    mlflow_page: str = Field(
        default="",
        description="Folder of MLflow's own page, `mlflow/server/js/build` of its wheel; empty: that of the installed package, if it is.",
    )
    trainer_address: str = Field(default="127.0.0.1:7003", description="The trainer's gRPC address.")
    evaluator_address: str = Field(default="127.0.0.1:7004", description="The evaluator's gRPC address.")
    registry_address: str = Field(default="127.0.0.1:7002", description="The registry's gRPC address.")
    deployer_address: str = Field(default="127.0.0.1:7005", description="The deployer's gRPC address.")
    traces_url: str = Field(default="", description="Base URL of the local stack's span receiver; empty: traces cannot be looked up here.")
    traces_secret: SecretStr = Field(default=SecretStr(""), description="What the span receiver asks of its readers.")

    @field_validator("gateway_address")
    @classmethod
    def _is_listener(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("public_urls")
    @classmethod
    def _are_public(cls, value: str) -> str:
        Hosts(value)
        return value

    @field_validator("triton_http")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        for address in value.split(","):
            split_address(address.strip())
        return value

    @property
    def upstreams(self) -> frozenset[str]:
        """The runtimes that routes may name."""
        return frozenset(address.strip() for address in self.triton_http.split(","))
