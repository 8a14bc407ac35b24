"""What is said in a webhook, how it is signed, and where it may go."""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime
from uuid import UUID

import pytest
from registry.adapters import webhooks
from registry.domain.approvals import Approval

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_the_signature_is_an_hmac_over_time_and_body() -> None:
    body = b'{"a": 1}'
    expected = hmac.new(b"secret", b'1767225600.{"a": 1}', hashlib.sha256).hexdigest()
    assert webhooks.sign("secret", body, 1767225600) == f"t=1767225600,v1={expected}"


def test_the_body_says_who_is_awaited_for_what() -> None:
    approval = Approval(UUID(int=1), UUID(int=2), "flights", 3, "e", "flights", 4, "ann", 2, NOW)
    said = json.loads(webhooks.body_of("id", approval))
    assert said["type"] == "model.approval_requested"
    assert said["text"] == "Version 3 of flights waits for 2 approvals."
    assert (said["id"], said["approval_id"], said["needed"], said["author"]) == ("id", str(UUID(int=1)), 2, "ann")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses(address: str) -> None:
    assert webhooks.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "239.1.1.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
    ],
)
def test_addresses_within(address: str) -> None:
    assert not webhooks.is_public(address)
