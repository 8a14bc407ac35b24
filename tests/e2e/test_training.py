"""A training of the running system travels to production; one whose trainer dies in the middle is run again, never twice at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from headrace.cli.app import main
from localstack import api

from tests.e2e.trainings import Meeting, delivery_that_trains, ended, make_source, submit, training
from tests.e2e.world import World, eventually


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


def test_a_trainer_killed_in_the_middle_runs_the_training_again_and_never_twice_at_once(world: World, tmp_path: Path) -> None:
    world.apply(delivery_that_trains(world))
    with Meeting().open() as meeting:
        submitted = submit(world, make_source(tmp_path), MEETING=meeting.port)
        meeting.until(met=1, running=1)
        first = training(world, submitted)
        pids = {row.name: row.pid for row in api.status(world.system.paths.state)}
        assert pids["trainer"] is not None
        os.kill(pids["trainer"], signal.SIGKILL)
        meeting.until(met=2, running=1)
        meeting.go()
        told = ended(world, submitted)
    assert (told["status"], told["attempt"]) == ("succeeded", 2), told
    assert (meeting.met, meeting.most_at_once) == (2, 1)
    lost = world.client.get(f"/api/v1/runs/{first['run_id']}")["run"]
    assert (lost["status"], lost["reason"]) == ("FAILED", "its trainer died; the training is run again")
    assert world.arrives(told["run_id"], "completed")["version"] == 1
    assert list(world.versions()) == [1], "one training became one version"
    eventually(lambda: {row.name: row.state for row in api.status(world.system.paths.state)}["trainer"] == "ready", 60)
