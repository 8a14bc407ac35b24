"""The port of a gateway process: uvicorn with the data path's protocol, and the control application behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Any

import uvicorn
from servicekit.http import QuietServer
from uvicorn.server import ServerState

from gateway.plane import DataPlane
from gateway.server import check_uvicorn, protocol_for


class DataServer:
    """Serves one data plane, and the control application beside it, on one port: a component."""

    name = "gateway"

    def __init__(self, plane: DataPlane, app: Any, host: str, port: int, *, grace_s: float, reuse_port: bool = False) -> None:
        """`app` is the ASGI application for everything that is not under /v2. `reuse_port` lets several processes share the port."""
        check_uvicorn()
        self._plane = plane
        self._app = app
        self._address = (host, port)
        self._grace_s = grace_s
        self._reuse_port = reuse_port
        self._server: QuietServer | None = None
        self._task: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Binds and serves. Raises OSError when the port is taken."""
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        # Accepted connections inherit it: else an answer whose body follows its head waits 40 ms for the client to acknowledge the head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(self._address)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http=protocol_for(self._plane),
            ws="none",
            lifespan="on" if self._app is not None else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(self._grace_s)),
            backlog=2048,
        )
        self._server = QuietServer(config)
        self._plane.start()
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("the HTTP server ended while it started")
            await asyncio.sleep(0.005)

    def listening(self) -> Mapping[str, int]:
        """{"gateway": port} once started."""
        return {"gateway": self.port} if self.port else {}

    async def wait(self) -> None:
        """Raises when the server ends by itself."""
        if self._task is not None:
            await asyncio.shield(self._task)
            if not self._plane.draining:
                raise RuntimeError("the gateway's HTTP server ended")

    async def stop(self) -> None:
        """Finishes the requests that are being answered, within the grace, and closes. May be repeated."""
        self._plane.drain()
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), self._grace_s + 1)
            state: ServerState = self._server.server_state
            for connection in list(state.connections):
                connection.transport.abort()
        self._plane.stop()
