"""How commands print: tables for people, `--json` for programs, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.http import HeadraceError, InvalidInput

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Into a file or a pipe, lines are as long as they need to be.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout; says so when it is empty."""
    grid = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    count = 0
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))  # not str: what is in brackets would be read as markup
        count += 1
    if count:
        console.print(grid)
    else:
        console.print("none")


def fail(error: HeadraceError, *, as_json: bool) -> None:
    """Prints an error: as JSON on stdout for programs, as a sentence on stderr for people."""
    violations = error.violations if isinstance(error, InvalidInput) else ()
    if as_json:
        print_json({"error": {"message": str(error), "violations": list(violations)}})
        return
    errors.print(Text.assemble(("error", "bold red"), f": {error}"))
    for violation in violations:
        line = f"line {violation['line']}: " if violation.get("line") else ""
        errors.print(f"  {line}{violation.get('field', '')}: {violation.get('message', '')}", markup=False)


def say(text: str) -> None:
    """A line of progress on stderr, so that stdout stays what was asked for."""
    print(text, file=sys.stderr, flush=True)
