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


def _show(figures: list[Figure]) -> None:
    grid = Table("figure", "value", "unit", "aim", "reference", "", box=None, header_style="bold", pad_edge=False)
    for figure in figures:
        aim, value = figure["aim"], figure["value"]
        met = aim is None or (value <= aim if figure["lower_is_better"] else value >= aim)
        sign = "<=" if figure["lower_is_better"] else ">="
        grid.add_row(
            figure["name"],
            f"{value:,.4g}",
            figure["unit"],
            "" if aim is None else f"{sign} {aim:,.4g}",
            "" if figure["reference"] is None else f"{figure['reference']:,.4g}",
            "" if met else "[yellow]not met[/]",
        )
    Console(width=150).print(grid)


def _merge(new: list[Figure]) -> list[Figure]:
    """Figures of modules that were not run this time stay as they were."""
    before: list[Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {figure["name"] for figure in new}
    return sorted([figure for figure in before if figure["name"] not in names] + new, key=lambda figure: str(figure["name"]))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"which; all when left out: {', '.join(_modules())}")
    chosen = parser.parse_args().names or _modules()
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
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(_merge(measured), indent=1) + "\n")
    _show(measured)


if __name__ == "__main__":
    main()
