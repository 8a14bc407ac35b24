"""Prints branch coverage by member from a report of `coverage json`. Ends with 1 when a member is below the aim."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

AIM = 95.0
"""Percent of the branches of each member."""


def member(path: str) -> str:
    """The member to which a file counts: `eventing`, `tracker.domain` and so on."""
    parts = Path(path).parts
    package = parts[parts.index("src") + 1]
    return f"{package}.domain" if "domain" in parts else package


def main() -> None:
    """Entry point: the report's path is the only argument."""
    files: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())["files"]
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path, content in files.items():
        sums[member(path)].update({name: content["summary"][name] for name in content["summary"] if not name.startswith("percent")})
    grid = Table("member", "lines", "", "branches", "", "", box=None, header_style="bold", pad_edge=False)
    below = []
    for name, total in sorted(sums.items()):
        lines, branches = (
            100 * total[f"covered_{what}"] / total[of] for what, of in (("lines", "num_statements"), ("branches", "num_branches"))
        )
        if branches < AIM:
            below.append(name)
        grid.add_row(
            name,
            f"{lines:.1f} %",
            f"{total['covered_lines']}/{total['num_statements']}",
            f"{branches:.1f} %",
            f"{total['covered_branches']}/{total['num_branches']}",
            f"[red]below {AIM:g} %[/]" if branches < AIM else "",
        )
    Console(width=120, highlight=False).print(grid)
    if below:
        sys.exit(1)
    if not sums:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
