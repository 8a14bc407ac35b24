"""A world of each test's own on the shared system."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

import pytest
from localstack.layout import Stack

from tests.e2e.world import World


@pytest.fixture
def world(system: Stack, request: pytest.FixtureRequest) -> Iterator[World]:
    """A delivery name that no other test uses, on the system that all share."""
    word = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:30].strip("-")
    made = World(system, f"{word}-{secrets.token_hex(3)}")
    yield made
    made.close()
