"""Unmodified MLflow clients, the newest and the last before MLflow 3, against the registry behind the gateway's door."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway.access import AccessTable
from gateway.browser import Hosts
from gateway.mlflow import DoorLimits, MlflowDoor
from gateway.sessions import Sessions
from servicekit.access import Caller
from servicekit.errors import Unauthenticated
from servicekit.http import HttpServer

from tests.mlflow import clients

SCRIPT = Path(clients.__file__).parent / "registry.py"


def caller_of(key: str) -> Caller:
    if key != "key-of-ada":
        raise Unauthenticated("this API key is not known")
    return Caller("gateway", "ada", frozenset({"editor"}))


@pytest.fixture
async def door(registry: Any) -> AsyncIterator[str]:
    """Where the gateway's door is that has a registry behind it."""
    (api,) = [component.http for component in registry.components if hasattr(component, "http")]
    served = HttpServer(api, "127.0.0.1:0")
    await served.start()
    entrance = MlflowDoor(
        caller_of,
        Sessions(AccessTable(), b"a secret of sessions", 60),
        Hosts(""),
        None,
        DoorLimits(upload_bytes=1 << 20, body_bytes=1 << 20),
        tracker="127.0.0.1:9",
        registry=f"127.0.0.1:{served.listening()['http']}",
        service_token=registry.gateway_token,
    )
    server = HttpServer(entrance, "127.0.0.1:0")
    await server.start()
    yield f"http://127.0.0.1:{server.listening()['http']}"
    await server.stop()
    await entrance.close()
    await served.stop()


@pytest.mark.parametrize("client", clients.NAMES)
async def test_a_script_registers_names_moves_and_finds(registry: Any, door: str, client: str, tmp_path: Path) -> None:
    code, output, errors = await clients.run(clients.python(client), SCRIPT, door, "key-of-ada", folder=tmp_path)
    assert code == 0, errors
    assert json.loads(output[output.index("{") :]) == {
        "same name": "RESOURCE_ALREADY_EXISTS",
        "taken name": "RESOURCE_ALREADY_EXISTS",
        "no model": "RESOURCE_DOES_NOT_EXIST",
        "no version": "RESOURCE_DOES_NOT_EXIST",
        "no alias": "INVALID_PARAMETER_VALUE",
        "reserved alias": "INVALID_PARAMETER_VALUE",
        "a file": "INVALID_PARAMETER_VALUE",
        "a bucket": "INVALID_PARAMETER_VALUE",
        "not evaluated": "INVALID_PARAMETER_VALUE",
        "champion": "INVALID_PARAMETER_VALUE",
        "bad filter": "INVALID_PARAMETER_VALUE",
        "deleted version": "RESOURCE_DOES_NOT_EXIST",
        "deleted model": "RESOURCE_DOES_NOT_EXIST",
    }
    assert {row["actor"] for row in await registry.rows("SELECT actor FROM audit")} == {"ada"}
