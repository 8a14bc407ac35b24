"""One row of the audit log: who changed what, from what to what, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Audit:
    """`actor` is a person or `event:<type>:<id>`; `target` is like `model/flight-delays/3`, `delivery/flight-delays`, `key/<id>`."""

    at: datetime
    actor: str
    action: str
    target: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    reason: str = ""
