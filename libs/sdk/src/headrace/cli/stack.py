"""headrace up, down, status, logs: the local stack."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.output import JsonFlag, console, print_json, say, table
from headrace.config import state_dir
from headrace.http import HeadraceError, InvalidInput

StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where the local stack keeps everything. Default: .headrace here or above.")
]


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(logs)


def _api() -> Any:
    try:
        from localstack import api
    except ImportError:
        raise InvalidInput(
            "the local stack is not installed here: install headrace-localstack, or set HEADRACE_URL to a running gateway"
        ) from None
    return api


@contextmanager
def _told() -> Iterator[Any]:
    """The local stack; its errors are sentences already and end the command as ours do."""
    api = _api()
    from localstack.errors import StackError

    try:
        yield api
    except StackError as error:
        raise HeadraceError(str(error)) from None


def up(state: StateDir = None, json: JsonFlag = False) -> None:
    """Start PostgreSQL, Kafka, S3, Triton and the six services on this machine. Starting again changes nothing."""
    with _told() as api:
        info = api.up(state or state_dir(), progress=not json)
        moved = api.moved(info)
    if json:
        print_json(info.as_dict())
        return
    if moved:
        say(moved)
    key = Path(info.state_dir) / "secrets" / "admin-key"
    print(f"ready: {info.gateway_url}   (state in {info.state_dir}; `headrace status`, `headrace logs`, `headrace down`)")
    print(f"the admin key is in {key}; in other folders than this one and those below it, first:")
    print(f"  export HEADRACE_URL={info.gateway_url} HEADRACE_API_KEY=$(cat {shlex.quote(str(key))})")


def down(state: StateDir = None, json: JsonFlag = False) -> None:
    """Stop everything that `up` started. What is stored stays."""
    with _told() as api:
        stopped = api.down(state or state_dir())
    if json:
        print_json({"stopped": stopped})
    else:
        console.print(f"stopped {len(stopped)} processes" if stopped else "nothing was running")


def status(state: StateDir = None, json: JsonFlag = False) -> None:
    """What runs: process, port, readiness, restarts, memory."""
    with _told() as api:
        rows = api.status(state or state_dir())
    if json:
        print_json([row.as_dict() for row in rows])
    elif not rows:
        console.print("none: no stack was started here; `headrace up` starts one")
    else:
        table(
            ["name", "state", "pid", "port", "restarts", "memory MB", "detail"],
            ([r.name, r.state, r.pid, r.port, r.restarts, f"{r.rss_bytes / 1e6:.0f}" if r.rss_bytes else "", r.detail] for r in rows),
        )
    if not rows or any(row.state != "ready" for row in rows):
        raise typer.Exit(1)


def logs(
    names: Annotated[list[str] | None, typer.Argument(help="Servers and services, as `headrace status` names them. Default: all.")] = None,
    state: StateDir = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing lines as they come, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines of each.")] = 50,
    json: JsonFlag = False,
) -> None:
    """The last lines that the servers and services of this machine logged. As JSON: an object of name and line on each line."""
    with _told() as api:
        for told in api.logs(state or state_dir(), names or [], follow=follow, lines=lines):
            name, _, line = told.partition(" | ")
            print(jsonlib.dumps({"name": name.rstrip(), "line": line}) if json else told, flush=True)
