"""gRPC's C core puts no lines of its own among the JSON logs of a service."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SERVICES = ("tracker", "trainer", "evaluator", "registry", "deployer", "gateway")

ORDER = """
import sys, {service}.__main__
loaded = list(sys.modules)
print(loaded.index("servicekit") < loaded.index("grpc"))
"""

FORKS = """
import asyncio, os
from servicekit import errors
import grpc

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    await server.stop(0)

asyncio.run(main())
"""


def ran(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_says_so_before_grpc_is_imported(service: str) -> None:
    assert ran(ORDER.format(service=service)).stdout == "True\n"


def test_a_fork_is_not_told_unless_asked_for() -> None:
    assert ran(FORKS).stderr == ""
    assert "fork" in ran(FORKS, GRPC_VERBOSITY="INFO", GRPC_ENABLE_FORK_SUPPORT="1").stderr
