"""The network of a sandbox, with the kernel's own namespaces: nothing is there but its loopback and the way to what is allowed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trainer
from trainer.runner import sandbox
from trainer.runner.egress import Destination, Egress
from trainer.runner.sandbox import Command, Ended, Limits

LIMITS = Limits(memory_bytes=512 * 2**20, disk_bytes=64 * 2**20, timeout_s=120)
SDK = Path(trainer.__file__).parents[4] / "libs" / "sdk" / "src"
CLIENTS = """
import json, os, sys, urllib.request
import httpx, requests
from headrace.config import Connection
from headrace.http import Client
from headrace.uploads import put_part, upload
from pathlib import Path

url, store = sys.argv[1:]
told = {}
told["urllib"] = urllib.request.urlopen(f"{url}/urllib").read().decode()
told["requests"] = requests.post(f"{url}/requests", data=(part for part in [b"a" * 70_000, b"b"])).text
with requests.Session() as session:
    told["session"] = [session.get(f"{one}/session").text for one in (url, store, url)]
told["httpx"] = httpx.put(f"{url}/httpx", content=b"c" * 200_000).text
with Client(Connection(url, "token")) as client:
    told["sdk"] = client.get("/api/v1/sdk")
    file = Path("file")
    file.write_bytes(b"d" * 300_000)
    told["upload"] = upload(client, "/api/v1/uploads", file, {"store": store})
print(json.dumps(told))
"""


@dataclass
class Server:
    """A small HTTP server: answers JSON with the path and the length of the body, or plays the gateway of an upload."""

    name: str
    port: int = 0
    seen: list[str] = field(default_factory=list)
    open: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.idle.clear()
        try:
            while True:
                method, path, headers, body = await self._request(reader)
                self.seen.append(f"{method} {path}")
                answer = json.dumps(self._answer(path, headers, body)).encode()
                close = headers.get("connection", "") == "close"
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nETag: e1\r\nConnection: {'close' if close else 'keep-alive'}"
                writer.write(f"{head}\r\n\r\n".encode() + answer)
                await writer.drain()
                if close:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()
            self.open -= 1
            if not self.open:
                self.idle.set()

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes]:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = b""
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        else:
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split(" ")
        assert headers["host"] == f"127.0.0.1:{self.port}"
        return method, path, headers, body

    def _answer(self, path: str, headers: dict[str, str], body: bytes) -> object:
        if path == "/api/v1/uploads":
            asked = json.loads(body)
            size = asked["size_bytes"] // 2
            return {"upload_id": "u1", "part_size_bytes": size, "part_urls": [f"{asked['store']}/part/{number}" for number in (1, 2)]}
        if path == "/api/v1/uploads/u1/complete":
            return {"object": json.loads(body)}
        return {"by": self.name, "path": path, "bytes": len(body)}


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server, Server]]:
    """The gateway, the object store, and something that no training has to do with."""
    made = (Server("gateway"), Server("store"), Server("secret"))
    running = [await asyncio.start_server(one.serve, "127.0.0.1", 0) for one in made]
    for one, server in zip(made, running, strict=True):
        one.port = server.sockets[0].getsockname()[1]
    yield made
    for server in running:
        server.close()


async def run(
    tmp_path: Path, program: str, *words: str, allowed: Sequence[Server] | None = None, notes: list[str] | None = None
) -> tuple[Ended, str]:
    said = bytearray()
    heard = [] if notes is None else notes
    egress = None if allowed is None else Egress(frozenset(Destination("127.0.0.1", one.port) for one in allowed), heard.append)
    python = Path(sys.prefix) / "bin" / "python"
    command = Command(
        [str(python), "-c", program, *words],
        {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": str(SDK), "PYTHONDONTWRITEBYTECODE": "1"},
        visible=[*sandbox.visible_python(Path(sys.prefix)), SDK],
        egress=egress,
    )
    ended = await sandbox.run(command, LIMITS, tmp_path / "sandbox", said.extend)
    return ended, said.decode()


async def test_every_client_reaches_the_gateway_and_the_store_as_it_is(tmp_path: Path, servers: tuple[Server, Server, Server]) -> None:
    gateway, store, _ = servers
    notes: list[str] = []
    ended, said = await run(
        tmp_path, CLIENTS, f"http://127.0.0.1:{gateway.port}", f"http://127.0.0.1:{store.port}", allowed=[gateway, store], notes=notes
    )
    assert ended.code == 0, said
    told = json.loads(said)
    assert json.loads(told["urllib"]) == {"by": "gateway", "path": "/urllib", "bytes": 0}
    assert json.loads(told["requests"]) == {"by": "gateway", "path": "/requests", "bytes": 70_001}
    # One client that keeps a connection to the proxy for all servers: each request still goes to its own.
    assert [json.loads(text)["by"] for text in told["session"]] == ["gateway", "store", "gateway"]
    assert json.loads(told["httpx"]) == {"by": "gateway", "path": "/httpx", "bytes": 200_000}
    assert told["sdk"] == {"by": "gateway", "path": "/api/v1/sdk", "bytes": 0}
    assert told["upload"] == {"part_etags": ["e1", "e1"], "upload_id": "u1"}
    assert store.seen[1:] == ["PUT /part/1", "PUT /part/2"]
    assert notes == []


ATTEMPTS = """
import json, socket, sys, urllib.request, urllib.error
ports = [int(port) for port in sys.argv[1].split(",")]
told = {}
others = [("169.254.169.254", 80), ("10.0.0.1", 80), ("::1", ports[0]), ("2001:db8::1", 80)]
for host, port in [("127.0.0.1", port) for port in ports] + others:
    try:
        socket.create_connection((host, port), timeout=20).close()
        told[f"{host} {port}"] = "connected"
    except OSError as error:
        told[f"{host} {port}"] = type(error).__name__ + " " + str(error.errno)
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    try:
        line.connect("\\0" + sys.argv[2])
        told["abstract"] = "connected"
    except OSError as error:
        told["abstract"] = error.strerror
try:
    socket.getaddrinfo("example.org", 80)
    told["name"] = "resolved"
except OSError as error:
    told["name"] = type(error).__name__
told["own"] = socket.gethostbyname(socket.gethostname())
told["interfaces"] = [name for _, name in socket.if_nameindex()]
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
    told["loopback"] = "works"
told["proxy"] = []
for port in ports if len(sys.argv) > 3 else []:
    try:
        told["proxy"].append(urllib.request.urlopen(f"http://127.0.0.1:{port}/").status)
    except urllib.error.HTTPError as error:
        told["proxy"].append(f"{error.code} {error.read().decode()}")
print(json.dumps(told))
"""


@pytest.mark.parametrize("way_out", [False, True])
async def test_nothing_of_the_machine_or_around_it_is_reached(
    tmp_path: Path, servers: tuple[Server, Server, Server], way_out: bool
) -> None:
    gateway, _, secret = servers
    notes: list[str] = []
    name = f"headrace-{os.getpid()}"
    words = [f"{secret.port},{gateway.port}", name, *(["proxy"] if way_out else [])]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        ended, said = await run(tmp_path, ATTEMPTS, *words, allowed=[gateway] if way_out else None, notes=notes)
    assert ended.code == 0, said
    told = json.loads(said)
    assert told.pop("interfaces") == ["lo"]
    assert told.pop("own") == "127.0.0.1"
    assert told.pop("loopback") == "works"
    assert told.pop("name") == "gaierror"
    assert told.pop("abstract") == "Connection refused"
    proxied = told.pop("proxy")
    assert set(told.values()) == {"ConnectionRefusedError 111", "OSError 101"}  # refused by its own loopback, or no way there at all
    assert told["169.254.169.254 80"] == "OSError 101"
    if way_out:
        assert proxied[0].startswith(f"403 a training may not reach 127.0.0.1:{secret.port}: HEADRACE_TRAINING_EGRESS")
        assert proxied[1] == 200
        assert notes == [f"refused to connect to 127.0.0.1:{secret.port}: HEADRACE_TRAINING_EGRESS of the trainer does not name it"]
    assert secret.seen == []
    assert secret.open == 0


async def test_the_proxy_ends_with_the_command_and_so_do_its_connections(tmp_path: Path, servers: tuple[Server, Server, Server]) -> None:
    gateway, _, _ = servers
    before = _sockets()
    program = """
import http.client, os, sys
held = http.client.HTTPConnection("127.0.0.1", 3128)
held.set_tunnel("127.0.0.1", int(sys.argv[1]))
held.request("GET", "/held")
print(held.getresponse().read().decode(), flush=True)
os.kill(os.getpid(), 9)
"""
    ended, said = await run(tmp_path, program, str(gateway.port), allowed=[gateway])
    assert (ended.code, json.loads(said)["path"]) == (-9, "/held")
    async with asyncio.timeout(30):
        await gateway.idle.wait()
    assert gateway.open == 0
    assert _sockets() <= before


async def test_a_command_that_is_cancelled_leaves_no_connection(tmp_path: Path, servers: tuple[Server, Server, Server]) -> None:
    gateway, _, _ = servers
    program = """
import http.client, sys, time
held = http.client.HTTPConnection("127.0.0.1", 3128)
held.set_tunnel("127.0.0.1", int(sys.argv[1]))
held.request("GET", "/held")
held.getresponse().read()
time.sleep(600)
"""
    running = asyncio.create_task(run(tmp_path, program, str(gateway.port), allowed=[gateway]))
    async with asyncio.timeout(60):
        while not gateway.seen:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(30):
        await gateway.idle.wait()
    assert gateway.open == 0


async def test_a_sandbox_that_cannot_be_made_says_why_and_serves_nobody(tmp_path: Path, servers: tuple[Server, Server, Server]) -> None:
    said = bytearray()
    egress = Egress(frozenset(), lambda text: None)
    command = Command(["true"], {"PATH": os.defpath}, visible=[tmp_path / "nosuchfile"], egress=egress)
    ended = await sandbox.run(command, LIMITS, tmp_path / "sandbox", said.extend)
    assert "No such file" in ended.error


def _sockets() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        link = os.readlink(f"/proc/self/fd/{name}") if os.path.lexists(f"/proc/self/fd/{name}") else ""
        if link.startswith("socket:"):
            found.add(link)
    return found
