"""What a training of a real trainer reaches: the object store by presigned URLs and what the operator allows, but none of the servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from artifacts.s3 import S3Store

SCRIPT = """
import json, os, socket, urllib.error, urllib.request
told = {"direct": {}, "proxied": {}}
for name, address in json.loads(os.environ["SERVERS"]).items():
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
        told["direct"][name] = "connected"
    except OSError as error:
        told["direct"][name] = error.errno
    with socket.create_connection(("127.0.0.1", 3128)) as line:
        line.sendall(f"CONNECT {address} HTTP/1.1\\r\\n\\r\\n".encode())
        told["proxied"][name] = int(line.recv(100).split()[1])
told["stored"] = urllib.request.urlopen(os.environ["STORED"]).read().decode()
told["allowed"] = urllib.request.urlopen(os.environ["ALLOWED"]).read().decode()
print(json.dumps(told))
"""


@pytest.fixture
def triton_address(triton: Any) -> str:
    return str(triton.grpc)


async def test_the_servers_are_out_of_reach_and_the_store_is_not(stack: Any, stack_servers: Any, triton_address: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nallowed")
        await writer.drain()
        writer.close()

    store = S3Store(stack_servers.s3)
    await store.put("tests/reach", b"from the store")
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as allowed:
        port = allowed.sockets[0].getsockname()[1]
        await stack.start_trainer(HEADRACE_TRAINING_EGRESS=f"127.0.0.1:{port}")
        postgres = stack_servers.postgres_dsn.rsplit("@", 1)[1].split("/")[0]
        servers = {"kafka": stack_servers.kafka, "postgres": postgres, "triton": triton_address, "metadata": "169.254.169.254:80"}
        environment = {
            "SERVERS": json.dumps(servers),
            "STORED": await store.presign_get("tests/reach", 600),
            "ALLOWED": f"http://127.0.0.1:{port}/",
        }
        training = await stack.submit(SCRIPT, environment=environment)
        ended = await stack.ended(training.training_id)
    log = await stack.log(training.training_id)
    assert ended.status == "succeeded", log
    told = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert set(told["direct"].values()) <= {101, 111}  # no way there, or nobody on the loopback of its own
    assert set(told["proxied"].values()) == {403}
    assert set(told["direct"]) == set(told["proxied"]) == set(servers)
    assert (told["stored"], told["allowed"]) == ("from the store", "allowed")
    for address in servers.values():
        assert log.count(f"[headrace] refused to connect to {address}: HEADRACE_TRAINING_EGRESS of the trainer does not name it") == 1
