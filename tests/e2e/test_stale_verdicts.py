"""Two candidates that were judged against the same champion: the second is judged again when the first has replaced that."""

from __future__ import annotations

from typing import Any

from tests.e2e.world import GOOD, WEAK, World, eventually, model_bytes


def test_of_two_versions_promoted_at_once_the_second_is_evaluated_against_the_first(world: World) -> None:
    world.apply()
    world.arrives(world.finish_run(model_bytes(WEAK)), "completed")

    def rollouts(version: int) -> list[dict[str, Any]]:
        found = world.client.get("/api/v1/rollouts", endpoint=world.name)["rollouts"]
        return [rollout for rollout in found if rollout["ref"]["version"]["version"] == version]

    second = world.finish_run(model_bytes(GOOD))
    world.arrives(second, "shadowing")  # and there it stays while nobody calls
    third = world.finish_run(model_bytes(GOOD, seed=1))
    eventually(lambda: [rollout["state"] for rollout in rollouts(3)] == ["waiting"], what="version 3 to wait behind version 2")
    with world.calling() as callers:
        world.arrives(second, "completed")
        assert world.arrives(third, "completed")["version"] == 3
    assert not callers.failures
    last, first = rollouts(3)
    assert (first["state"], first["stale"]) == ("superseded", True)
    assert first["reason"] == "judged against version 1, but version 2 is live now: to be evaluated again"
    assert (last["state"], last["ref"]["baseline_version"]) == ("completed", 2)
    judged = {
        one["evaluation_id"]: (one["status"], one["judgement"]["champion_version"])
        for one in world.client.get("/api/v1/evaluations", run_id=third)["evaluations"]
    }
    assert judged == {first["evaluation_id"]: ("superseded", 1), last["evaluation_id"]: ("passed", 2)}
    versions = world.versions()
    assert [(versions[n]["stage"], versions[n].get("aliases", [])) for n in (2, 3)] == [("Archived", []), ("Production", ["champion"])]
