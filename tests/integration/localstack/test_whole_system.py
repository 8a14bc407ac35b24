"""The six services on the local stack: reachable with the admin key alone, apart in the database, and back when they are killed."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable

import asyncpg
import pytest
from localstack import api
from localstack.layout import Stack
from localstack.services import SERVICES


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def get(address: str, path: str, key: str = "") -> int:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_every_service_is_ready_and_healthy(system: Stack) -> None:
    rows = {row.name: row for row in api.status(system.paths.state)}
    assert {rows[service.name].state for service in SERVICES} == {"ready"}
    for service in SERVICES:
        for path in ("/healthz", "/readyz"):
            assert get(system.addresses.http[service.name], path) == 200, f"{service.name} {path}"


def test_the_admin_key_opens_the_gateway_and_nothing_else_does(system: Stack) -> None:
    gateway = system.addresses.gateway
    assert get(gateway, "/api/v1/models", system.addresses.admin_key) == 200
    assert get(gateway, "/api/v1/models") == 401
    assert get(gateway, "/api/v1/models", system.addresses.admin_key[:-1] + "x") == 401
    assert get(gateway, "/api/v1/models", system.addresses.tokens["tracker"]) == 401


@pytest.mark.parametrize("name", [service.name for service in SERVICES if service.database])
def test_a_service_owns_its_schema_and_sees_no_other(system: Stack, name: str) -> None:
    rights = system.postgres.sql(
        "SELECT nspname FROM pg_namespace WHERE has_schema_privilege(:'role', oid, 'USAGE') AND nspname NOT LIKE 'pg\\_%'"
        " AND nspname <> 'information_schema'",
        database="headrace",
        variables={"role": name},
    )
    assert rights == name
    tables = system.postgres.sql("SELECT count(*) FROM pg_tables WHERE schemaname = :'role'", database="headrace", variables={"role": name})
    assert int(tables) > 1
    may_create = system.postgres.sql(
        "SELECT has_database_privilege(:'role', 'headrace', 'CREATE') OR rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = :'role'",
        database="headrace",
        variables={"role": name},
    )
    assert may_create == "f"


async def test_a_role_is_refused_with_anothers_password_and_in_anothers_schema(system: Stack) -> None:
    where = {"host": "127.0.0.1", "port": system.postgres.port, "database": "headrace"}
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(user="tracker", password=system.passwords["registry"], **where)
    connection = await asyncpg.connect(user="tracker", password=system.passwords["tracker"], **where)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("SELECT * FROM registry.outbox")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE public.mine (id int)")
    finally:
        await connection.close()


def test_a_killed_service_comes_back_on_the_same_address(system: Stack) -> None:
    state = system.paths.state
    before = {row.name: row for row in api.status(state)}
    for name in ("tracker", "gateway"):
        pid = before[name].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def back() -> bool:
        rows = {row.name: row for row in api.status(state)}
        return all(rows[name].state == "ready" and rows[name].restarts > before[name].restarts for name in ("tracker", "gateway"))

    until(back)
    assert {row.name: row.port for row in api.status(state)} == {name: row.port for name, row in before.items()}
    until(lambda: get(system.addresses.gateway, "/api/v1/models", system.addresses.admin_key) == 200)
