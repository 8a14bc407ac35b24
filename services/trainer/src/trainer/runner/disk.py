"""Tells the trouble of the trainer's own disk from bugs and from what the user's code did."""

from __future__ import annotations

import errno
import os

from servicekit.errors import Unavailable

_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE})
FULL = ("No space left on device", "os error 28", "Errno 28", "ENOSPC")
"""What programs say when a disk is full."""


def of_disk(exc: Exception) -> Exception:
    """Unavailable when the machine's disk is full, broken or out of files, which is nobody's fault and may pass; else `exc` itself."""
    if isinstance(exc, OSError) and exc.errno in _TROUBLE:
        return Unavailable(f"the trainer's disk: {os.strerror(exc.errno)}")
    return exc
