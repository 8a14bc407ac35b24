"""The way out of a sandbox: an HTTP proxy that reaches an allow-list of destinations and nothing else.

It accepts on a socket that was made inside of the sandbox's network, where nothing else leads out, and connects from this process. Plain
requests come in absolute form, one for each connection; everything else is a tunnel by CONNECT.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SETTING = "HEADRACE_TRAINING_EGRESS"
PORT = 3128
"""Where the proxy is found, on the sandbox's own 127.0.0.1."""

HTTP, HTTPS = 80, 443
MAX_CONNECTIONS = 256
MAX_HEAD = 65_536
_CHUNK = 65_536
_HEAD_S, _CONNECT_S, _LINGER_S = 30.0, 10.0, 1.0
_MAX_NOTES = 20
_MAX_CHUNK_LINE = 1_024

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_ABSOLUTE = re.compile(r"http://([^/?#@\s]+)([/?][\x21\x22\x24-\x7e]*)?", re.IGNORECASE)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_FRAMING = frozenset({"content-length", "transfer-encoding", "host"})
_OF_ONE_HOP = frozenset({"connection", "proxy-connection", "proxy-authorization", "keep-alive", "upgrade", "te"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """A host, by name or as an IP address, and a port. Names are compared as they are written, before they are resolved."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Egress:
    """What a sandbox may reach. `note` is told, once for each, of destinations that were refused."""

    allowed: frozenset[Destination]
    note: Callable[[str], None]


class _Bad(Exception):
    """The client sent what is no request that this proxy takes."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


def destination(text: str, default_port: int = 0) -> Destination:
    """Reads `host:port`, `1.2.3.4:port` or `[::1]:port`. Raises ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    if port == "" and default_port:
        port = str(default_port)
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65_536:
        raise ValueError(f"{text[:300]!r} is not host:port")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        name = host.lower().removesuffix(".")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{text[:300]!r} is not host:port") from None
        return Destination(name, int(port))
    if (address.version == 6) != (bare != host):
        raise ValueError(f"{text[:300]!r} is not host:port: an IPv6 address, and no other, stands in brackets")
    return Destination(str(address), int(port))


def destinations(text: str, default_port: int = 0) -> frozenset[Destination]:
    """Reads several, separated by commas. Raises ValueError."""
    return frozenset(destination(part.strip(), default_port) for part in text.split(",") if part.strip())


def destination_of(url: str) -> Destination:
    """Where a URL leads. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise ValueError(f"{url!r} is not an address like http://host:port")
    return destination(parts.netloc, HTTPS if parts.scheme == "https" else HTTP)


def environment(allowed: Iterable[Destination]) -> dict[str, str]:
    """The variables by which clients find the proxy. Servers of the sandbox's own are reached at those names of the loopback that do
    not stand for something outside."""
    proxy = f"http://127.0.0.1:{PORT}"
    outside = {one.host for one in allowed}
    own = ",".join(host for host in ("localhost", "127.0.0.1", "::1") if host not in outside)
    names = ("http_proxy", "https_proxy", "all_proxy")
    variables = {spelled: proxy for name in names for spelled in (name, name.upper())}
    return {**variables, "no_proxy": own, "NO_PROXY": own, "HEADRACE_PROXY": proxy}


class Proxy:
    """Serves on a listening socket until it is stopped, which ends every connection too."""

    def __init__(self, listener: socket.socket, egress: Egress) -> None:
        self._listener = listener
        self._egress = egress
        self._noted: set[Destination] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begins to accept. The socket is closed by `stop`."""
        self._server = await asyncio.start_server(self._serve, sock=self._listener, limit=MAX_HEAD)

    async def stop(self) -> None:
        """Nothing of it is left afterwards. May be repeated."""
        if self._server is not None:
            self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] = asyncio.current_task()  # type: ignore[assignment]  # a coroutine runs in one
        full = len(self._serving) >= MAX_CONNECTIONS
        self._serving.add(task)
        try:
            if full:
                raise _Bad("503 Too Many Connections", f"a training has at most {MAX_CONNECTIONS} connections")
            await self._exchange(reader, writer)
        except _Bad as exc:
            await _answer(reader, writer, exc.status, str(exc))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as exc:
            _log.debug("a connection of a training broke: %r", exc)
        except asyncio.CancelledError:
            _log.debug("a connection of a training ends with it")
        finally:
            self._serving.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Bad("431 Request Header Fields Too Large", f"a head has at most {MAX_HEAD} bytes") from None
        method, target, version, headers = _parse(head)
        if method == "CONNECT":
            async with self._connected(_read(target, 0)) as (back, forth):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await _both(_relay(reader, forth), _relay(back, writer), until=asyncio.ALL_COMPLETED)
            return
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise _Bad("400 Bad Request", "this is a proxy: http://host/path, or CONNECT host:port")
        path = match[2] or "/"
        framing = _framing(headers)
        async with self._connected(_read(match[1], HTTP)) as (back, forth):
            forth.write(_rewritten(method, path if path.startswith("/") else f"/{path}", version, match[1], headers))
            # What follows the one request is read, so that a client that leaves is noticed, and goes nowhere.
            await _both(_request(reader, forth, framing), _relay(back, writer), until=asyncio.FIRST_COMPLETED)
        await _until_gone(reader)

    @contextlib.asynccontextmanager
    async def _connected(self, to: Destination) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        if to not in self._egress.allowed:
            self._refused(to)
            raise _Bad(f"403 Not allowed by {SETTING}", f"a training may not reach {to}: {SETTING} of the trainer does not name it")
        try:
            async with asyncio.timeout(_CONNECT_S):
                back, forth = await asyncio.open_connection(to.host, to.port, limit=MAX_HEAD)
        except TimeoutError:
            raise _Bad("504 Gateway Timeout", f"{to} does not answer") from None
        except OSError as exc:
            raise _Bad("502 Bad Gateway", f"{to} cannot be reached: {exc.strerror or exc}") from None
        try:
            yield back, forth
        finally:
            forth.close()

    def _refused(self, to: Destination) -> None:
        if to in self._noted or len(self._noted) >= _MAX_NOTES:
            return
        self._noted.add(to)
        self._egress.note(f"refused to connect to {to}: {SETTING} of the trainer does not name it")


def _read(text: str, default_port: int) -> Destination:
    try:
        return destination(text, default_port)
    except ValueError as exc:
        raise _Bad("400 Bad Request", str(exc)) from None


def _parse(head: bytes) -> tuple[str, str, str, list[tuple[str, str]]]:
    """Method, target, version and headers of a head that is beyond doubt; raises _Bad for any other."""
    first, *rest = head[:-4].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise _Bad("400 Bad Request", "not a request of HTTP/1.1")
    headers = []
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise _Bad("400 Bad Request", "a header that is none")
        headers.append((name, value.strip(" \t")))
    return words[0], words[1], words[2], headers


def _framing(headers: Iterable[tuple[str, str]]) -> int | None:
    """Bytes of a request's body; None when it comes in chunks. Raises _Bad when two readers could come to different answers."""
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    codings = [value.lower() for name, value in headers if name.lower() == "transfer-encoding"]
    if codings:
        if codings != ["chunked"] or lengths:
            raise _Bad("400 Bad Request", "the length of the body is told in two ways, or in one that is not known")
        return None
    if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
        raise _Bad("400 Bad Request", "Content-Length is one number")
    return int(lengths[0]) if lengths else 0


def _rewritten(method: str, path: str, version: str, host: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head for the server itself, which is asked to close the connection after its answer."""
    listed = {word.strip().lower() for name, value in headers if name.lower() == "connection" for word in value.split(",")}
    dropped = (_OF_ONE_HOP | listed | {"host"}) - (_FRAMING - {"host"})
    kept = [f"{name}: {value}" for name, value in headers if name.lower() not in dropped]
    return "\r\n".join([f"{method} {path} {version}", f"Host: {host}", *kept, "Connection: close", "", ""]).encode("latin-1")


async def _request(reader: asyncio.StreamReader, forth: asyncio.StreamWriter, length: int | None) -> None:
    """Hands on the body of the one request, then drops what comes until the client leaves."""
    if length is None:
        await _chunks(reader, forth)
    else:
        await _exactly(reader, forth, length)
    while await reader.read(_CHUNK):
        pass


async def _exactly(reader: asyncio.StreamReader, forth: asyncio.StreamWriter, length: int) -> None:
    while length > 0:
        data = await reader.read(min(length, _CHUNK))
        if not data:
            raise ConnectionResetError("the body ended early")
        forth.write(data)
        # What a server no longer takes is dropped: its answer, which may be on its way, says why.
        with contextlib.suppress(OSError):
            await forth.drain()
        length -= len(data)


async def _chunks(reader: asyncio.StreamReader, forth: asyncio.StreamWriter) -> None:
    """A body in chunks. Extensions and trailers are left out: nobody needs them, and readers differ about them."""
    while True:
        line = await reader.readuntil(b"\r\n")
        match = _CHUNK_LINE.fullmatch(line)
        if match is None or len(line) > _MAX_CHUNK_LINE:
            raise ConnectionResetError("not a chunk")
        size = int(match[1], 16)
        if size == 0:
            break
        forth.write(b"%x\r\n" % size)
        await _exactly(reader, forth, size)
        if await reader.readexactly(2) != b"\r\n":
            raise ConnectionResetError("not the end of a chunk")
        forth.write(b"\r\n")
    left = MAX_HEAD
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        left -= len(line)
        if left < 0:
            raise ConnectionResetError("too many trailers")
    forth.write(b"0\r\n\r\n")


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hands on what comes until its end, no faster than it is taken, and then the end."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _both(*ways: Coroutine[Any, Any, None], until: str) -> None:
    """Runs both directions until the first, or both, have ended; a broken one ends the other."""
    tasks = {asyncio.ensure_future(way) for way in ways}
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if until == asyncio.ALL_COMPLETED and pending and all(task.exception() is None for task in done):
            done, pending = await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: str, text: str) -> None:
    """Answers in the proxy's own name."""
    body = f"{text}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError):
        writer.write(head.encode("latin-1") + body)
        await writer.drain()
        writer.write_eof()
    await _until_gone(reader)


async def _until_gone(reader: asyncio.StreamReader) -> None:
    """Drops what a client still sends, for a while: closed with bytes unread, its kernel would throw the answer away."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while await reader.read(_CHUNK):
                pass
