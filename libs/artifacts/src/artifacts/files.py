"""Reading and writing local files in chunks off the event loop, with names that appear only when the content is complete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import IO

from artifacts.port import CHUNK_SIZE


async def read_chunks(path: Path) -> AsyncGenerator[bytes, None]:
    """The bytes of a file. Raises OSError."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK_SIZE):
            yield chunk
    finally:
        file.close()


async def write_atomically(path: Path, chunks: AsyncGenerator[bytes, None]) -> None:
    """Writes chunks to a file beside `path` and renames it when all are there and on disk; removes it when anything fails."""
    descriptor, name = await asyncio.to_thread(tempfile.mkstemp, dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            async with contextlib.aclosing(chunks) as source:
                async for chunk in source:
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(_finish, file, partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # noqa: ASYNC240  # one quick call, which a cancellation must not skip
        raise


def _finish(file: IO[bytes], partial: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(path)
