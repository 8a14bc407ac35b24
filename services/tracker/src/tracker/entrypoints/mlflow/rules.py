"""Who may call what of MLflow's API, in words that its endpoints share."""

from __future__ import annotations

from servicekit.access import EVERY_ROLE, Rule

# What a run token may do is held to its own run by the use cases.
READ = Rule({"gateway"}, EVERY_ROLE, runs=True)
READ_ALL = Rule({"gateway"}, EVERY_ROLE)
WRITE = Rule({"gateway"}, {"editor", "admin"}, runs=True)
WRITE_ALL = Rule({"gateway"}, {"editor", "admin"})
