"""Fixtures for every test: real servers, each started on first use and shared by the whole run.

Isolation is by database, topic prefix, key prefix and model name.

`--servers=join:STATE_DIR` (or HEADRACE_TEST_SERVERS) uses the servers of a running `headrace up` instead of starting any.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

if TYPE_CHECKING:
    from artifacts import S3Location
    from localstack.kafka import Kafka
    from localstack.layout import Stack
    from localstack.postgres import Postgres
    from localstack.s3_probe import S3Access
    from localstack.throwaway import ThrowawayServers
    from localstack.triton import Triton

# A busy machine is no failure: tests assert no times.
settings.register_profile("headrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("headrace")

TESTS = Path(__file__).parent
FOLDERS = ("unit", "contract", "integration", "e2e", "chaos", "bench")
SERVER_FIXTURES = frozenset(
    {
        "stack_servers",
        "database",
        "new_database",
        "triton",
        "minio_server",
        "own_postgres",
        "own_kafka",
        "own_triton",
        "system",
        "own_system",
    }
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        default=os.environ.get("HEADRACE_TEST_SERVERS", "start"),
        help="start: servers of this run's own (the default); join:STATE_DIR: those of a running `headrace up`",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
        wanted = SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if folder == "unit" and wanted:
            raise pytest.UsageError(f"{item.nodeid}: a unit test starts no server, but this one asks for {', '.join(sorted(wanted))}")


class Database(str):
    """A connection string of a database of one test's own, as PostgreSQL's tools and asyncpg take it."""

    __slots__ = ()

    @property
    def sqlalchemy(self) -> str:
        """The same for SQLAlchemy's asyncio engine."""
        return self.replace("postgresql://", "postgresql+asyncpg://", 1)


class StackServers:
    """Where the servers of this run are. Reading a property starts the server it belongs to, which blocks for a moment the first time."""

    def __init__(self, servers: ThrowawayServers) -> None:
        self.servers = servers

    @property
    def postgres_dsn(self) -> str:
        """The superuser's connection string."""
        return self.servers.postgres.dsn

    @property
    def kafka(self) -> str:
        """The broker, "host:port"."""
        return self.servers.kafka.bootstrap

    @property
    def s3(self) -> S3Location:
        """The S3 server with its keys and bucket."""
        return _location(self.servers.s3)


def _location(access: S3Access) -> S3Location:
    from artifacts import S3Location

    return S3Location(endpoint=access.endpoint, access_key=access.access_key, secret_key=access.secret_key, bucket=access.bucket)


@pytest.fixture(scope="session", autouse=True)
def collected() -> InMemoryMetricReader:
    """Reads what the libraries measure.

    OpenTelemetry's providers can be set once per process: they are the tests', whichever service a test sets up first.
    """
    reader = InMemoryMetricReader()
    trace.set_tracer_provider(TracerProvider())
    metrics.set_meter_provider(MeterProvider([reader]))
    return reader


@pytest.fixture(scope="session")
def stack_servers(pytestconfig: pytest.Config) -> Iterator[StackServers]:
    """The real servers of this run, each started on first use."""
    from localstack.cache import cache_dir
    from localstack.throwaway import ThrowawayServers

    servers = ThrowawayServers(cache_dir() / "test-servers", join=_joined(pytestconfig))
    try:
        yield StackServers(servers)
    finally:
        servers.close()


@pytest.fixture(scope="session")
def system(stack_servers: StackServers) -> Stack:
    """The whole system of this run, services included, with addresses and secrets (`localstack.layout.Stack`).

    It is shared: leave it as it was found. `.gateway_url`, `.addresses.admin_key`, and `localstack.api` on `.paths.state`.
    """
    return stack_servers.servers.system


@pytest.fixture
def own_system(stack_servers: StackServers) -> Iterator[Callable[[], Stack]]:
    """Starts whole systems that the test may break (`localstack.api` on `.paths.state`)."""
    started: list[Stack] = []

    def make() -> Stack:
        started.append(stack_servers.servers.new_system(f"own-system-{secrets.token_hex(3)}"))
        return started[-1]

    yield make
    if started:
        from localstack import api

        for one in started:
            api.down(one.paths.state)


def _joined(config: pytest.Config) -> Path | None:
    """The state folder of the stack to join, None to start our own servers."""
    choice = str(config.getoption("--servers"))
    how, _, state = choice.partition(":")
    if how not in ("start", "join") or (how == "join") != bool(state):
        raise pytest.UsageError(f"--servers={choice}: say start, or join:STATE_DIR")
    return Path(state).resolve() if state else None


@pytest.fixture
def new_database(stack_servers: StackServers, request: pytest.FixtureRequest) -> Iterator[Callable[[], Database]]:
    """Makes as many empty databases as the test wants; they are dropped after it, connections or not."""
    server = stack_servers.servers.postgres
    made: list[str] = []

    def make() -> Database:
        word = re.sub(r"[^a-z0-9]+", "_", request.node.name.lower())[:40].strip("_")
        name = f"{word}_{secrets.token_hex(4)}"
        server.sql('CREATE DATABASE :"name"', variables={"name": name})
        made.append(name)
        return Database(f"{server.dsn.rsplit('/', 1)[0]}/{name}")

    yield make
    for name in made:
        server.sql('DROP DATABASE :"name" WITH (FORCE)', variables={"name": name})


@pytest.fixture
def database(new_database: Callable[[], Database]) -> Database:
    """An empty database of this test's own (`postgresql://...`; `.sqlalchemy` for SQLAlchemy)."""
    return new_database()


@pytest.fixture
def topic_prefix(stack_servers: StackServers) -> Iterator[str]:
    """A prefix that no other test uses. Its topics are deleted after the test."""
    prefix = f"t{secrets.token_hex(5)}."
    yield prefix
    if stack_servers.servers.kafka_in_use:
        from localstack import kafka_wire
        from localstack.ports import LOOPBACK

        address = (LOOPBACK, stack_servers.servers.kafka.port)
        kafka_wire.delete_topics(address, [topic for topic in kafka_wire.describe(address).topics if topic.startswith(prefix)])


@dataclass(frozen=True)
class TritonAddress:
    """A Triton server: addresses ("host:port"), and the secret that opens model control."""

    grpc: str
    http: str
    secret: str

    @property
    def metadata(self) -> dict[str, str]:
        """The gRPC headers with which restricted calls are made."""
        from localstack.triton import GRPC_SECRET_METADATA

        return {GRPC_SECRET_METADATA: self.secret}


@pytest.fixture(scope="session")
def triton(stack_servers: StackServers) -> TritonAddress:
    """The real Triton of this run. Use model names of your own: a name is never used twice."""
    server = stack_servers.servers.triton
    return TritonAddress(grpc=server.grpc, http=server.http, secret=server.secret)


@pytest.fixture(scope="session")
def minio_server(stack_servers: StackServers) -> S3Location:
    """A real MinIO. The first time on a machine it may be built first, which takes minutes."""
    return _location(stack_servers.servers.minio.access)


@pytest.fixture
def own_triton(stack_servers: StackServers) -> Iterator[Callable[[], Triton]]:
    """Starts Triton servers that the test may kill and restart with `server.crash(it)` and `server.restart(it)` of localstack."""
    started: list[Triton] = []

    def make() -> Triton:
        started.append(stack_servers.servers.new_triton(f"own-triton-{secrets.token_hex(3)}"))
        return started[-1]

    yield make
    for one in started:
        stack_servers.servers.release(one)


@pytest.fixture
def own_postgres(stack_servers: StackServers) -> Iterator[Callable[[], Postgres]]:
    """Starts PostgreSQL servers that the test may kill and restart: `server.crash(it)`, `server.restart(it)` (of localstack), `.dsn`."""
    started: list[Postgres] = []

    def make() -> Postgres:
        started.append(stack_servers.servers.new_postgres(f"own-postgres-{secrets.token_hex(3)}"))
        return started[-1]

    yield make
    for one in started:
        stack_servers.servers.release(one)


@pytest.fixture
def own_kafka(stack_servers: StackServers) -> Iterator[Callable[[], Kafka]]:
    """Starts Kafka brokers that the test may kill and restart: `server.crash(it)`, `server.restart(it)` (of localstack), `.bootstrap`."""
    started: list[Kafka] = []

    def make() -> Kafka:
        started.append(stack_servers.servers.new_kafka(f"own-kafka-{secrets.token_hex(3)}"))
        return started[-1]

    yield make
    for one in started:
        stack_servers.servers.release(one)
