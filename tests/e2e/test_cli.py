"""Every command of `headrace` against the running system: what it does, what it prints, and how it ends on wrong input.

One story in rows. A row with `json` is called with --json and its document is judged; one with `shows` is called without, and the
words must be printed; one with both is called both ways, so that it must bear being repeated.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from eventing import topics
from eventing.broker import Record
from eventing.envelope import Event, encode_headers
from eventing.kafka import KafkaBroker
from headrace.cli.app import app, main
from servicekit.clock import SystemIds

from tests.e2e.trainings import TRAIN_SECTION
from tests.e2e.world import GOOD, SIGNATURE, WEAK, World, eventually, model_bytes, samples_of

NOBODY = "00000000-0000-0000-0000-000000000000"
PARKED = "evaluator evaluator headrace.runs {parked}"


@dataclass(frozen=True)
class Row:
    """One call. `{words}` in braces are filled in with what the story knows. `by`: whose key is sent."""

    words: str
    shows: str = ""
    json: Callable[[Any], Any] | None = None
    code: int = 0
    saves: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    by: str = "admin"


@dataclass(frozen=True)
class Act:
    """What happens between calls: `does` is called with the story until it answers something true."""

    what: str
    does: Callable[[Story], Any]


def wrong(words: str, shows: str, code: int = 2, by: str = "admin") -> Row:
    """A call that must end with this code and say this, as a sentence on stderr and as JSON."""
    return Row(words, shows, lambda told: told["error"]["message"], code, by=by)


class Story:
    """Calls commands in this process, and keeps what they told for the rows to come."""

    def __init__(self, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.folder = world, folder
        self.known: dict[str, str] = {"name": world.name, "state": str(world.system.paths.state), "folder": str(folder)}
        self.keys = {"admin": world.key}
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def call(self, words: list[str], by: str = "admin") -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self._monkeypatch.setenv("HEADRACE_API_KEY", self.keys[by])
        self._monkeypatch.setattr(sys, "argv", ["headrace", *words])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = self._capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    def play(self, row: Row) -> None:
        words = [word.format(**self.known) for word in shlex.split(row.words)]
        if row.json is not None:
            code, out, err = self.call([*words, "--json"], row.by)
            assert code == row.code, (words, out, err)
            told = json.loads(out)
            assert row.json(told), (words, told)
            self.known |= {name: str(find(told)) for name, find in row.saves.items()}
        if row.shows or row.json is None:
            code, out, err = self.call(words, row.by)
            assert code == row.code, (words, out, err)
            assert row.shows.format(**self.known) in out + err, (words, out, err)

    def deploy(self, weights: tuple[float, float], seed: int) -> bool:
        """Sends a model file to the endpoint."""
        model = model_bytes(weights, seed=seed)
        (self.folder / f"{seed}.onnx").write_bytes(model)
        (self.folder / f"{seed}.json").write_text(json.dumps({"signature": SIGNATURE, "samples": samples_of(model)}))
        words = f"deploy {self.folder}/{seed}.onnx --endpoint {self.world.name} --samples {self.folder}/{seed}.json --no-wait"
        self.play(Row(words, json=lambda told: told["run_id"], saves={"run": lambda told: told["run_id"]}))
        return True

    def state_is(self, state: str) -> bool:
        """Whether the newest run is there on its way, and the registry has heard that it completed; keeps what it has on it."""
        journey = self.world.journey(self.known["run"])
        self.known |= {name: str(journey[name]) for name in ("version", "rollout_id") if name in journey}
        if journey["state"] == "awaiting_approval":
            self.known["approval"] = journey["detail"].rsplit(" ", 1)[1].rstrip(")")
        return bool(journey["state"] == state and (state != "completed" or journey["stage"] == "Production"))


def becomes(state: str) -> Act:
    return Act(f"the run is {state}", lambda story: story.state_is(state))


def deploy(weights: tuple[float, float], seed: int) -> list[Row | Act]:
    """A model file is sent, and waits for its approval."""
    return [Act(f"deploy {seed}", lambda story: story.deploy(weights, seed)), becomes("awaiting_approval")]


def walks_to_the_end(story: Story) -> bool:
    """Sends what the steps wait for: nobody else calls here, so that a rollout stays where it is until this."""
    with story.world.calling(rate=150):
        return bool(eventually(lambda: story.state_is("completed"), what="the rollout completes"))


def park(story: Story) -> bool:
    """Puts an event on Kafka that no consumer can read."""
    story.known["parked"] = SystemIds().hex32()
    event = Event("run.finished", topics.RUNS, story.known["parked"], 1, b"\xff\xff", SystemIds().uuid7(), datetime.now(UTC))
    record = Record(event.topic, event.key.encode(), event.payload, encode_headers(event, "/test"), 0)

    async def send() -> None:
        broker = KafkaBroker(story.world.system.addresses.kafka, "test")
        producer = broker.producer()
        await producer.start()
        try:
            assert list(await producer.send([record])) == [None]
        finally:
            await producer.stop()
            await broker.close()

    asyncio.run(send())
    return True


def is_parked(story: Story) -> bool:
    return story.known["parked"] in story.call(["dlq", "list"])[1]


def key_is_known(story: Story) -> bool:
    story.keys["bob"] = story.known["secret"]
    return story.call(["models"], "bob")[0] == 0


def trace_is_there(story: Story) -> bool:
    code, out, _ = story.call(["trace", story.known["request"], "--json"])
    return code == 0 and bool(json.loads(out).get("tree"))


HERE: list[Row | Act] = [
    Row("status --state-dir {state}", "tracker", lambda told: {"gateway", "kafka"} <= {part["name"] for part in told}),
    Row("status --state-dir {folder}", "none", lambda told: told == [], code=1),
    Row("logs gateway -n 3 --state-dir {state}", "gateway |"),
    wrong("logs nonsense --state-dir {state}", "there is no log of nonsense", 1),
    Row("up --state-dir {state}", "ready: http://", lambda told: told["gateway_url"].startswith("http://")),
    Row("down --state-dir {folder}", "nothing was running", lambda told: told == {"stopped": []}),
]
DATA: list[Row | Act] = [
    Row("data push {name} {folder}/rows.csv", "{name} version 1", lambda told: told["version"] == 1 and len(told["sha256"]) == 64),
    wrong("data push {name} {folder}/nothing.csv", "there is no file"),
    Row("data list", "{name}", lambda told: told["datasets"]),
    Row("data pull {name} {folder}/pulled.csv", "{name} version 1 in ", lambda told: Path(told["path"]).read_text().startswith("x0,x1")),
    wrong("data pull nothing-{name} {folder}/pulled.csv", "nothing-"),
]
PEOPLE: list[Row | Act] = [
    Row(
        "keys create bob --role approver --role viewer --days 1",
        json=lambda told: told["secret"].startswith("hr_"),
        saves={"secret": lambda told: told["secret"], "key": lambda told: told["key"]["key_id"]},
    ),
    Row("keys create caller --endpoint {name} --days 1", "hr_"),
    wrong("keys create eve --role emperor", "emperor"),
    wrong("keys revoke nothing", "nothing"),
    Row("keys list", "bob", lambda told: any(key["subject"] == "bob" for key in told["keys"])),
    Act("the gateway knows bob", key_is_known),
    wrong("keys list", "admin", 4, by="bob"),
]
APPLIED: list[Row | Act] = [
    Row("apply -f {folder}/delivery.yaml --dry-run", "{name}: would be created", lambda told: told["outcome"] == "created"),
    Row("apply -f {folder}/delivery.yaml", "{name}: created (revision 1)"),
    Row("apply -f {folder}/delivery.yaml", "{name}: unchanged", lambda told: told["outcome"] == "unchanged"),
    Row("apply -f {folder}/stricter.yaml --dry-run", "+", lambda told: told["diff"]),
    wrong("apply -f {folder}/broken.yaml", "serve.endpoint"),
    wrong("apply -f {folder}/nothing.yaml", "cannot read"),
    Row("deliveries", "{name}", lambda told: any(one["endpoint"] for one in told["deliveries"])),
]
TRAINED: list[Row | Act] = [
    Row(
        "run -f {folder}/delivery.yaml --source {folder}/source --detach",
        json=lambda told: told["training_id"],
        saves={"training": lambda told: told["training_id"]},
    ),
    Row("cancel {training}", "training {training}: ", lambda told: told["training_id"]),
    Row("attach {training}", "training cancelled", lambda told: told["status"] == "cancelled", code=1),
    Row("trainings --delivery {name}", "{training}", lambda told: len(told["trainings"]) == 1),
    wrong("cancel " + NOBODY, NOBODY),
    wrong("attach " + NOBODY, NOBODY),
    wrong("run -f {folder}/nothing.yaml", "cannot read"),
]
FIRST: list[Row | Act] = [
    wrong('predict {name} -d \'{{"x0": [[0.3]], "x1": [[0.1]]}}\'', "{name}"),
    wrong("deploy {folder}/nothing.onnx --endpoint {name} --samples {folder}/rows.csv", "there is no file"),
    *deploy(WEAK, 1),
    Row("approvals", "{approval}", lambda told: told["approvals"]),
    wrong("approve {approval}", "admin", 4),
    Row("approve {approval} -m fine", "{approval}: approved", lambda told: told["approval"]["status"] == "approved", by="bob"),
    wrong("approve " + NOBODY, NOBODY, by="bob"),
    Row("watch {name} --run {run} --timeout 90", "completed", lambda told: told["version"] == 1),
    Row("watch {name} --once", "completed", lambda told: told[0]["state"] == "completed"),
    wrong("watch nothing-{name} --once", "nothing-{name}"),
    Row("models", "{name}", lambda told: told["models"]),
    becomes("completed"),
    Row("models {name}", "champion", lambda told: told["versions"][0]["aliases"] == ["champion"]),
    wrong("models nothing-{name}", "there is no model"),
    Row("endpoints", "v1 100 %", lambda told: any(one["live_version"] == 1 for one in told["endpoints"])),
    Row("report {run}", "auc", lambda told: told["report"]["url"].startswith("http")),
    wrong("report " + NOBODY, NOBODY),
    wrong("rollout revert {name}", "revert"),
]
CALLED: list[Row | Act] = [
    Row(
        'predict {name} -d \'{{"x0": [[0.3]], "x1": [[0.1]]}}\'',
        "probability: [",
        lambda told: told["model_version"] == "1" and told["answer"]["outputs"],
        saves={"request": lambda told: told["request_id"]},
    ),
    wrong("predict {name} -d '{{\"x9\": 1}}'", "unknown inputs x9"),
    wrong("predict {name} -d nonsense", "--data is not JSON"),
    Act("the spans have come", trace_is_there),
    Row("trace {request}", "{name}", lambda told: told["lineage"]["version"]["version"] == 1),
    wrong("trace nonsense", "no span of this is kept"),
]
REJECTED: list[Row | Act] = [
    *deploy(GOOD, 2),
    Row("reject {approval} -m no", "{approval}: rejected", lambda told: told["approval"]["status"] == "rejected", by="bob"),
    wrong("reject {approval}", "may not vote", 4),
    Row("watch {name} --run {run} --timeout 90", "rejected", lambda told: told["state"] == "rejected", code=1),
    Row("approvals --all", "rejected", lambda told: any(one["status"] == "rejected" for one in told["approvals"])),
    wrong("promote {name} 2", "was rejected by bob"),
    Row("stage {name} 2 Archived --reason unwanted", "{name} v2: Archived", lambda told: told["version"]["stage"] == "Archived"),
    wrong("stage {name} 2 Nowhere", "stage"),
]
ROLLED: list[Row | Act] = [
    Row("promote {name} 2 --override --reason why-not", json=lambda told: told["version"]["ref"]["version"] == 2),
    becomes("shadowing"),
    Row("rollouts --endpoint {name}", "shadowing", lambda told: told["rollouts"][0]["state"] == "shadowing"),
    Row("rollout show {name}", "{name} v2: shadowing", lambda told: told["rollout"]["ref"]["version"]["version"] == 2),
    Row("rollout pause {name} --reason lunch", "paused", lambda told: told["rollout"]["paused"]),
    Row("rollout resume {name}", "{name}: shadowing", lambda told: not told["rollout"]["paused"]),
    Row("rollout abort {rollout_id} --reason enough", json=lambda told: told["rollout"]["ref"]["rollout_id"]),
    becomes("rolled_back"),
    Act("the registry has heard that it was aborted", lambda story: "enough" in story.world.versions()[2]["reason"]),
    Row("rollout explain {rollout_id}", "enough", lambda told: told["decisions"][-1]["to_state"] == "rolled_back"),
    wrong("rollout pause {name}", "rolled_back"),
    wrong("rollout resume {name}", "rolled_back"),
    wrong("rollout abort " + NOBODY, NOBODY),
    wrong("rollout show nothing-{name}", "has had no rollout"),
    wrong("rollout explain nothing-{name}", "has had no rollout"),
]
REVERTED: list[Row | Act] = [
    Row("promote {name} 2 --override", "{name} v2: Staging"),
    Act("the second rollout completes", walks_to_the_end),
    Row("rollout revert {name} --reason a-hunch", json=lambda told: told["rollout"]["state"] in ("reverting", "reverted")),
    becomes("reverted"),
    Row("sync export {folder}/mlruns --experiment {name}", json=lambda told: told["taken"]["runs"]),
    Row("sync import {folder}/mlruns --dry-run", json=lambda told: told["taken"]["runs"]),
    Row("audit --target model/{name}/2", "why-not", lambda told: told["entries"]),
]
LETTERS: list[Row | Act] = [
    Act("an event is sent", park),
    Act("the event is parked", is_parked),
    Row("dlq list", "{parked}", lambda told: told["dead_letters"]),
    Row(f"dlq show {PARKED} 1", "run.finished", lambda told: base64.b64decode(told["dead_letter"]["payload"]) == b"\xff\xff"),
    wrong(f"dlq show {PARKED} 9", "9"),
    Row(f"dlq replay {PARKED}", "applied 0, remaining 1", lambda told: told["remaining"] == 1, code=1),
    wrong("dlq replay nobody c t k", "nobody consumes no events"),
    Row(f"dlq drop {PARKED} 1 --reason nonsense", "{parked} #1: dropped"),
    wrong(f"dlq drop {PARKED} 1 --reason nonsense", "{parked}"),
    Row(f"dlq replay {PARKED}", "applied 0, remaining 0", lambda told: not told["remaining"]),
]
LEFT: list[Row | Act] = [
    Row("keys revoke {key}", "{key}: revoked", lambda told: told["key"]["revoked"]),
    Row("delete {name}", "{name}: deleted", lambda told: told["deleted"]),
    wrong("delete nothing-{name}", "nothing-{name}"),
]
STORY = [*HERE, *DATA, *PEOPLE, *APPLIED, *TRAINED, *FIRST, *CALLED, *REJECTED, *ROLLED, *REVERTED, *LETTERS, *LEFT]


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


def test_every_command_is_called_in_the_story() -> None:
    called = [row.words.split() for row in STORY if isinstance(row, Row)]
    known = commands(typer.main.get_command(app))
    assert [path for path in known if not any(words[: len(path)] == list(path) for words in called)] == []


def test_a_story_told_by_commands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = world.delivery(approvals=1).replace("evaluate:\n", f"{TRAIN_SECTION}evaluate:\n", 1)
    (tmp_path / "delivery.yaml").write_text(text)
    (tmp_path / "stricter.yaml").write_text(text.replace("auc.at_least 0.6", "auc.at_least 0.7"))
    (tmp_path / "broken.yaml").write_text(text.replace(f"endpoint: {world.name}", "endpoint: NO SPACES PLEASE"))
    (tmp_path / "rows.csv").write_text(f"x0,x1,label\n0.5,0.25,1\n{world.name},0,0\n")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("HEADRACE_URL", world.url)
    story = Story(world, tmp_path, monkeypatch, capsys)
    for row in STORY:
        if isinstance(row, Row):
            story.play(row)
        else:
            eventually(partial(row.does, story), what=row.what)
    # The console script itself, in a process of its own.
    script = [str(Path(sys.executable).with_name("headrace")), "models", "--json"]
    done = subprocess.run(script, env={**os.environ, "HEADRACE_API_KEY": world.key}, capture_output=True, text=True, check=True, timeout=60)
    assert any(model["name"] == world.name for model in json.loads(done.stdout)["models"])
