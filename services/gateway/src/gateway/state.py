"""The gateway's memory over restarts: the last snapshots of routes and keys, in a file, so that it can serve while Kafka is away.

Each process writes a file of its own and reads those of all, since the highest revision wins anyway. The file holds the hashes
of keys, so only its owner may read it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)

_VERSION = 1
_PREFIX = "tables-"


class StateFile:
    """Snapshots by kind and key, as the bytes that came with the events. `save` is atomic and may run in a thread."""

    def __init__(self, directory: Path, process: str) -> None:
        self._directory = directory
        self._path = directory / f"{_PREFIX}{process}.json"
        self._records: dict[tuple[str, str], bytes] = {}
        self._dirty = False

    @property
    def dirty(self) -> bool:
        """Whether there is something that the file does not hold yet."""
        return self._dirty

    def put(self, kind: str, key: str, payload: bytes) -> None:
        """Remembers a snapshot in place of the one before."""
        self._records[kind, key] = payload
        self._dirty = True

    def load(self) -> Iterator[tuple[str, str, bytes]]:
        """(kind, key, payload) of every process's file. A file that cannot be read is logged and passed over."""
        for path in sorted(self._directory.glob(f"{_PREFIX}*.json")):
            try:
                content = json.loads(path.read_bytes())
                if content["version"] != _VERSION:
                    raise ValueError(f"version {content['version']} is not known")
                records = [(str(kind), str(key), base64.b64decode(payload, validate=True)) for kind, key, payload in content["records"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.error("the table file %s cannot be read: %s", path, error)
                continue
            yield from records

    def snapshot(self) -> bytes:
        """What `write` shall write; nothing is dirty after it."""
        self._dirty = False
        records = [[kind, key, base64.b64encode(payload).decode()] for (kind, key), payload in self._records.items()]
        return json.dumps({"version": _VERSION, "records": records}).encode()

    def write(self, content: bytes) -> None:
        """Puts the content in the file's place: after a crash it is the old one or the new one. Blocks for the disk; raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(f".{os.getpid()}.part")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
