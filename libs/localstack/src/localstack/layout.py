"""What one stack consists of: its folder, its ports and secrets, and the servers made from them."""

from __future__ import annotations

import json
import secrets as random_secrets
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localstack import process, schemas
from localstack.errors import StackError
from localstack.kafka import Kafka
from localstack.ports import LOOPBACK, Ports
from localstack.postgres import Postgres
from localstack.receiver import OtlpReceiver
from localstack.seaweed import PORTS as SEAWEED_PORTS
from localstack.seaweed import Seaweed, usable
from localstack.secretbox import Secrets
from localstack.server import Server
from localstack.services import SERVICES, Addresses, ServiceProcess, environment
from localstack.triton import Triton

BUCKET = "headrace"

# Wanted ports, taken when free; all below the range of outgoing connections.
_POSTGRES, _KAFKA, _KAFKA_CONTROLLER, _S3, _TRITON_HTTP, _TRITON_GRPC, _TRITON_METRICS, _OTLP = (
    15432,
    19092,
    19093,
    18333,
    18000,
    18001,
    18002,
    14318,
)
_SERVICE_GRPC, _SERVICE_HTTP = 17000, 17100
GATEWAY_PORT = 8080
"""Where a stack's gateway listens when nothing else does."""


@dataclass(frozen=True)
class Paths:
    """The files of one stack."""

    state: Path

    @property
    def stack(self) -> Path:
        """What runs where, for everyone who may read the folder; no secret is in it."""
        return self.state / "stack.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as it lives."""
        return self.state / "supervisor.lock"

    @property
    def order(self) -> Path:
        """Held while somebody starts or stops the stack."""
        return self.state / "order.lock"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    @property
    def supervisor_log(self) -> Path:
        return self.log("supervisor")

    @property
    def settings(self) -> Path:
        """Optional: extra environment variables, in tables named like a service, or [all]."""
        return self.state / "settings.toml"

    def mark(self) -> str:
        """The id by which this stack's processes are recognised, made on first use."""
        file = self.state / "stack-id"
        if not file.exists():
            self.state.mkdir(parents=True, exist_ok=True)
            file.write_text(random_secrets.token_hex(8) + "\n")
        return file.read_text().strip()

    def read(self) -> dict[str, Any]:
        """What `stack.json` says; empty when there is none."""
        try:
            content: dict[str, Any] = json.loads(self.stack.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return content

    def recorded(self) -> list[process.ProcessId]:
        """The processes that the parts had when the listing was last written, whether they run or not."""
        return [process.ProcessId(part["pid"], part["started"]) for part in self.read().get("parts", []) if part["pid"]]

    def supervisor(self) -> process.ProcessId | None:
        """The supervisor that runs now, if one does."""
        recorded = self.read().get("supervisor")
        if not recorded:
            return None
        identity = process.ProcessId(recorded["pid"], recorded["started"])
        return identity if identity.alive() else None


@dataclass(frozen=True)
class Part:
    """A server and the parts that must be ready before it starts."""

    server: Server
    needs: tuple[str, ...] = ()
    ready_s: float = 60
    """How long it may take to become ready before it is started again."""


@dataclass(frozen=True)
class Stack:
    """All parts of one stack, in the order in which they start."""

    paths: Paths
    mark: str
    parts: tuple[Part, ...]
    postgres: Postgres
    kafka: Kafka
    seaweed: Seaweed
    triton: Triton
    addresses: Addresses
    passwords: dict[str, str]

    @property
    def gateway_url(self) -> str:
        return f"http://{self.addresses.gateway}"


SETUP = "setup"
"""Name of the step between servers and services: roles, schemas, topics."""


def make(state: Path, *, with_services: bool = True, running: bool = False, random_ports: bool = False) -> Stack:
    """Chooses ports, makes secrets that are missing, and builds the servers; starts nothing. Its caller holds the stack's lock.

    `running`: describes the stack that runs in this folder instead. `random_ports`: wants none in particular, so that several
    test runs keep out of each other's way; what is chosen is remembered. Raises StackError.
    """
    paths = Paths(state)
    mark = paths.mark()
    ports = Ports(state / "ports.json", in_use=running, random_only=random_ports)
    secrets = Secrets(state / "secrets")
    otlp = OtlpReceiver(
        state / "otlp", port=ports.claim("otlp", _OTLP), secret=secrets.get("traces-secret"), mark=mark, log=paths.log("otlp")
    )
    postgres = Postgres(
        state / "postgres",
        port=ports.claim("postgres", _POSTGRES),
        password=secrets.get("postgres-password"),
        mark=mark,
        log=paths.log("postgres"),
    )
    kafka = Kafka(
        state / "kafka",
        port=ports.claim("kafka", _KAFKA),
        controller_port=ports.claim("kafka-controller", _KAFKA_CONTROLLER),
        mark=mark,
        log=paths.log("kafka"),
    )
    seaweed = Seaweed(
        state / "s3",
        port=ports.claim("s3", _S3, SEAWEED_PORTS, usable),
        access_key=secrets.get("s3-access-key", lambda: random_secrets.token_hex(10)),
        secret_key=secrets.get("s3-secret-key"),
        bucket=BUCKET,
        mark=mark,
        log=paths.log("s3"),
    )
    triton = Triton(
        state / "triton",
        http_port=ports.claim("triton-http", _TRITON_HTTP),
        grpc_port=ports.claim("triton-grpc", _TRITON_GRPC),
        metrics_port=ports.claim("triton-metrics", _TRITON_METRICS),
        secret=secrets.get("triton-secret"),
        mark=mark,
        log=paths.log("triton"),
        otlp_endpoint=otlp.endpoint,
    )
    passwords = {service.name: secrets.get(f"postgres-{service.name}") for service in SERVICES if service.database}
    grpc_ports = {service.name: ports.claim(f"{service.name}-grpc", _SERVICE_GRPC + at) for at, service in enumerate(SERVICES)}
    http_ports = {service.name: ports.claim(f"{service.name}-http", _SERVICE_HTTP + at) for at, service in enumerate(SERVICES)}
    gateway_port = ports.claim("gateway", GATEWAY_PORT)
    addresses = Addresses(
        database={
            name: f"postgresql+asyncpg://{name}:{password}@{LOOPBACK}:{postgres.port}/{schemas.DATABASE}"
            for name, password in passwords.items()
        },
        kafka=kafka.bootstrap,
        s3_endpoint=seaweed.access.endpoint,
        s3_access_key=seaweed.access.access_key,
        s3_secret_key=seaweed.access.secret_key,
        s3_bucket=BUCKET,
        triton_grpc=triton.grpc,
        triton_http=triton.http,
        triton_secret=triton.secret,
        otlp=otlp.endpoint,
        traces_secret=secrets.get("traces-secret"),
        grpc={name: f"{LOOPBACK}:{port}" for name, port in grpc_ports.items()},
        http={name: f"{LOOPBACK}:{port}" for name, port in http_ports.items()},
        gateway=f"{LOOPBACK}:{gateway_port}",
        tokens={service.name: secrets.get(f"token-{service.name}", _service_token(service.name)) for service in SERVICES},
        run_token_secret=secrets.get("run-token-secret"),
        admin_key=secrets.get("admin-key", _admin_key),
    )
    parts = [Part(otlp), Part(postgres), Part(kafka), Part(seaweed), Part(triton)]
    if with_services:
        extra = _extra_settings(paths.settings)
        for service in SERVICES:
            folder = state / "services" / service.name
            process_ = ServiceProcess(
                service.name,
                folder,
                http_address=addresses.http[service.name],
                port=gateway_port if service.name == "gateway" else grpc_ports[service.name],
                env=environment(service, addresses, folder) | extra.get("all", {}) | extra.get(service.name, {}),
                mark=mark,
                log=paths.log(service.name),
            )
            parts.append(Part(process_, needs=(SETUP, seaweed.name)))
    return Stack(paths, mark, tuple(parts), postgres, kafka, seaweed, triton, addresses, passwords)


def _service_token(name: str) -> Callable[[], str]:
    def make_token() -> str:
        from servicekit.access import new_service_token

        return new_service_token(name)[0]

    return make_token


def _admin_key() -> str:
    from servicekit.access import new_api_key
    from servicekit.clock import SystemIds

    return new_api_key(SystemIds())[1]


def _extra_settings(file: Path) -> dict[str, dict[str, str]]:
    if not file.exists():
        return {}
    try:
        tables = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise StackError(f"{file} is not TOML: {error}") from error
    known = {"all", *(service.name for service in SERVICES)}
    for name, table in tables.items():
        if name not in known or not isinstance(table, dict):
            raise StackError(f"{file}: [{name}] is neither [all] nor a service ({', '.join(sorted(known - {'all'}))})")
    return {name: {key: str(value) for key, value in table.items()} for name, table in tables.items()}
