"""Who is calling and what they may do: service tokens between services, API keys of people, and the access table of a server.

Everything is denied that no rule allows. Secrets are compared by their SHA-256 in constant time and kept nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from servicekit.clock import Ids
from servicekit.errors import Forbidden, Unauthenticated

GATEWAY = "gateway"
"""The one service whose word on the end user counts."""

AUTHORIZATION = "authorization"
SUBJECT = "headrace-subject"
ROLES = "headrace-roles"
RUN = "headrace-run"
FENCING = "headrace-fencing"
"""Names of the gRPC metadata that carry identity."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the service that holds the connection and, when that is the gateway, the end user on whose behalf.

    `run_id` and `fencing_token` are set for a token that is good for one attempt of one run only.
    """

    service: str
    subject: str = ""
    roles: frozenset[str] = frozenset()
    run_id: str | None = None
    fencing_token: int | None = None

    @property
    def name(self) -> str:
        """For audit logs: the end user if there is one, else the service."""
        return self.subject or f"service:{self.service}"


EVERY_ROLE = frozenset({"viewer", "editor", "approver", "admin"})
"""All roles that a person can have. One who has none may use endpoints for inference, and nothing that asks for a role."""

ANYONE = frozenset({"anyone"})
"""As the roles of a rule: any signed-in person, with or without a role. Not a run token."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method: which services; of people, who come through the gateway, which roles (none: no person), or `ANYONE`;
    and whether run tokens may, which have no role.

    Raises ValueError for a role that does not exist, and for people or run tokens where the gateway, through which they come, may not.
    """

    services: AbstractSet[str]
    roles: AbstractSet[str] = frozenset()
    runs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "services", frozenset(self.services))
        object.__setattr__(self, "roles", frozenset(self.roles))
        if unknown := sorted(self.roles - EVERY_ROLE - ANYONE):
            raise ValueError(f"there is no role {', '.join(unknown)}")
        if (self.roles or self.runs) and GATEWAY not in self.services:
            raise ValueError("people and run tokens come through the gateway, which this rule does not let in")

    def admits(self, caller: Caller) -> bool:
        """Whether this caller may call the method."""
        if caller.service not in self.services:
            return False
        if caller.service != GATEWAY:
            return True
        if not caller.subject:
            return False
        if caller.run_id is not None:
            return self.runs
        return self.roles >= ANYONE or not self.roles.isdisjoint(caller.roles)


AccessTable = Mapping[str, Rule]
"""Full method name (`/headrace.tracker.v1.TrackerService/CreateRun`) -> Rule."""

_caller: ContextVar[Caller | None] = ContextVar("headrace_caller", default=None)


def current_caller() -> Caller:
    """The caller of the request being handled. Raises Unauthenticated outside a request."""
    caller = _caller.get()
    if caller is None:
        raise Unauthenticated("there is no caller here")
    return caller


@contextmanager
def as_caller(caller: Caller) -> Iterator[None]:
    """Makes `caller` the current caller within the block: for servers at their entry point, and for tests."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def hash_secret(text: str) -> str:
    """SHA-256 of a secret in hex. Fit for secrets of 128 random bits or more, not for passwords."""
    return hashlib.sha256(text.encode()).hexdigest()


def matches(text: str, digest: str) -> bool:
    """Whether a secret has this hash, in constant time."""
    return hmac.compare_digest(hash_secret(text), digest.lower())


def new_api_key(ids: Ids) -> tuple[str, str, str]:
    """A new API key: (key id, the text to give to its owner once, the hash to keep)."""
    key_id = ids.hex32()[:16]
    text = f"hr_{key_id}_{secrets.token_urlsafe(24)}"
    return key_id, text, hash_secret(text)


def new_service_token(name: str) -> tuple[str, str]:
    """A new service token: (the text for its HEADRACE_SERVICE_TOKEN, the hash for the HEADRACE_SERVICE_TOKEN_HASHES of others)."""
    text = f"{name}.{secrets.token_urlsafe(32)}"
    return text, hash_secret(text)


def identify(metadata: Mapping[str, str], token_hashes: Mapping[str, str]) -> Caller:
    """The caller that the metadata of a gRPC call proves.

    The end user's identity counts only from the gateway: from any other service it is ignored. Raises Unauthenticated.
    """
    scheme, _, token = metadata.get(AUTHORIZATION, "").partition(" ")
    name = token.partition(".")[0]
    # Compared even when the name is unknown, so that time does not tell which names exist.
    known = matches(token, token_hashes.get(name, "0" * 64))
    if scheme.lower() != "bearer" or not known:
        raise Unauthenticated("a valid service token is required")
    if name != GATEWAY:
        return Caller(service=name)
    fencing = metadata.get(FENCING, "")
    if fencing and not fencing.isdecimal():
        raise Unauthenticated(f"{FENCING} is not a number")
    return Caller(
        service=name,
        subject=metadata.get(SUBJECT, ""),
        roles=frozenset(filter(None, metadata.get(ROLES, "").split(","))),
        run_id=metadata.get(RUN) or None,
        fencing_token=int(fencing) if fencing else None,
    )


def identity_metadata(caller: Caller) -> list[tuple[str, str]]:
    """The metadata by which the gateway tells a service on whose behalf it calls: the inverse of `identify`."""
    metadata = [(SUBJECT, caller.subject), (ROLES, ",".join(sorted(caller.roles)))]
    if caller.run_id is not None:
        metadata.append((RUN, caller.run_id))
    if caller.fencing_token is not None:
        metadata.append((FENCING, str(caller.fencing_token)))
    return metadata


def authorize(method: str, caller: Caller, table: AccessTable) -> None:
    """Raises Forbidden, with the reason, unless a rule lets this caller call this method."""
    rule = table.get(method)
    if rule is not None and rule.admits(caller):
        return
    if rule is None or caller.service not in rule.services:
        raise Forbidden(f"{caller.service} may not call {method}")
    if not caller.subject:
        raise Forbidden(f"{method} needs an end user")
    if caller.run_id is not None:
        raise Forbidden(f"{method} is not for run tokens")
    if not rule.roles:
        raise Forbidden(f"{method} is not for people")
    raise Forbidden(f"{caller.name} needs the role {' or '.join(sorted(rule.roles))}")


def require_role(caller: Caller, *roles: str) -> None:
    """Raises Forbidden unless the end user has one of the roles. A service that acts on its own behalf has no roles and passes."""
    if caller.service == GATEWAY and not caller.roles & set(roles):
        raise Forbidden(f"{caller.name} needs the role {' or '.join(sorted(roles))}")
