"""Use cases of API keys: make, list, revoke, and the first admin key of a new installation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from servicekit.access import Caller, new_api_key
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, NotFound

from registry.domain import access as domain
from registry.domain.access import ApiKey
from registry.domain.audit import Audit
from registry.handlers.telling import told
from registry.ports import Store


class Access:
    """The use cases."""

    def __init__(self, store: Store, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids

    async def create(
        self, caller: Caller, subject: str, roles: Sequence[str], endpoints: Sequence[str], expires_at: datetime | None
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which is known only here and now. Every call makes another key."""
        key_id, text, digest = new_api_key(self._ids)
        now = self._clock.now()
        with told():
            key = domain.new_key(key_id, digest, subject, roles, endpoints, now, expires_at)
        async with self._store.transaction() as session:
            await session.keys.store(key)
            await session.audit.add([Audit(now, caller.name, "key.create", f"key/{key_id}", {}, _shown(key))])
        return key, text

    async def all(self) -> Sequence[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        async with self._store.transaction() as session:
            return await session.keys.all()

    async def revoke(self, caller: Caller, key_id: str) -> ApiKey:
        """Revokes a key for ever. Repeatable. Raises NotFound, and Conflict for the last admin key: nobody could make another."""
        now = self._clock.now()
        async with self._store.transaction() as session:
            keys = {key.key_id: key for key in await session.keys.all(exclusively=True)}
            if key_id not in keys:
                raise NotFound(f"there is no key {key_id}")
            key = keys[key_id]
            revoked = key.revoke()
            if revoked is key:
                return key
            if _admin(key, now) and not any(_admin(other, now) for other in keys.values() if other is not key):
                raise Conflict("this is the last key with the role admin: make another first")
            await session.keys.store(revoked)
            await session.audit.add([Audit(now, caller.name, "key.revoke", f"key/{key_id}", _shown(key), _shown(revoked))])
            return revoked

    async def bootstrap(self, text: str) -> bool:
        """Stores the first admin key, given as `<key id>:<sha256>`, unless a key of this id was ever there. True when it was stored."""
        now = self._clock.now()
        with told():
            key = domain.bootstrap_key(text, now)
        async with self._store.transaction() as session:
            if any(known.key_id == key.key_id for known in await session.keys.all(exclusively=True)):
                return False
            await session.keys.store(key)
            await session.audit.add([Audit(now, "service:registry", "key.create", f"key/{key.key_id}", {}, _shown(key), "bootstrap")])
        return True


def _admin(key: ApiKey, now: datetime) -> bool:
    return "admin" in key.roles and key.good_at(now)


def _shown(key: ApiKey) -> dict[str, object]:
    return {
        "subject": key.subject,
        "roles": list(key.roles),
        "inference_endpoints": list(key.inference_endpoints),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked": key.revoked,
        "revision": key.revision,
    }
