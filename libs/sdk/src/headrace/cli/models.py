"""headrace models, promote, stage, approvals, approve, reject, audit, report."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from headrace.cli.output import JsonFlag, console, print_json, say, table
from headrace.http import Client, InvalidInput


def register(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(promote)
    app.command()(stage)
    app.command()(approvals)
    app.command()(approve)
    app.command()(reject)
    app.command()(audit)
    app.command()(report)


ModelName = Annotated[str, typer.Argument(help="The model.")]
VersionNumber = Annotated[int, typer.Argument(help="The version.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the audit log.")]


def models(name: Annotated[str | None, typer.Argument(help="A model, for its versions.")] = None, json: JsonFlag = False) -> None:
    """The models, or the versions of one."""
    with Client() as client:
        answer = client.get(f"/api/v1/models/{name}/versions") if name else client.get("/api/v1/models")
    if json:
        print_json(answer)
    elif name:
        table(
            ["version", "stage", "aliases", "run", "created", "reason"],
            (
                [v["ref"]["version"], v["stage"], " ".join(v["aliases"]), v["journey"]["run_id"][:8], v["created_at"], v["reason"]]
                for v in answer["versions"]
            ),
        )
    else:
        table(["model", "latest", "champion"], ([m["name"], m["latest_version"], m["champion_version"] or ""] for m in answer["models"]))


def promote(
    name: ModelName,
    version: VersionNumber,
    reason: Reason = "",
    override: Annotated[bool, typer.Option("--override", help="Admins only: pass the gates by. Recorded.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a version to production by hand, through the same gates."""
    with Client() as client:
        answer = client.post(f"/api/v1/models/{name}/versions/{version}/promote", {"reason": reason, "override": override})
    print_json(answer) if json else console.print(
        f"{name} v{version}: {answer['version']['stage']}, {answer['version']['reason']}", markup=False
    )


def stage(
    name: ModelName,
    version: VersionNumber,
    to: Annotated[str, typer.Argument(help="Development, Staging or Archived.")],
    reason: Reason = "",
    json: JsonFlag = False,
) -> None:
    """Move a version to another stage. Production is `headrace promote`."""
    with Client() as client:
        answer = client.post(f"/api/v1/models/{name}/versions/{version}/stage", {"stage": to, "reason": reason}, repeatable=True)
    print_json(answer) if json else console.print(f"{name} v{version}: {answer['version']['stage']}")


def approvals(all_: Annotated[bool, typer.Option("--all", help="Also the decided ones.")] = False, json: JsonFlag = False) -> None:
    """The approvals that are awaited, and the votes that each has and needs."""
    with Client() as client:
        answer = client.get("/api/v1/approvals", status=None if all_ else "pending")
    if json:
        print_json(answer)
        return
    table(
        ["approval", "model", "version", "status", "votes", "requested"],
        (
            [
                a["approval_id"],
                a["version"]["model"],
                a["version"]["version"],
                a["status"],
                f"{sum(v['approve'] for v in a['votes'])}/{a['needed']}",
                a["requested_at"],
            ]
            for a in answer["approvals"]
        ),
    )


def approve(
    approval: Annotated[str, typer.Argument(help="The approval's id.")],
    comment: Annotated[str, typer.Option("--comment", "-m", help="Said with the vote, and kept.")] = "",
    json: JsonFlag = False,
) -> None:
    """Approve a version. Needs the role approver; nobody approves what they made."""
    _decide(approval, True, comment, json)


def reject(
    approval: Annotated[str, typer.Argument(help="The approval's id.")],
    comment: Annotated[str, typer.Option("--comment", "-m", help="Said with the vote, and kept.")] = "",
    json: JsonFlag = False,
) -> None:
    """Reject a version."""
    _decide(approval, False, comment, json)


def _decide(approval: str, yes: bool, comment: str, json: bool) -> None:
    with Client() as client:
        try:
            answer = client.post(f"/api/v1/approvals/{approval}/decision", {"approve": yes, "comment": comment}, repeatable=True)
        except InvalidInput as error:
            if error.code != "NOT_FOUND" and not error.violations:  # such as one that was decided already
                raise
            reason = f"there is no approval {approval}; `headrace approvals` lists those that are awaited"
            raise InvalidInput(reason, code=error.code) from None
    print_json(answer) if json else console.print(f"{approval}: {answer['approval']['status']}")


def audit(
    target: Annotated[str | None, typer.Option("--target", help="Only this, as the list names it, such as delivery/flight-delays.")] = None,
    json: JsonFlag = False,
) -> None:
    """What was done to deliveries, versions, aliases, approvals and keys: who, what, why. Newest first.

    What a rollout decided, and who paused, aborted or reverted it, is in `headrace rollout explain`.
    """
    with Client() as client:
        answer = client.get("/api/v1/audit", target=target)
    if json:
        print_json(answer)
        return
    table(
        ["at", "actor", "action", "target", "reason"],
        ([e["at"], e["actor"], e["action"], e["target"], e["reason"]] for e in answer["entries"]),
    )


def report(
    evaluation: Annotated[str, typer.Argument(help="An evaluation's id, or a run's.")],
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    json: JsonFlag = False,
) -> None:
    """The report of an evaluation: gates, numbers, and where the page with the plots is."""
    with Client() as client:
        found = client.get("/api/v1/evaluations", run_id=evaluation)["evaluations"] if len(evaluation) == 32 else []
        item = found[0] if found else client.get(f"/api/v1/evaluations/{evaluation}")["evaluation"]
        if not item:
            raise InvalidInput(f"there is no evaluation {evaluation}")
        page = (
            client.get(f"/api/v1/evaluations/{item['evaluation_id']}/report", format="html")
            if (item["judgement"] or {}).get("report_html")  # what could not be judged has a reason, and no report
            else {"url": ""}
        )
    if json:
        print_json({"evaluation": item, "report": page})
        return
    console.print(f"evaluation {item['evaluation_id']}: {item['status']} {item['reason']}", markup=False)
    table(
        ["gate", "passed", "value", "limit", "detail"],
        (
            [g["name"], "yes" if g["passed"] else "NO", f"{g['value']:.4g}", f"{g['limit']:.4g}", g["detail"]]
            for g in (item.get("judgement") or {}).get("gates", [])
        ),
    )
    if page["url"]:
        console.print(page["url"], soft_wrap=True, markup=False)
        if open_ and not webbrowser.open(page["url"]):
            say("there is no browser here; open the address above where there is one")
