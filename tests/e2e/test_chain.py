"""The chain, from a finished run to production traffic and back, on the whole system."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from headrace.cli.app import main
from headrace.config import Connection
from headrace.http import Client, Denied

from tests.e2e.world import BREAKS_ABOVE, GOOD, NOISE, SIGNATURE, WEAK, World, eventually, model_bytes, request_body, samples_of


def test_a_better_model_takes_over_and_one_that_breaks_is_rolled_back(world: World) -> None:
    assert world.apply()["outcome"] == "created"
    assert world.apply()["outcome"] == "unchanged"
    first = world.finish_run(model_bytes(WEAK))
    assert world.arrives(first, "completed")["version"] == 1
    assert world.infer().headers["x-headrace-model-version"] == "1"

    def rows(number: int) -> bytes:
        return request_body(2 * BREAKS_ABOVE if number % 3 == 0 else 0.1)

    with world.calling(rows=rows) as callers:
        second = world.finish_run(model_bytes(GOOD))
        world.arrives(second, "completed")
        versions = world.versions()
        assert (versions[1]["stage"], versions[2]["stage"]) == ("Archived", "Production")
        assert versions[2]["aliases"] == ["champion"]

        third = world.finish_run(model_bytes(NOISE))
        assert "must be at least" in world.arrives(third, "failed")["detail"]

        # Its shadow stage compares nothing that breaks it: an answer that fails is no answer to compare.
        fourth = world.finish_run(model_bytes(GOOD, breaks=True))
        ended = world.arrives(fourth, "rolled_back")
        assert "error" in ended["detail"]
        rollout = world.client.get(f"/api/v1/rollouts/{ended['rollout_id']}")["rollout"]
        assert rollout["cause"] == "END_CAUSE_HARM"
        assert world.versions()[3]["stage"] == "Archived"
        assert world.versions()[2]["aliases"] == ["champion"]
        eventually(lambda: world.infer().headers["x-headrace-model-version"] == "2")
    assert not callers.failures
    assert sum(callers.answers.values()) == callers.sent
    assert callers.fallbacks > 0
    assert set(callers.answers) == {"1", "2", "3"}


def test_from_a_prediction_back_to_run_and_data(world: World) -> None:
    world.apply()
    run = world.finish_run(model_bytes(GOOD))
    world.arrives(run, "completed")
    request_id = world.infer().headers["x-request-id"]

    def traced() -> bool:
        try:
            return bool(world.client.get(f"/api/v1/traces/{request_id}")["tree"])
        except Exception:
            return False

    eventually(traced, 20)
    lineage = world.client.get(f"/api/v1/traces/{request_id}")["lineage"]
    assert lineage["run"]["id"] == run
    assert lineage["data"] == {world.training_data.name: f"v{world.training_data.version} ({world.training_data.sha256[:12]})"}
    assert lineage["version"]["version"] == 1


def test_a_version_waits_for_its_approvals(world: World) -> None:
    world.apply(approvals=1)
    run = world.finish_run(model_bytes(GOOD))
    world.arrives(run, "awaiting_approval")
    assert world.infer().status_code == 404, "nothing serves before somebody has approved"
    (approval,) = world.client.get("/api/v1/approvals", status="pending", model=world.name)["approvals"]
    path = f"/api/v1/approvals/{approval['approval_id']}/decision"
    with pytest.raises(Denied):  # admin made the run, and is no approver
        world.client.post(path, {"approve": True})
    secret = world.client.post("/api/v1/keys", {"subject": "bob", "roles": ["approver"]})["secret"]
    with Client(Connection(world.url, secret)) as bob:

        def decided() -> bool:
            try:
                return bool(bob.post(path, {"approve": True, "comment": "fine"})["approval"]["status"] == "approved")
            except Denied:  # a new key reaches the gateway within a second
                return False

        eventually(decided, 10)
    world.arrives(run, "completed")
    audit = world.client.get("/api/v1/audit", page_size=50)["entries"]
    assert any(entry["actor"] == "bob" for entry in audit)


def test_a_completed_rollout_is_taken_back_in_one_command(world: World) -> None:
    world.apply()
    world.arrives(world.finish_run(model_bytes(WEAK)), "completed")
    with world.calling() as callers:
        second = world.arrives(world.finish_run(model_bytes(GOOD)), "completed")
        world.client.post(f"/api/v1/rollouts/{second['rollout_id']}/revert", {"reason": "a hunch"})
        eventually(lambda: world.versions()[1]["aliases"] == ["champion"], what="version 1 is champion again")
        eventually(lambda: world.infer().headers["x-headrace-model-version"] == "1")
    assert not callers.failures


def test_a_deployed_file_passes_the_same_gates(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.apply()
    monkeypatch.setenv("HEADRACE_URL", world.url)
    monkeypatch.setenv("HEADRACE_API_KEY", world.key)

    def deploy(model: bytes) -> tuple[int, dict[str, Any]]:
        """`headrace deploy` of a file: its exit code and the journey that it prints."""
        file, samples = tmp_path / "model.onnx", tmp_path / "samples.json"
        file.write_bytes(model)
        samples.write_text(json.dumps({"signature": SIGNATURE, "samples": samples_of(model)}))
        words = ["headrace", "deploy", str(file), "--endpoint", world.name, "--samples", str(samples), "--json"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), dict(json.loads(capsys.readouterr().out))

    code, journey = deploy(model_bytes(NOISE))
    assert (code, journey["state"]) == (1, "failed")
    assert "must be at least" in journey["detail"]
    assert world.infer().status_code == 404
    code, journey = deploy(model_bytes(GOOD))
    assert (code, journey["state"]) == (0, "completed")
    assert world.infer().headers["x-headrace-model-version"] == "1"
