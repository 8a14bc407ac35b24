"""Where the gateway is and with which key: from the environment, else from the local stack of this folder or one above it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

STATE_DIR_NAME = ".headrace"


@dataclass(frozen=True)
class Connection:
    """A gateway's base URL (without a slash at its end) and the key or run token to show it."""

    url: str
    token: str

    def __repr__(self) -> str:  # the token must not end up in a log or a traceback
        return f"Connection(url={self.url!r}, token=***)"


class NotConfigured(Exception):
    """Nothing says where the gateway is."""


def proxy() -> str | None:
    """The proxy that a training reaches everything by, as its trainer says; None outside of one. The environment's other proxies are not
    asked: they rarely know the way to a gateway."""
    return os.environ.get("HEADRACE_PROXY") or None


def state_dir(start: Path | None = None) -> Path:
    """The local stack's folder: HEADRACE_STATE_DIR, else the nearest existing .headrace upwards from `start`, else .headrace in `start`."""
    if explicit := os.environ.get("HEADRACE_STATE_DIR"):
        return Path(explicit)
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / STATE_DIR_NAME).is_dir():
            return folder / STATE_DIR_NAME
    return here / STATE_DIR_NAME


def connection() -> Connection:
    """The connection to use. HEADRACE_URL with HEADRACE_TOKEN or HEADRACE_API_KEY wins over the local stack.

    The local stack's own key is for the local stack alone: it is never sent to a HEADRACE_URL that names another gateway.
    Raises NotConfigured with what to do when there is neither.
    """
    url = os.environ.get("HEADRACE_URL", "").rstrip("/")
    token = os.environ.get("HEADRACE_TOKEN") or os.environ.get("HEADRACE_API_KEY") or ""
    folder = state_dir()
    local = _local_url(folder)
    if not url and not local:
        raise NotConfigured("no gateway is configured: set HEADRACE_URL and HEADRACE_API_KEY, or start a local one with `headrace up`")
    url = url or local
    if not token:
        if url != local:
            raise NotConfigured(f"no key for {url}: set HEADRACE_API_KEY")
        try:
            token = (folder / "secrets" / "admin-key").read_text().strip()
        except OSError:
            raise NotConfigured(f"no key for {url}: set HEADRACE_API_KEY") from None
    return Connection(url, token)


def _local_url(folder: Path) -> str:
    """The URL of the local stack's gateway; empty when there is no stack."""
    try:
        return str(json.loads((folder / "stack.json").read_text())["gateway_url"]).rstrip("/")
    except (OSError, ValueError, KeyError):
        return ""
