"""`make bench`: runs every bench_*.py here (or those named), prints its figures and writes them to results/latest.json.

A module has `async def figures(servers) -> list[Figure]`, where `servers` (a ThrowawayServers) starts real servers on first use. Nothing
is asserted: a figure says what was measured on this machine, beside its aim and, where there is one, a reference measured in the same run.
docs/benchmarks.md tells what each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TypedDict

from localstack.cache import cache_dir
from localstack.throwaway import ThrowawayServers
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latest.json"


class Figure(TypedDict):
    """One figure. `aim` and `reference` are None where there is none; all three are in `unit`."""

    name: str
    value: float
    unit: str
    aim: float | None
    lower_is_better: bool
    reference: float | None


def _modules() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def _met(figure: Figure) -> bool:
    aim, value = figure["aim"], figure["value"]
    return aim is None or (value <= aim if figure["lower_is_better"] else value >= aim)


def _aim(figure: Figure) -> str:
    return "" if figure["aim"] is None else f"{'≤' if figure['lower_is_better'] else '≥'} {figure['aim']:,.4g}"


def _show(figures: list[Figure]) -> None:
    grid = Table("figure", "value", "unit", "aim", "reference", "", box=None, header_style="bold", pad_edge=False)
    for figure in figures:
        grid.add_row(
            figure["name"],
            f"{figure['value']:,.4g}",
            figure["unit"],
            _aim(figure),
            "" if figure["reference"] is None else f"{figure['reference']:,.4g}",
            "" if _met(figure) else "[yellow]not met[/]",
        )
    Console(width=150).print(grid)


def quoted() -> list[str]:
    """The last results as docs/benchmarks.md quotes them: the lines of a table."""
    lines = ["| figure | value | aim | reference |", "|---|---|---|---|"]
    figures: list[Figure] = json.loads(RESULTS.read_text())
    for figure in figures:
        aim = _aim(figure) + ("" if _met(figure) else ", **not met**")
        reference = "" if figure["reference"] is None else f"{figure['reference']:,.4g}"
        lines.append(f"| {figure['name']} | {figure['value']:,.4g} {figure['unit']} | {aim} | {reference} |")
    return lines


def _merge(new: list[Figure]) -> list[Figure]:
    """Figures of modules that were not run this time stay as they were."""
    before: list[Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {figure["name"] for figure in new}
    return [figure for figure in before if figure["name"] not in names] + new


def _write(figures: list[Figure]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"which; all when left out: {', '.join(_modules())}")
    parser.add_argument("--quote", action="store_true", help="measure nothing: print the last results as a table for docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.quote:
        print("\n".join(quoted()))
        return
    chosen = arguments.names or _modules()
    if unknown := set(chosen) - set(_modules()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    measured: list[Figure] = []
    for name in chosen:
        print(f"measuring {name} (load of this machine: {os.getloadavg()[0]:.1f}) ...", file=sys.stderr, flush=True)
        module = importlib.import_module(f"tests.bench.bench_{name}")
        # Each has servers of its own, so that none runs beside what an earlier one has left.
        servers = ThrowawayServers(cache_dir() / "bench-servers")
        try:
            measured += asyncio.run(module.figures(servers))
        finally:
            servers.close()
        _write(_merge(measured))
    if set(chosen) == set(_modules()):
        _write(measured)  # what nobody measures any more goes
    _show(measured)


if __name__ == "__main__":
    main()
