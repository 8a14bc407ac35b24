"""An HTTP server as a component: an ASGI application on uvicorn that listens where it is told and leaves signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

import uvicorn

from servicekit.settings import split_address

AsgiApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[MutableMapping[str, Any]]], Callable[[MutableMapping[str, Any]], Awaitable[None]]],
    Awaitable[None],
]


KEEP_ALIVE_S = 75
"""Longer than the gateway keeps a connection that nobody uses: else a request could meet one that is just being closed."""


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to servicekit.lifecycle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves `app` on `host:port` (port 0 takes a free one, told by `listening`). Requests in flight may end when it stops."""

    def __init__(self, app: AsgiApp, address: str, name: str = "http", grace_s: float = 5) -> None:
        self._app = app
        self._address = split_address(address)
        self.name = name
        self._grace_s = grace_s
        self._server: QuietServer | None = None
        self._task: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    async def start(self) -> None:
        """Returns when connections are accepted. Raises OSError when the address cannot be had."""
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        # Accepted connections inherit it. asyncio sets it only for sockets that name their protocol, and without it an answer whose body is
        # sent after its head waits 40 ms for the client to acknowledge the head.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # No ping-pong of a WebSocket and no lifespan is served here; logs go through the root logger.
        config = uvicorn.Config(
            self._app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=max(1, int(self._grace_s)),
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
        )
        self._server = QuietServer(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name=f"{self.name} server")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError(f"the {self.name} server ended while it started")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stops accepting, waits for requests in flight for the grace period. May be repeated."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task])
            self._server = None
        if self._socket is not None:
            self._socket.close()

    async def wait(self) -> None:
        """Raises when the server ends by itself."""
        if self._task is not None:
            await asyncio.shield(self._task)
            if self._server is not None and not self._server.should_exit:
                raise RuntimeError(f"the {self.name} server ended")

    def listening(self) -> Mapping[str, int]:
        """{name: port} once started."""
        return {self.name: self._socket.getsockname()[1]} if self._socket is not None else {}
