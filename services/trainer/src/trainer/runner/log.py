"""The log of a training: a file that grows while it runs, of limited size, with a short memory of its last lines."""

from __future__ import annotations

from collections import deque
from pathlib import Path

_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 20
_TAIL_CHARACTERS = 2_000


class Log:
    """Appends to a training's log. One attempt writes at a time."""

    def __init__(self, file: Path, max_bytes: int) -> None:
        """`max_bytes` is what one attempt may write; the rest is counted and dropped."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self._log = file.open("ab", buffering=0)
        self.begin = self._log.seek(0, 2)
        self._left = max_bytes
        self._dropped = 0
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0

    def note(self, text: str) -> None:
        """A line of the trainer's own."""
        self._log.write(f"[headrace] {text}\n".encode())

    def write(self, data: bytes) -> None:
        """What the training printed."""
        self._tail.append(data)
        self._tail_bytes += len(data)
        while self._tail_bytes - len(self._tail[0]) >= _TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())
        kept = data[: self._left]
        self._log.write(kept)
        self._left -= len(kept)
        if len(kept) < len(data):
            if not self._dropped:
                self._log.write(b"\n")
                self.note("the log is full, what follows is left out")
            self._dropped += len(data) - len(kept)

    def forget_tail(self) -> None:
        """Begins the last lines anew: what comes now is another program's output."""
        self._tail.clear()
        self._tail_bytes = 0

    def tail(self) -> str:
        """The last lines that the training printed."""
        lines = b"".join(self._tail).decode(errors="replace").replace("\x00", "").rstrip().splitlines()
        return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]

    def copy(self, target: Path) -> None:
        """Writes what this attempt has logged to a file of its own."""
        with self.file.open("rb") as source, target.open("wb") as copy:
            source.seek(self.begin)
            while chunk := source.read(1 << 20):
                copy.write(chunk)

    def close(self) -> None:
        if self._dropped:
            self.note(f"{self._dropped} bytes were left out")
            self._dropped = 0
        self._log.close()
