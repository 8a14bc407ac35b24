"""Approvals, API keys and webhooks: who may do what, that nobody decides alone who must not, and that approvers are told."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from contracts.registry.v1 import events_pb2, service_pb2
from eventing import topics
from google.protobuf.timestamp_pb2 import Timestamp
from servicekit.access import hash_secret
from servicekit.errors import Conflict, Forbidden, Invalid, NotFound

SECRET = "a secret for webhooks"


async def waiting(registry: Any, needed: int = 1) -> str:
    """A version that waits for approval; the id of the request."""
    await registry.apply(registry.DELIVERY.replace("production: 0", f"production: {needed}"))
    registry.passes("r1", author="ann")
    await registry.wait_version(1, "Staging", "waits for")
    return await the_pending(registry)


async def the_pending(registry: Any) -> str:
    with registry.user("eve", "viewer"):
        found = await registry.stub.ListApprovals(service_pb2.ListApprovalsRequest(status="pending", model="flights"))
    assert len(found.approvals) == 1
    return str(found.approvals[0].approval_id)


async def vote(registry: Any, approval_id: str, who: str, approve: bool = True, comment: str = "") -> Any:
    with registry.user(who, "approver"):
        request = service_pb2.DecideApprovalRequest(approval_id=approval_id, approve=approve, comment=comment)
        return (await registry.stub.DecideApproval(request)).approval


async def test_enough_people_let_a_version_go_on(registry: Any) -> None:
    approval_id = await waiting(registry, needed=2)
    asked = events_pb2.ModelApprovalRequested.FromString((await registry.wait_told("model.approval_requested"))[0].payload)
    assert (asked.approval_id, asked.needed, asked.evaluation_id) == (approval_id, 2, "eval-r1-0")
    first = await vote(registry, approval_id, "bob", comment="fine")
    assert (first.status, [(v.subject, v.approve, v.comment) for v in first.votes]) == ("pending", [("bob", True, "fine")])
    again = await vote(registry, approval_id, "bob")
    assert len(again.votes) == 1
    with pytest.raises(Forbidden, match="made this version"):
        await vote(registry, approval_id, "ann")
    with registry.user("ed", "editor"), pytest.raises(Forbidden):
        await registry.stub.DecideApproval(service_pb2.DecideApprovalRequest(approval_id=approval_id, approve=True))
    assert (await registry.version(1)).reason == "waits for 1 approval"
    assert (await vote(registry, approval_id, "cid")).status == "approved"
    told = await registry.wait_told("model.promoted")
    assert events_pb2.ModelPromoted.FromString(told[0].payload).promoted_by == "cid"
    with pytest.raises(Conflict, match="approved"):
        await vote(registry, approval_id, "dan")


async def test_two_votes_at_once_count_both(registry: Any) -> None:
    approval_id = await waiting(registry, needed=2)
    await asyncio.gather(*(vote(registry, approval_id, who) for who in ("bob", "cid")))
    await registry.wait_told("model.promoted")
    assert [row["status"] for row in await registry.rows("SELECT status FROM approval")] == ["approved"]


async def test_one_rejection_keeps_it_in_staging(registry: Any) -> None:
    approval_id = await waiting(registry, needed=2)
    assert (await vote(registry, approval_id, "bob", approve=False, comment="smells")).status == "rejected"
    assert (await registry.version(1)).reason == "rejected by bob: smells"
    with registry.user("ed", "editor"), pytest.raises(Conflict, match="rejected by bob"):
        await registry.stub.PromoteModel(service_pb2.PromoteModelRequest(model="flights", version=1))
    assert [one for one in registry.told() if one.type == "model.promoted"] == []


async def test_a_newer_pass_withdraws_the_older_request(registry: Any) -> None:
    approval_id = await waiting(registry)
    registry.passes("r2")
    await registry.wait_version(2, "Staging", "waits for 1 approval")
    with pytest.raises(Conflict, match="withdrawn"):
        await vote(registry, approval_id, "bob")
    await vote(registry, await the_pending(registry), "bob")
    promoted = events_pb2.ModelPromoted.FromString((await registry.wait_told("model.promoted"))[0].payload)
    assert promoted.version.version == 2


async def test_a_deleted_delivery_withdraws_its_requests(registry: Any) -> None:
    approval_id = await waiting(registry)
    with registry.user("ed", "editor"):
        await registry.stub.DeleteDelivery(service_pb2.DeleteDeliveryRequest(name="flight-delays"))
    with pytest.raises(Conflict, match="withdrawn"):
        await vote(registry, approval_id, "bob")
    assert (await registry.version(1)).reason == "the delivery flight-delays was deleted"


async def test_an_approval_nobody_knows(registry: Any) -> None:
    with pytest.raises(Invalid):
        await vote(registry, "x", "bob")
    with pytest.raises(NotFound):
        await vote(registry, "00000000-0000-7000-8000-000000000001", "bob")


async def test_keys_are_made_told_listed_and_revoked(registry: Any) -> None:
    expires = Timestamp()
    expires.FromDatetime(datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1))
    with registry.user("root", "admin"):
        make = service_pb2.CreateApiKeyRequest(subject="ann", roles=["editor"], inference_endpoints=["flights"], expires_at=expires)
        made = await registry.access.CreateApiKey(make)
        told = (await registry.wait_told("access.changed", topic=topics.ACCESS))[0]
        snapshot = events_pb2.AccessChanged.FromString(told.payload)
        assert (told.key, snapshot.subject, list(snapshot.roles), snapshot.revision) == (made.key.key_id, "ann", ["editor"], 1)
        assert snapshot.hash == hash_secret(made.secret)
        assert snapshot.expires_at == expires
        assert made.key.key_id in made.secret
        revoke = service_pb2.RevokeApiKeyRequest(key_id=made.key.key_id)
        assert (await registry.access.RevokeApiKey(revoke)).key.revoked
        assert (await registry.access.RevokeApiKey(revoke)).key.revoked
        told = await registry.wait_told("access.changed", 2, topic=topics.ACCESS)
        snapshot = events_pb2.AccessChanged.FromString(told[-1].payload)
        assert (snapshot.revoked, snapshot.revision, told[-1].sequence) == (True, 2, 2)
        listed = await registry.access.ListApiKeys(service_pb2.ListApiKeysRequest())
        assert [(key.subject, key.revoked) for key in listed.keys] == [("ann", True)]
        with pytest.raises(NotFound):
            await registry.access.RevokeApiKey(service_pb2.RevokeApiKeyRequest(key_id="unknown"))
        with pytest.raises(Invalid, match="roles"):
            await registry.access.CreateApiKey(service_pb2.CreateApiKeyRequest(subject="ann", roles=["king"]))
        audit = await registry.stub.ListAudit(service_pb2.ListAuditRequest(target=f"key/{made.key.key_id}"))
    assert [entry.action for entry in audit.entries] == ["key.revoke", "key.create"]
    secret = made.secret.split("_", 2)[2]
    assert all(secret not in str(row) for row in await registry.rows("SELECT * FROM api_key"))
    assert all(secret not in entry.after_json for entry in audit.entries)
    with registry.user("app", "approver"), pytest.raises(Forbidden):
        await registry.access.ListApiKeys(service_pb2.ListApiKeysRequest())


async def test_the_first_admin_key_is_stored_once_and_cannot_be_the_last_to_go(make_registry: Callable[..., Awaitable[Any]]) -> None:
    first = await make_registry(bootstrap_admin_key_hash=f"first:{'a' * 64}")
    told = (await first.wait_told("access.changed", topic=topics.ACCESS))[0]
    snapshot = events_pb2.AccessChanged.FromString(told.payload)
    assert (told.key, snapshot.hash, list(snapshot.inference_endpoints)) == ("first", "a" * 64, ["*"])
    assert "admin" in snapshot.roles
    with first.user("root", "admin"), pytest.raises(Conflict, match="last key"):
        await first.access.RevokeApiKey(service_pb2.RevokeApiKeyRequest(key_id="first"))
    second = await make_registry(bootstrap_admin_key_hash=f"first:{'b' * 64}")
    assert [row["hash"] for row in await second.rows("SELECT hash FROM api_key")] == ["a" * 64]


class Receiver:
    """A small HTTP server that remembers what it was sent and answers with the codes it is given, then 204."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:] if line)}
        self.requests.append((headers, await reader.readexactly(int(headers["content-length"]))))
        code = self.answers.pop(0) if self.answers else 204
        location = "location: http://127.0.0.1:1/\r\n" if code == 302 else ""
        writer.write(f"HTTP/1.1 {code} x\r\n{location}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    await server.wait_closed()


async def hooked(make_registry: Callable[..., Awaitable[Any]], receiver: Receiver, allow_private: bool = True) -> Any:
    url = f"http://localhost:{receiver.port}/hook?to=us"
    return await make_registry(webhook_url=url, webhook_secret=SECRET, webhook_allow_private=allow_private)


async def sent(registry: Any) -> Any:
    """The one webhook, once it was sent."""
    return (await registry.wait_rows("SELECT * FROM webhook WHERE sent_at IS NOT NULL"))[0]


async def test_approvers_are_told_by_a_signed_webhook(make_registry: Callable[..., Awaitable[Any]], receiver: Receiver) -> None:
    registry = await hooked(make_registry, receiver)
    approval_id = await waiting(registry)
    row = await sent(registry)
    [(headers, body)] = receiver.requests
    said = json.loads(body)
    assert (said["approval_id"], said["model"], said["version"], said["id"]) == (approval_id, "flights", 1, str(row["id"]))
    assert headers["headrace-webhook-id"] == str(row["id"])
    assert headers["host"] == f"localhost:{receiver.port}"
    at, signature = (part.partition("=")[2] for part in headers["headrace-signature"].split(","))
    assert hmac.compare_digest(signature, hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest())
    assert abs(datetime.now(UTC).timestamp() - int(at)) < 60


async def test_a_webhook_is_tried_again_until_it_is_taken_and_follows_no_redirect(
    make_registry: Callable[..., Awaitable[Any]], receiver: Receiver
) -> None:
    receiver.answers = [500, 302]
    registry = await hooked(make_registry, receiver)
    await waiting(registry)
    row = await sent(registry)
    assert (row["attempts"], row["last_error"]) == (3, "")
    assert len({headers["headrace-webhook-id"] for headers, _ in receiver.requests}) == 1


async def test_a_webhook_goes_to_no_private_address(make_registry: Callable[..., Awaitable[Any]], receiver: Receiver) -> None:
    registry = await hooked(make_registry, receiver, allow_private=False)
    await waiting(registry)
    rows = await registry.wait_rows("SELECT last_error FROM webhook WHERE last_error <> ''")
    assert "no public address" in rows[0]["last_error"]
    assert receiver.requests == []


async def test_without_a_url_nothing_waits_to_be_sent(registry: Any) -> None:
    await waiting(registry)
    assert await registry.rows("SELECT 1 FROM webhook") == []
