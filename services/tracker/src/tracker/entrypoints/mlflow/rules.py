"""Who may call what of MLflow's API, in words that its endpoints share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from servicekit.access import EVERY_ROLE, Rule
from servicekit.mlflow import PREFIXES
from servicekit.rest import Endpoint, Handle

# What a run token may do is held to its own run by the use cases.
READ = Rule({"gateway"}, EVERY_ROLE, runs=True)
READ_ALL = Rule({"gateway"}, EVERY_ROLE)
WRITE = Rule({"gateway"}, {"editor", "admin"}, runs=True)
WRITE_ALL = Rule({"gateway"}, {"editor", "admin"})


def endpoints(table: Iterable[tuple[Sequence[str] | str, str, Rule, Handle]]) -> list[Endpoint]:
    """Rows of methods, path below `PREFIXES`, rule and handler as endpoints under every prefix."""
    return [
        Endpoint((methods,) if isinstance(methods, str) else methods, f"{prefix}{path}", rule, handle)
        for methods, path, rule, handle in table
        for prefix in PREFIXES
    ]
