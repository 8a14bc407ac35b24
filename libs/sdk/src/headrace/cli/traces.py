"""headrace trace: from one prediction back to version, evaluation, run, data and commit, and the causal tree of spans."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.tree import Tree

from headrace.cli.output import JsonFlag, console, print_json
from headrace.http import Client, Json


def register(app: typer.Typer) -> None:
    app.command()(trace)


def trace(
    id: Annotated[str, typer.Argument(help="A request's id (X-Request-Id), a run's id, or a trace id.")],
    json: JsonFlag = False,
) -> None:
    """Walk from a prediction, or from a run, to everything that led to it."""
    with Client() as client:
        answer = client.get(f"/api/v1/traces/{id}")
    if json:
        print_json(answer)
        return
    if lineage := answer.get("lineage"):
        _lineage(lineage)
    if answer.get("note"):
        console.print(answer["note"], style="yellow", markup=False)
    for root in answer.get("tree", []):
        console.print(_branch(root, None))


def _lineage(lineage: Json) -> None:
    """One line per step back in time."""
    for label, value in lineage.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items() if v not in ("", None)) if isinstance(value, dict) else str(value)
        console.print(f"[bold]{label:<11}[/]", end=" ")
        console.print(text, markup=False, soft_wrap=True)


def _branch(span: dict[str, Any], parent: Tree | None) -> Tree:
    error = " [red]error[/]" if span.get("status") == "error" else ""
    link = "[dim]~>[/] " if span.get("linked") else ""
    text = f"{link}[bold]{span['service']}[/] {span['name']}  [dim]{span['duration_ms']:.1f} ms[/]{error}"
    node = Tree(text) if parent is None else parent.add(text)
    for child in span.get("children", []):
        _branch(child, node)
    return node
