"""Webhooks: requests for approval wait in a table, written in the transaction that makes them true, until they have been told.

Each is a POST of JSON, signed with HMAC-SHA256 over `<unix seconds>.<body>` in the header Headrace-Signature (`t=..,v1=..`). It is sent at
least once; its id stands in Headrace-Webhook-Id. The address is resolved here, checked, and then connected to as it was checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import httpx
from eventing.background import Background
from servicekit import db
from servicekit.clock import Clock, Ids
from servicekit.errors import Forbidden, Unavailable
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from registry import metrics
from registry.adapters.tables import webhook
from registry.domain.approvals import Approval

SIGNATURE = "Headrace-Signature"
WEBHOOK_ID = "Headrace-Webhook-Id"
MAX_ATTEMPTS = 12
"""With the waits between them, about an hour."""

TIMEOUT_S = 10.0
"""For each step of a POST: a receiver that sends byte after byte can make many of them."""

LEASE_S = 60.0
"""How long a row is left alone after a sender has taken it: twice as long as sending it may take as a whole."""

POLL_S = 1.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> IP addresses."""

_log = logging.getLogger(__name__)


class WebhookQueue:
    """The writing half, within one transaction."""

    def __init__(self, conn: AsyncConnection, clock: Clock, ids: Ids, enabled: bool) -> None:
        self._conn = conn
        self._clock = clock
        self._ids = ids
        self._enabled = enabled

    async def add(self, approval: Approval) -> None:
        """Has approvers told of a request; nothing when nobody is to be told."""
        if self._enabled:
            webhook_id, now = self._ids.uuid7(), self._clock.now()
            row = {"id": webhook_id, "body": body_of(str(webhook_id), approval), "created_at": now, "next_attempt_at": now}
            await self._conn.execute(insert(webhook).values(row | {"attempts": 0, "last_error": ""}))


def body_of(webhook_id: str, approval: Approval) -> str:
    """The JSON that is sent for a request for approval."""
    people = "approval" if approval.needed == 1 else "approvals"
    said = {
        "id": webhook_id,
        "type": "model.approval_requested",
        "approval_id": str(approval.approval_id),
        "model": approval.model,
        "version": approval.version,
        "delivery": approval.delivery,
        "delivery_revision": approval.delivery_revision,
        "evaluation_id": approval.evaluation_id,
        "author": approval.author,
        "needed": approval.needed,
        "requested_at": approval.requested_at.isoformat(),
        "text": f"Version {approval.version} of {approval.model} waits for {approval.needed} {people}.",
    }
    return json.dumps(said, ensure_ascii=False)


def sign(secret: str, body: bytes, at: int) -> str:
    """The value of the signature header for a body sent at `at` (unix seconds)."""
    mac = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={mac}"


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet: not private, loopback, link-local or multicast, nor such a one within IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        within = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if within is None and ip in _NAT64:
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if within is not None:
            return is_public(str(within))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system resolves it. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class WebhookPost:
    """Sends one body to the one URL, from the address it checked."""

    def __init__(
        self, clock: Clock, url: str, secret: str, allow_private: bool, resolver: Resolve = resolve, *, within_s: float = LEASE_S / 2
    ) -> None:
        """`within_s`: how long sending one body may take as a whole, name look-up and every address included."""
        self._within_s = within_s
        self._clock = clock
        self._url = httpx.URL(url)
        self._secret = secret
        self._allow_private = allow_private
        self._resolve = resolver

    async def send(self, client: httpx.AsyncClient, webhook_id: str, body: bytes) -> str:
        """Returns why it failed, empty when the receiver took it. May be repeated with the same id."""
        failure = "no address"
        try:
            async with asyncio.timeout(self._within_s):
                for address in await self._addresses():
                    try:
                        return await self._send_to(client, address, webhook_id, body)
                    except httpx.ConnectError as error:
                        failure = f"cannot connect: {error}"
        except TimeoutError:
            failure = f"it took longer than {self._within_s:g} s"
        except (Forbidden, Unavailable) as error:
            failure = error.message
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {error}"
        return failure[:500]

    async def _send_to(self, client: httpx.AsyncClient, address: str, webhook_id: str, body: bytes) -> str:
        at = int(self._clock.now().timestamp())
        headers = {
            "Host": self._url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "headrace",
            WEBHOOK_ID: webhook_id,
            SIGNATURE: sign(self._secret, body, at),
        }
        # The connection goes to the address that was checked; the certificate is still held against the name.
        target = self._url.copy_with(host=address)
        extensions = {"sni_hostname": self._url.host} if self._url.scheme == "https" else {}
        async with client.stream("POST", target, content=body, headers=headers, extensions=extensions) as response:
            return "" if response.is_success else f"answered {response.status_code}"

    async def _addresses(self) -> Sequence[str]:
        port = self._url.port or (443 if self._url.scheme == "https" else 80)
        try:
            addresses = await self._resolve(self._url.host, port)
        except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one: a label too long, or empty
            raise Unavailable(f"cannot resolve {self._url.host}: {error}") from error
        private = [address for address in addresses if not is_public(address)]
        if private and not self._allow_private:
            raise Forbidden(f"{self._url.host} is {private[0]}, which is no public address; HEADRACE_WEBHOOK_ALLOW_PRIVATE=true allows it")
        return addresses


class WebhookSender(Background):
    """The sending half: a component that takes due rows one by one. Several replicas share the work."""

    name = "webhooks"

    def __init__(self, engine: AsyncEngine, clock: Clock, post: WebhookPost) -> None:
        super().__init__("webhooks")
        self._engine = engine
        self._clock = clock
        self._post = post
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Looks at the table soon: something may have been committed."""
        self._woken.set()

    async def _run(self) -> None:
        # No proxy from the environment and no redirects: both would lead to an address that was not checked.
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client:
            while not self._stopping.is_set():
                self._woken.clear()
                try:
                    while not self._stopping.is_set() and await self._send_next(client):
                        pass
                except Exception as error:
                    if not db.is_transient(error):
                        raise
                    _log.warning("webhooks: the database is not available, trying again")
                await self._wait()

    async def _send_next(self, client: httpx.AsyncClient) -> bool:
        """Sends one row that is due and records how it went. False when none is due. Raises what the database raises."""
        now = self._clock.now()
        due = (webhook.c.next_attempt_at <= now) & webhook.c.sent_at.is_(None) & webhook.c.gave_up_at.is_(None)
        first = select(webhook.c.id).where(due).order_by(webhook.c.next_attempt_at).limit(1).with_for_update(skip_locked=True)
        taken = {"attempts": webhook.c.attempts + 1, "next_attempt_at": now + timedelta(seconds=LEASE_S)}
        async with self._engine.begin() as conn:
            statement = update(webhook).where(webhook.c.id == first.scalar_subquery()).values(taken)
            row = (await conn.execute(statement.returning(webhook.c.id, webhook.c.body, webhook.c.attempts))).first()
        if row is None:
            return False
        failure = await self._post.send(client, str(row.id), row.body.encode())
        changes = outcome(row.attempts, failure, self._clock.now())
        async with self._engine.begin() as conn:
            await conn.execute(update(webhook).where(webhook.c.id == row.id).values(changes))
        result = "sent" if not failure else "gave_up" if "gave_up_at" in changes else "failed"
        metrics.webhooks.add(1, {"outcome": result})
        if failure:
            _log.warning("webhook %s, attempt %d: %s", row.id, row.attempts, failure)
        return True

    def _wake(self) -> None:
        self._woken.set()

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._woken.wait()


def outcome(attempts: int, failure: str, now: datetime) -> dict[str, Any]:
    """What becomes of a row after so many attempts: sent, given up, or tried again after twice the wait before."""
    if not failure:
        return {"sent_at": now, "last_error": ""}
    if attempts >= MAX_ATTEMPTS:
        return {"gave_up_at": now, "last_error": failure}
    return {"next_attempt_at": now + timedelta(seconds=2 ** (attempts - 1)), "last_error": failure}
