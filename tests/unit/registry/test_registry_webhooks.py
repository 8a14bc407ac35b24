"""What is said in a webhook, how it is signed, and where it may go."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from datetime import UTC, datetime
from uuid import UUID

import httpx
import pytest
from registry.adapters import webhooks
from registry.domain.approvals import Approval
from servicekit.clock import FakeClock

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


class Wire(httpx.AsyncBaseTransport):
    """Remembers what is sent where, and answers or fails as it is told, host by host."""

    def __init__(self, answers: dict[str, int]) -> None:
        self.answers = answers
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.host not in self.answers:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(self.answers[request.url.host], headers={"location": "http://127.0.0.1/"})


async def send(url: str, addresses: list[str], wire: Wire, allow_private: bool = False) -> str:
    async def resolver(host: str, port: int) -> list[str]:
        if host == "unknown.example":
            raise OSError("no such host")
        return addresses

    post = webhooks.WebhookPost(FakeClock(NOW), url, "secret", allow_private, resolver)
    async with httpx.AsyncClient(transport=wire) as client:
        return await post.send(client, "id", b"{}")


async def test_it_connects_to_what_it_checked_and_proves_the_name() -> None:
    wire = Wire({"93.184.216.34": 204})
    assert await send("https://hooks.example:8443/a?b=c", ["2606:2800:220:1::1", "93.184.216.34"], wire) == ""
    first, second = wire.requests
    assert first.url.host == "2606:2800:220:1::1"
    assert str(second.url) == "https://93.184.216.34:8443/a?b=c"
    assert second.headers["host"] == "hooks.example:8443"
    assert second.extensions["sni_hostname"] == "hooks.example"
    assert second.headers["headrace-webhook-id"] == "id"
    assert second.headers["headrace-signature"] == webhooks.sign("secret", b"{}", int(NOW.timestamp()))


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    wire = Wire({"93.184.216.34": 204, "10.0.0.1": 204})
    assert "10.0.0.1, which is no public address" in await send("http://hooks.example/", ["93.184.216.34", "10.0.0.1"], wire)
    assert wire.requests == []
    assert await send("http://hooks.example/", ["10.0.0.1"], wire, allow_private=True) == ""


class Endless(Wire):
    """Takes the connection and never answers, which no time-out of a single step would end."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError("not reached")


async def test_sending_ends_within_its_time_whatever_the_receiver_does() -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    post = webhooks.WebhookPost(FakeClock(NOW), "http://hooks.example/", "secret", False, resolver, within_s=0.05)
    async with asyncio.timeout(10), httpx.AsyncClient(transport=Endless({})) as client:
        assert await post.send(client, "id", b"{}") == "it took longer than 0.05 s"


async def test_a_name_that_cannot_be_one_is_a_failure_and_not_the_end() -> None:
    post = webhooks.WebhookPost(FakeClock(NOW), f"http://{'a' * 64}.example/", "secret", False)
    async with httpx.AsyncClient(transport=Wire({})) as client:
        assert (await post.send(client, "id", b"{}")).startswith("cannot resolve aaa")


async def test_why_it_failed_is_said() -> None:
    assert await send("http://hooks.example/", ["93.184.216.34"], Wire({"93.184.216.34": 302})) == "answered 302"
    assert await send("http://hooks.example/", ["93.184.216.34"], Wire({})) == "cannot connect: refused"
    assert await send("http://hooks.example/", [], Wire({})) == "no address"
    assert await send("http://unknown.example/", [], Wire({})) == "cannot resolve unknown.example: no such host"


def test_waits_double_until_it_is_given_up() -> None:
    waits = [webhooks.outcome(attempt, "x", NOW)["next_attempt_at"] - NOW for attempt in range(1, webhooks.MAX_ATTEMPTS)]
    assert [wait.total_seconds() for wait in waits] == [2**n for n in range(webhooks.MAX_ATTEMPTS - 1)]
    assert webhooks.outcome(webhooks.MAX_ATTEMPTS, "x", NOW) == {"gave_up_at": NOW, "last_error": "x"}
    assert webhooks.outcome(3, "", NOW) == {"sent_at": NOW, "last_error": ""}
