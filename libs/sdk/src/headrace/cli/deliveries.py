"""headrace apply, delete, deliveries, watch, deploy: what is carried to production, and where it is."""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.output import JsonFlag, console, print_json, say, table
from headrace.http import Client, HeadraceError, InvalidInput, Json
from headrace.runs import start_run

# How a journey ends; anything else is on its way.
GOOD_ENDS = frozenset({"completed"})
BAD_ENDS = frozenset({"failed", "rolled_back", "skipped", "superseded", "reverted", "rejected", "archived"})
_DESCRIPTION = (
    '{"signature": {"inputs": [{"name", "datatype", "shape"}, ..], "outputs": [..]}, '
    '"samples": {"inputs": {name: rows}, "outputs": {name: rows}}}'
)

_PROGRESS_S, _QUIET_S = 10.0, 30.0
"""That counts go up is told no more often than the first; that nothing happens, after the second."""


def register(app: typer.Typer) -> None:
    app.command()(apply)
    app.command()(delete)
    app.command("deliveries")(list_deliveries)
    app.command()(watch)
    app.command()(deploy)


def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="The delivery file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the difference.")] = False,
    json: JsonFlag = False,
) -> None:
    """Apply a delivery file. Applying it again changes nothing."""
    try:
        text = file.read_text()
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}") from None
    with Client() as client:
        answer = client.post("/api/v1/deliveries/apply", {"yaml": text, "dry_run": dry_run}, repeatable=True)
    if json:
        print_json(answer)
        return
    delivery = answer["delivery"]
    if answer.get("diff"):
        print(answer["diff"].rstrip())
    for field in answer.get("loosened", []):
        console.print(f"looser than before: {field}", markup=False)
    console.print(f"{delivery['name']}: {'would be ' if dry_run else ''}{answer['outcome']} (revision {delivery['revision']})")


def delete(name: Annotated[str, typer.Argument(help="The delivery.")], json: JsonFlag = False) -> None:
    """Undo apply: withdraw the endpoint and free the names that the delivery claims. The model and its versions stay."""
    with Client() as client:
        client.delete(f"/api/v1/deliveries/{name}")
    print_json({"deleted": name}) if json else console.print(f"{name}: deleted")


def list_deliveries(json: JsonFlag = False) -> None:
    """The deliveries and what each claims."""
    with Client() as client:
        answer = client.get("/api/v1/deliveries")
    if json:
        print_json(answer)
        return
    table(
        ["name", "revision", "experiment", "model", "endpoint", "applied by"],
        ([d["name"], d["revision"], d["experiment"], d["model"], d["endpoint"], d["applied_by"]] for d in answer["deliveries"]),
    )


def watch(
    name: Annotated[str, typer.Argument(help="The delivery.")],
    run: Annotated[str | None, typer.Option("--run", help="Follow the journey of this run; the newest one when left out.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show where everything is, and stop.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for an end.")] = 3600.0,
    json: JsonFlag = False,
) -> None:
    """Where the runs of a delivery are on their way; follows one to its end. Ends with 1 when it did not reach production."""
    with Client() as client:
        if once:
            journeys = client.get(f"/api/v1/deliveries/{name}/journeys")["journeys"]
            print_json(journeys) if json else _journey_table(journeys)
            return
        last = follow(client, name, run, timeout_s=timeout, quiet=json)
    if json:
        print_json(last)
    if last["state"] not in GOOD_ENDS:
        raise typer.Exit(1)


def follow(client: Client, name: str, run_id: str | None, *, timeout_s: float, quiet: bool = False) -> Json:
    """Polls a journey until it has ended, printing every change on stderr; returns it. Raises HeadraceError when time runs out.

    Who stops looking is told how to go on: nothing stops with them.
    """
    try:
        return _followed(client, name, run_id, timeout_s, quiet)
    except KeyboardInterrupt:
        say(f"{name} goes on by itself: `headrace watch {name}{f' --run {run_id}' if run_id else ''}` follows it again")
        raise


def _followed(client: Client, name: str, run_id: str | None, timeout_s: float, quiet: bool) -> Json:
    deadline = time.monotonic() + timeout_s
    seen: tuple[Any, ...] = ()
    told: tuple[Any, ...] = ()
    told_at = changed_at = time.monotonic()
    wondered = False
    while True:
        journeys = client.get(f"/api/v1/deliveries/{name}/journeys", run_id=run_id)["journeys"]
        journey: Json = journeys[0] if journeys else {"state": "waiting", "detail": "no candidate yet", "run_id": run_id or ""}
        now = (journey.get("journey_id"), journey["state"], journey.get("detail"))
        clock = time.monotonic()
        if now != seen:
            seen, changed_at, wondered = now, clock, False
        version = f" v{journey['version']}" if journey.get("version") else ""
        line = f"{time.strftime('%H:%M:%S')}  {name}{version}  {journey['state']}"
        if not quiet and now != told and (now[:2] != told[:2] or clock - told_at >= _PROGRESS_S):
            say(f"{line}  {journey.get('detail', '')}")
            told, told_at = now, clock
        if not quiet and not wondered and journey["state"] in ("shadowing", "stepping") and clock - changed_at >= _QUIET_S:
            say(f"{line}  nothing new for {_QUIET_S:.0f} s: it goes on when the endpoint gets traffic")
            wondered = True
        if journey["state"] in GOOD_ENDS | BAD_ENDS:
            return journey
        if time.monotonic() > deadline:
            raise HeadraceError(f"{name} is still {journey['state']} after {timeout_s:.0f} s: {journey.get('detail', '')}")
        time.sleep(0.5)


def deploy(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    endpoint: Annotated[str, typer.Option("--endpoint", help="The endpoint; a delivery must claim it.")],
    samples: Annotated[
        Path,
        typer.Option("--samples", help=f"JSON: {_DESCRIPTION}."),
    ],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")] = True,
    json: JsonFlag = False,
) -> None:
    """Send a model file straight to an endpoint: it becomes a run of the delivery's experiment and passes the same gates."""
    if not model.is_file():
        raise InvalidInput(f"there is no file {model}")
    try:
        description = jsonlib.loads(samples.read_text())
        signature, rows = description["signature"], description["samples"]
    except OSError as error:
        raise InvalidInput(f"cannot read {samples}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InvalidInput(f"{samples} must hold a JSON object: {_DESCRIPTION}") from None
    with Client() as client:
        delivery = next((d for d in client.get("/api/v1/deliveries")["deliveries"] if d["endpoint"] == endpoint), None)
        if delivery is None:
            raise InvalidInput(f"no delivery claims the endpoint {endpoint}: write one and `headrace apply` it first")
        with start_run(delivery["experiment"], name=f"deploy {model.name}", tags={"headrace.source": "deploy"}) as run:
            try:
                run.log_model(model, signature=signature, samples=rows)
            except InvalidInput as error:
                raise InvalidInput(str(error), code=error.code, violations=_of_files(error.violations, model, samples)) from None
        if not wait:
            print_json({"run_id": run.id}) if json else console.print(
                f"run {run.id}; follow it with `headrace watch {delivery['name']} --run {run.id}`"
            )
            return
        journey = follow(client, delivery["name"], run.id, timeout_s=3600.0, quiet=json)
    if json:
        print_json(journey)
    if journey["state"] not in GOOD_ENDS:
        raise typer.Exit(1)


def _of_files(violations: tuple[Json, ...], model: Path, samples: Path) -> tuple[Json, ...]:
    """What is wrong, with the files that were given in place of the fields that they became."""

    def named(field: str) -> str:
        return {"path": str(model), "samples_path": str(samples)}.get(field, f"{samples}: {field}")

    return tuple({**violation, "field": named(str(violation.get("field", "")))} for violation in violations)


def _journey_table(journeys: list[Json]) -> None:
    table(
        ["run", "version", "state", "since", "detail"],
        ([j["run_id"][:8], j.get("version") or "", j["state"], j.get("at", ""), j.get("detail", "")] for j in journeys),
    )
