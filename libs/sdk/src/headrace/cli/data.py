"""headrace data push|pull|list: versioned data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.output import JsonFlag, console, print_json, table
from headrace.datasets import pull_dataset, push_dataset
from headrace.http import Client

data = typer.Typer(help="Data sets: immutable versions of files.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(data, name="data")


@data.command()
def push(
    name: Annotated[str, typer.Argument(help="The data set.")],
    path: Annotated[Path, typer.Argument(help="The file.")],
    holdout: Annotated[bool, typer.Option("--holdout", help="Models are judged on it: no training may read it. Never changes.")] = False,
    json: JsonFlag = False,
) -> None:
    """Upload a file as the next version. The same content answers the version that it has."""
    with Client() as client:
        version = push_dataset(name, path, holdout=holdout, client=client)
    if json:
        print_json({"name": version.name, "version": version.version, "sha256": version.sha256, "holdout": version.holdout})
    else:
        console.print(f"{version.name} version {version.version}{', a holdout' if version.holdout else ''} (sha256 {version.sha256[:12]})")


@data.command()
def pull(
    name: Annotated[str, typer.Argument(help="The data set.")],
    path: Annotated[Path, typer.Argument(help="Where to write it.")],
    version: Annotated[int, typer.Option("--version", help="Default: the newest.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Download a version, and verify it."""
    with Client() as client:
        found = pull_dataset(name, path, version, client=client)
    if json:
        print_json({"name": found.name, "version": found.version, "sha256": found.sha256, "holdout": found.holdout, "path": str(path)})
    else:
        console.print(f"{found.name} version {found.version} in {path}")


@data.command("list")
def list_datasets(json: JsonFlag = False) -> None:
    """Every data set's newest version."""
    with Client() as client:
        answer = client.get("/api/v1/datasets")
    if json:
        print_json(answer)
        return
    table(
        ["name", "version", "size MB", "sha256", "holdout"],
        (
            [
                d["ref"]["name"],
                d["ref"]["version"],
                f"{d['blob']['size_bytes'] / 1e6:.1f}",
                d["ref"]["sha256"][:12],
                "yes" if d["holdout"] else "",
            ]
            for d in answer["datasets"]
        ),
    )
