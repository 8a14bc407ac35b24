"""headrace endpoints, rollouts, and headrace rollout show|explain|pause|resume|abort|revert."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.output import JsonFlag, console, print_json, table
from headrace.http import Client, InvalidInput, Json

rollout = typer.Typer(help="One rollout: named by its id, or by its endpoint for the newest one.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(help="A rollout's id, or an endpoint.")]


def register(app: typer.Typer) -> None:
    app.command()(endpoints)
    app.command()(rollouts)
    app.add_typer(rollout, name="rollout")


def endpoints(json: JsonFlag = False) -> None:
    """The endpoints, and which version has which share of each."""
    with Client() as client:
        answer = client.get("/api/v1/endpoints")
    if json:
        print_json(answer)
        return
    table(
        ["endpoint", "delivery", "live", "arms", "revision"],
        (
            [
                e["name"],
                e["delivery"],
                f"v{e['live_version']}" if e["live_version"] else "",
                ", ".join(f"v{a['version']} {a['weight_bps'] / 100:g} %" for a in (e["route"] or {}).get("arms", [])),
                (e["route"] or {}).get("revision", ""),
            ]
            for e in answer["endpoints"]
        ),
    )


def rollouts(
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Only of this endpoint.")] = None, json: JsonFlag = False
) -> None:
    """The rollouts, newest first."""
    with Client() as client:
        answer = client.get("/api/v1/rollouts", endpoint=endpoint)
    if json:
        print_json(answer)
        return
    table(
        ["rollout", "endpoint", "version", "state", "weight", "created", "reason"],
        (
            [
                r["ref"]["rollout_id"],
                r["ref"]["endpoint"],
                r["ref"]["version"]["version"],
                _state(r),
                f"{r['weight_bps'] / 100:g} %",
                r["created_at"],
                r["reason"],
            ]
            for r in answer["rollouts"]
        ),
    )


@rollout.command()
def show(which: Which, json: JsonFlag = False) -> None:
    """Where a rollout stands: state, weight, and the evidence of each guard."""
    with Client() as client:
        answer = client.get(f"/api/v1/rollouts/{_find(client, which)}")
    if json:
        print_json(answer)
        return
    found = answer["rollout"]
    ref = found["ref"]
    console.print(
        f"{ref['endpoint']} v{ref['version']['version']}: {_state(found)}, {found['weight_bps'] / 100:g} % {found['reason']}", markup=False
    )
    _guards(found)


@rollout.command()
def explain(
    which: Which,
    windows: Annotated[bool, typer.Option("--windows", help="Also the windows that changed nothing.")] = False,
    json: JsonFlag = False,
) -> None:
    """Every decision of a rollout, and why it was taken."""
    with Client() as client:
        answer = explained(client, _find(client, which))
    if json:
        print_json(answer)
        return
    decisions = [d for d in answer["decisions"] if windows or d["from_state"] != d["to_state"]]
    table(
        ["#", "at", "from", "to", "why"], ([d["sequence"], d["at"][11:23], d["from_state"], d["to_state"], d["reason"]] for d in decisions)
    )
    if hidden := len(answer["decisions"]) - len(decisions):
        console.print(f"{hidden} windows changed nothing (--windows shows them)", style="dim")
    _guards(answer["rollout"])


def explained(client: Client, rollout_id: str) -> Json:
    """A rollout and its whole log: `rollout` as it stands, `decisions` oldest first. Raises what `client` raises."""
    path, page = f"/api/v1/rollouts/{rollout_id}/explain", {"page_size": 1000}
    answer = client.get(path, **page)
    while token := answer.pop("next_page_token", ""):
        further = client.get(path, **page, page_token=token)
        answer = {**further, "decisions": answer["decisions"] + further["decisions"]}
    return answer


@rollout.command()
def pause(
    which: Which,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept among the rollout's decisions.")] = "",
    json: JsonFlag = False,
) -> None:
    """Stay at this step until resumed. Guards go on watching."""
    _command("pause", which, {"reason": reason}, json)


@rollout.command()
def resume(which: Which, json: JsonFlag = False) -> None:
    """Go on."""
    _command("resume", which, {}, json)


@rollout.command()
def abort(
    which: Which,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept among the rollout's decisions.")] = "",
    json: JsonFlag = False,
) -> None:
    """Give all traffic back to the version before."""
    _command("abort", which, {"reason": reason}, json)


@rollout.command()
def revert(
    which: Which,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept among the rollout's decisions.")] = "",
    json: JsonFlag = False,
) -> None:
    """Take a completed rollout back, within its rollback window."""
    _command("revert", which, {"reason": reason}, json)


def _command(verb: str, which: str, body: Json, json: bool) -> None:
    with Client() as client:
        answer = client.post(f"/api/v1/rollouts/{_find(client, which)}/{verb}", body, repeatable=True)
    print_json(answer) if json else console.print(f"{answer['rollout']['ref']['endpoint']}: {_state(answer['rollout'])}")


def _find(client: Client, which: str) -> str:
    """An id is taken as it is; an endpoint means its newest rollout."""
    if len(which) == 36 and which.count("-") == 4:
        return which
    found = client.get("/api/v1/rollouts", endpoint=which, page_size=1)["rollouts"]
    if not found:
        raise InvalidInput(f"the endpoint {which} has had no rollout")
    return str(found[0]["ref"]["rollout_id"])


def _state(found: Json) -> str:
    step = f"({found['step'] + 1})" if found["state"] == "stepping" else ""
    return str(found["state"]) + step + (" paused" if found["paused"] else "") + (" held" if found["held"] else "")


def _guards(found: Json) -> None:
    if found["guards"]:
        table(
            ["guard", "canary bad", "baseline bad", "harm wealth", "no-harm wealth", "canary requests"],
            (
                [
                    g["id"],
                    f"{g['canary_bad_rate']:.2%}",
                    f"{g['baseline_bad_rate']:.2%}",
                    f"{g['harm_wealth']:.3g}",
                    f"{g['no_harm_wealth']:.3g}",
                    g["canary_requests"],
                ]
                for g in found["guards"]
            ),
        )
