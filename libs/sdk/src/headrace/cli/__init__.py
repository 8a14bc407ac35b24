"""The `headrace` command: one module per noun, one place for output, errors and exit codes."""

from __future__ import annotations

from headrace.cli.app import main

__all__ = ["main"]
