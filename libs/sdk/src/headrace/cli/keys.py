"""headrace keys list|create|revoke: API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.output import JsonFlag, console, print_json, say, table
from headrace.http import Client, HeadraceError

keys = typer.Typer(help="API keys: scoped, expiring, stored as hashes.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


@keys.command("list")
def list_keys(json: JsonFlag = False) -> None:
    """Every key, without its secret."""
    with Client() as client:
        answer = client.get("/api/v1/keys")
    if json:
        print_json(answer)
        return
    table(
        ["key", "subject", "roles", "endpoints", "expires", "state"],
        (
            [
                k["key_id"],
                k["subject"],
                " ".join(k["roles"]),
                " ".join(k["inference_endpoints"]),
                k.get("expires_at") or "never",
                "revoked" if k["revoked"] else "valid",
            ]
            for k in answer["keys"]
        ),
    )


@keys.command()
def create(
    subject: Annotated[str, typer.Argument(help="Whom the key stands for.")],
    role: Annotated[list[str] | None, typer.Option("--role", help="viewer, editor, approver, admin or frontend; may be repeated.")] = None,
    endpoint: Annotated[list[str] | None, typer.Option("--endpoint", help="An endpoint it may call, * for all; may be repeated.")] = None,
    days: Annotated[int | None, typer.Option("--days", help="Days until it expires. Default: never.")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a key. Its text, alone on stdout, is shown once."""
    with Client() as client:
        answer = client.post(
            "/api/v1/keys", {"subject": subject, "roles": role or [], "inference_endpoints": endpoint or [], "expires_in_days": days}
        )
        if json:
            print_json(answer)
        else:
            print(answer["secret"], flush=True)
            key = answer["key"]
            say(f"key {key['key_id']} of {subject}, shown this once; it expires: {key.get('expires_at') or 'never'}")
        if wanted := set(endpoint or []) - {"*"}:
            _warn_of_missing(client, wanted)


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id.")], json: JsonFlag = False) -> None:
    """Take a key back; gateways know within a second."""
    with Client() as client:
        answer = client.delete(f"/api/v1/keys/{key_id}")
    print_json(answer) if json else console.print(f"{key_id}: revoked")


def _warn_of_missing(client: Client, wanted: set[str]) -> None:
    """A key may be made before its endpoint; a misspelt one would be noticed late."""
    try:
        known = {one["name"] for one in client.get("/api/v1/endpoints")["endpoints"]}
    except HeadraceError as error:  # the key is made and told
        say(f"warning: whether there is an endpoint {', '.join(sorted(wanted))} is not known: {error}")
        return
    if missing := sorted(wanted - known):
        say(f"warning: there is no endpoint {', '.join(missing)} yet (`headrace endpoints` lists them)")
