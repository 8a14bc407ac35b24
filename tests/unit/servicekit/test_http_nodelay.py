"""Connections to a service's HTTP address send what they have at once: a body does not wait until the head was acknowledged."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from servicekit.http import HttpServer
from starlette.responses import PlainTextResponse


async def test_accepted_connections_send_at_once() -> None:
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # The server's side of this one connection: the socket whose peer is the client.
        seen.extend(
            transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for transport in asyncio.get_running_loop()._transports.values()  # type: ignore[attr-defined]  # the loop's own book
            if transport.get_extra_info("peername") == tuple(scope["client"])
        )
        await PlainTextResponse("ok")(scope, receive, send)

    server = HttpServer(app, "127.0.0.1:0")
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.listening()["http"])
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    finally:
        writer.close()
        await writer.wait_closed()
        await server.stop()
    assert seen == [1]
