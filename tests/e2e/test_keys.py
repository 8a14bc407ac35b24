"""A key that is taken back opens nothing any more, neither to the callers of an endpoint nor to /api/v1."""

from __future__ import annotations

import pytest
from headrace.config import Connection
from headrace.http import Client, Denied

from tests.e2e.world import GOOD, World, eventually, model_bytes


def test_a_revoked_key_is_refused_everywhere(world: World) -> None:
    world.apply()
    world.arrives(world.finish_run(model_bytes(GOOD)), "completed")
    asked = {"subject": "ann", "roles": ["viewer"], "inference_endpoints": [world.name], "expires_in_days": 1}
    made, kept = (world.client.post("/api/v1/keys", asked) for _ in range(2))
    with Client(Connection(world.url, made["secret"])) as ann, Client(Connection(world.url, kept["secret"])) as other:

        def opens(secret: str, client: Client) -> tuple[int, int]:
            """What the data path answers, and what /api/v1 does."""
            return world.infer(key=secret).status_code, client.raw("GET", "/api/v1/models").status_code

        eventually(lambda: opens(made["secret"], ann) == (200, 200), 20, "the key is known")
        eventually(lambda: opens(kept["secret"], other) == (200, 200), 20, "the other key is known")
        world.client.delete(f"/api/v1/keys/{made['key']['key_id']}")
        eventually(lambda: opens(made["secret"], ann) == (401, 401), 20, "the key is refused")
        with pytest.raises(Denied):
            ann.get("/api/v1/models")
        assert opens(kept["secret"], other) == (200, 200), "another key of the same person goes on"
