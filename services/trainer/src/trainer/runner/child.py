"""Child processes for a process that uses gRPC: asyncio's own (and uvloop's) fork, and gRPC's fork handlers then abort the child.

subprocess uses vfork, which runs no handlers. The end of a child is seen through its pidfd. Every child dies with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Child:
    """A running child, with its standard output and error in one stream, or with this process's own."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        captured: bool = True,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts it, in a session of its own. Must be called in the main thread: when the thread that started it ends, the child
        is killed. Raises OSError when it cannot be started."""
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if captured else None,
            stderr=subprocess.STDOUT if captured else None,
            env=None if environment is None else dict(environment),
            cwd=folder,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Does nothing when it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Does nothing when it has ended."""
        self._process.kill()

    async def wait(self) -> int:
        """Waits for its end. May be cancelled and repeated; several may wait."""
        if (code := self._process.poll()) is not None:
            return code
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(self._process.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._process.wait()

    async def drain(self, output: Callable[[bytes], None]) -> None:
        """Hands on what it prints until the last writer is gone. Once only, and to its end before `end`, or cancelled."""
        if self._process.stdout is None:
            return
        # Not connect_read_pipe: its transport closes the pipe some time later, and libuv aborts when one is closed under it.
        loop = asyncio.get_running_loop()
        descriptor = self._process.stdout.fileno()
        os.set_blocking(descriptor, False)
        readable = asyncio.Event()
        loop.add_reader(descriptor, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                try:
                    chunk = os.read(descriptor, 65_536)
                except BlockingIOError:
                    continue
                if not chunk:
                    return
                output(chunk)
        finally:
            loop.remove_reader(descriptor)
            self._process.stdout.close()

    async def end(self) -> None:
        """Kills it if it runs, and waits until it is gone, also when cancelled meanwhile."""
        self.kill()
        while self._process.poll() is None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.create_task(self.wait()))


async def output_of(words: Sequence[str], environment: Mapping[str, str], timeout_s: float, folder: Path | None = None) -> tuple[int, str]:
    """Runs a program: its exit code and what it printed. Raises TimeoutError after `timeout_s`; then it is killed."""
    said = bytearray()
    child = Child(words, environment=environment, folder=folder)
    try:
        async with asyncio.timeout(timeout_s):
            await child.drain(said.extend)
            code = await child.wait()
    finally:
        await child.end()
    return code, said.decode(errors="replace")
