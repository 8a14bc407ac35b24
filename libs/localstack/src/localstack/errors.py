"""What can go wrong while the local stack is prepared, started or stopped; every message says what to do."""

from __future__ import annotations


class StackError(Exception):
    """A local server could not be prepared, started or stopped. The message is one sentence for the person at the terminal."""


class Missing(StackError):
    """A program or package that the stack needs is not on this machine and could not be fetched."""


class NotReady(StackError):
    """A server did not become ready in time, or ended while it started."""
