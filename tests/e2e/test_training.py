"""A training by the trainer of the running system travels to production."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from headrace.cli.app import main

from tests.e2e.trainings import delivery_that_trains, make_source
from tests.e2e.world import World


def test_a_training_travels_to_production_by_one_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(tmp_path)
    file = tmp_path / "delivery.yaml"
    file.write_text(delivery_that_trains(world))
    world.apply(file.read_text())
    monkeypatch.setenv("HEADRACE_URL", world.url)
    monkeypatch.setenv("HEADRACE_API_KEY", world.key)
    monkeypatch.setattr(sys, "argv", ["headrace", "run", "-f", str(file), "--seed", "3", "--watch", "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    told = json.loads(capsys.readouterr().out)
    assert not left.value.code, told
    assert (told["training"]["status"], told["training"]["attempt"]) == ("succeeded", 1)
    assert (told["journey"]["state"], told["journey"]["version"]) == ("completed", 1)
    assert world.infer().headers["x-headrace-model-version"] == "1"
    (version,) = world.versions().values()
    assert version["aliases"] == ["champion"]
    run = world.client.get(f"/api/v1/runs/{told['training']['run_id']}")["run"]
    assert (run["status"], run["tags"]["headrace.seed"], run["source"]["training_id"]) == ("FINISHED", "3", told["training"]["training_id"])
