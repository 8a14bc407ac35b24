"""MLflow's own page in a real Chromium: what a script has logged is seen there, and what is edited there is what a script reads."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.e2e.world import World, eventually
from tests.mlflow import chromium, clients

SCRIPT = Path(clients.HERE) / "seen.py"


async def test_a_person_finds_what_was_logged_and_edits_it(world: World, tmp_path: Path) -> None:
    client = clients.python("current")
    code, printed, errors = await clients.run(client, SCRIPT, world.url, world.key, world.name, folder=tmp_path)
    assert code == 0, errors[-3_000:]
    logged = json.loads(printed.splitlines()[-1])
    viewer = world.client.post("/api/v1/keys", {"subject": "ann", "roles": ["viewer"], "expires_in_days": 1})["secret"]
    experiments = "/api/2.0/mlflow/experiments/search?max_results=1"

    def viewer_is_known() -> bool:
        headers = {"authorization": f"Bearer {viewer}"}
        return httpx.get(world.url + experiments, headers=headers, timeout=10, trust_env=False).status_code == 200

    eventually(viewer_is_known, 20, "the viewer's key is known")
    given = (chromium.program(), world.url, world.key, viewer, world.name, logged["experiment"], *logged["runs"])
    browsing = Path(clients.HERE) / "browsing.py"
    code, _, errors = await clients.run(clients.python("browser"), browsing, world.url, world.key, *given, folder=tmp_path)
    assert code == 0, errors[-3_000:]
    code, printed, errors = await clients.run(client, SCRIPT, world.url, world.key, world.name, "changed", folder=tmp_path)
    assert code == 0, errors[-3_000:]
    assert json.loads(printed.splitlines()[-1]) == {"version": "1", "tags": {"seen": "yes"}}
