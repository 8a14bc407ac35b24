"""What the processes of a sandbox hold in memory, seen from outside: what is shared is counted once, and files in memory that nobody has
mapped are counted too. What a look costs is bounded: whoever has too much open to be looked at in time is told so instead.

Not seen are the buffers of sockets, whose number is limited; a memory file that only a message in flight or one thread's own table of
descriptors holds; pages of shared memory that every process has unmapped. For these a machine needs a limit of its own, such as a cgroup
around the trainer.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterable, Mapping

_IN_MEMORY = "/memfd:"
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ .{4} [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s")
_BLOCK = 512
_PAGE = os.sysconf("SC_PAGESIZE")
MAX_FILES = 50_000
"""Descriptors of all processes together that one look goes through, in some tenths of a second."""

MAX_SOCKETS = 512
File = tuple[int, int, int]
"""Major and minor number of a device, and the inode."""


class Unwatchable(Exception):
    """The processes have so much open that what they hold cannot be looked at often enough, or not at all. Says what."""


def check_sockets(pid: int) -> None:
    """Raises Unwatchable when the network namespace of a process has too many sockets: also those count that only a message in flight
    holds, or that are closed while somebody has yet to read what was sent. Nothing when the process has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/sockstat") as file:
        sockets = int(file.readline().split()[2])
        if sockets > MAX_SOCKETS:
            raise Unwatchable(f"too many sockets: {sockets}, at most {MAX_SOCKETS}")


def used(pids: Iterable[int], limit: int) -> int:
    """Bytes that these processes hold in memory together. Blocks; exact, and slow, only where a quick bound is beyond `limit`.

    Raises Unwatchable when they have too many files open.
    """
    known = list(pids)
    files = _files(known)
    bound = sum(files.values()) + sum(_resident(pid) for pid in known)
    return bound if bound <= limit else sum(files.values()) + sum(_share(pid, files) for pid in known)


def _resident(pid: int) -> int:
    """Resident bytes of one process; 0 when it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _files(pids: Iterable[int]) -> Mapping[File, int]:
    """Bytes of the memory files (memfd_create) that the processes have open."""
    seen: dict[File, int] = {}
    left = MAX_FILES
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):  # it has just ended
            names = os.listdir(folder)
            left -= len(names)
            if left < 0:
                raise Unwatchable(f"too many open files to watch: more than {MAX_FILES} in all processes together")
            for name in names:
                with contextlib.suppress(OSError):  # it was just closed
                    if os.readlink(f"{folder}/{name}").startswith(_IN_MEMORY):
                        told = os.stat(f"{folder}/{name}")
                        seen[os.major(told.st_dev), os.minor(told.st_dev), told.st_ino] = told.st_blocks * _BLOCK
    return seen


def _share(pid: int, without: Container[File]) -> int:
    """One process's share of what it has mapped, in bytes: a page that several have mapped is divided among them."""
    total = 0
    counted = True
    try:
        with open(f"/proc/{pid}/smaps", errors="replace") as file:
            for line in file:
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024 if counted else 0
                elif match := _MAPPING.match(line):
                    counted = (int(match[1], 16), int(match[2], 16), int(match[3])) not in without
    except PermissionError:
        return _resident(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return total
