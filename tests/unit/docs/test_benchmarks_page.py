"""The page about benchmarks says what was measured last, and nothing else."""

from __future__ import annotations

from pathlib import Path

from tests.bench.run import quoted

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"


def test_the_table_is_the_last_results() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert table == quoted(), "put what `.venv/bin/python -m tests.bench.run --quote` prints into docs/benchmarks.md"
