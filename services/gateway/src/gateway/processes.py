"""Several gateway processes on one address: the first reserves the port, starts the others, and restarts one that dies.

They share nothing but the port (SO_REUSEPORT) and the folder of the table files; each reads Kafka and reports windows for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from servicekit.lifecycle import ANNOUNCE_VARIABLE
from servicekit.settings import PREFIX, split_address

from gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)

RESTART_AFTER_S = 0.5
_POLL_S = 0.05


class Processes:
    """A component in place of all others: the processes of this gateway."""

    name = "processes"

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._reserved: socket.socket | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-gateway-")
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._port = 0

    async def start(self) -> None:
        """Returns when every process serves. Raises OSError when the port is taken."""
        host, port = split_address(self._settings.gateway_address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound and never listening: it keeps the port ours, and gets no connection.
        self._reserved = socket.socket(family, socket.SOCK_STREAM)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind((host, port))
        self._port = self._reserved.getsockname()[1]
        for index in range(self._settings.gateway_processes):
            self._keepers.append(asyncio.create_task(self._keep(index), name=f"gateway process {index}"))
        while self.ready() is not None:
            for keeper in self._keepers:
                if keeper.done():
                    await keeper
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Tells every process to finish what it is answering, and waits for that."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        _, late = await _wait_all(list(self._children.values()), self._settings.shutdown_grace_s)
        for child in late:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        if self._reserved is not None:
            self._reserved.close()
        self._folder.cleanup()

    def ready(self) -> str | None:
        """None while every process has said that it listens."""
        silent = [str(index) for index in range(self._settings.gateway_processes) if not self._announced(index)]
        return f"processes {', '.join(silent)} do not serve" if silent else None

    def listening(self) -> Mapping[str, int]:
        return {"gateway": self._port} if self._port else {}

    async def wait(self) -> None:
        """Raises when a process could not be started at all."""
        await asyncio.gather(*(_joined(keeper) for keeper in self._keepers))

    def _announcement(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.json"

    def _announced(self, index: int) -> bool:
        child = self._children.get(index)
        if child is None or child.returncode is not None:
            return False
        try:
            return bool(json.loads(self._announcement(index).read_text())["pid"] == child.pid)
        except (OSError, ValueError):
            return False

    async def _keep(self, index: int) -> None:
        host, _ = split_address(self._settings.gateway_address)
        shown = f"[{host}]" if ":" in host else host
        environment = os.environ | {
            f"{PREFIX}GATEWAY_INDEX": str(index),
            f"{PREFIX}GATEWAY_ADDRESS": f"{shown}:{self._port}",
            f"{PREFIX}HTTP_ADDRESS": f"{split_address(self._settings.http_address)[0]}:0",
            ANNOUNCE_VARIABLE: str(self._announcement(index)),
        }
        while True:
            # A process ends when this pipe does: it must not outlive the first one.
            child = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", env=environment, stdin=asyncio.subprocess.PIPE)
            self._children[index] = child
            code = await child.wait()
            _log.error("gateway process %s ended with code %s and is started again", index, code)
            await asyncio.sleep(RESTART_AFTER_S)


class ParentWatch:
    """A component of each process: asks it to stop when the first process, which holds the other end of its stdin, is gone."""

    name = "parent watch"

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._readable)

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())

    def _readable(self) -> None:
        if not os.read(sys.stdin.fileno(), 64):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            _log.error("the first gateway process is gone")
            os.kill(os.getpid(), signal.SIGTERM)


async def _wait_all(
    children: list[asyncio.subprocess.Process], timeout_s: float
) -> tuple[list[asyncio.subprocess.Process], list[asyncio.subprocess.Process]]:
    """(ended, still running) after the time."""
    waits = {asyncio.ensure_future(child.wait()): child for child in children}
    if waits:
        _, late = await asyncio.wait(waits, timeout=timeout_s)
        for wait in late:
            wait.cancel()
    return [child for child in children if child.returncode is not None], [child for child in children if child.returncode is None]


async def _joined(task: asyncio.Task[None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(task)
