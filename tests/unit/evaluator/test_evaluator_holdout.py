"""A holdout is measured before it is read: a small file may unpack to any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluator.adapters import holdout
from evaluator.adapters.holdout import ParquetHoldout
from evaluator.ports import Unjudgeable

ROWS = 200_000
LATE = pa.array(np.arange(ROWS) % 2)


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array(np.zeros(ROWS)), "in memory"),
        (pa.array(["x" * 1_000] * ROWS), "in memory"),
        (pa.array([b"x" * 1_000] * ROWS), "in memory"),
        (pa.array(["x" * 1_000] * ROWS).dictionary_encode(), "in memory"),
        (pa.array([[0.0] * 10] * ROWS), "in memory"),
        (pa.array([["x"]] * ROWS), "lists or structures"),
    ],
)
def test_a_small_file_that_takes_much_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: pa.Array, why: str
) -> None:
    file = tmp_path / "holdout"
    pq.write_table(pa.table({"x": column, "late": LATE}), file, compression="zstd")
    assert file.stat().st_size < 100_000
    monkeypatch.setattr(pq, "read_table", lambda _file: pytest.fail("it was read"))
    with pytest.raises(Unjudgeable, match=why):
        ParquetHoldout(max_bytes=3_000_000 if why == "in memory" else 10**9).split(file, "late", tmp_path / "rows")


def test_too_many_rows_or_columns_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "holdout"
    pq.write_table(pa.table({"late": LATE}), file)
    with pytest.raises(Unjudgeable, match=f"has {ROWS} rows of 1 columns: at most 1000 rows"):
        ParquetHoldout(max_rows=1_000).split(file, "late", tmp_path / "rows")
    pq.write_table(pa.table({f"c{n}": [0] for n in range(holdout.MAX_COLUMNS + 1)}), file)
    with pytest.raises(Unjudgeable, match="columns"):
        ParquetHoldout().split(file, "c0", tmp_path / "rows")


def test_what_fits_is_taken_apart(tmp_path: Path) -> None:
    table = pa.table(
        {
            "x": pa.array(np.arange(ROWS) / 7),
            "kind": pa.array(["early", None, "other", ""] * (ROWS // 4)),
            "list": pa.array([[1.0, 2.0]] * ROWS),
            "flag": pa.array([True, False] * (ROWS // 2)),
            "late": LATE,
        }
    )
    pq.write_table(table, tmp_path / "holdout")
    labels = ParquetHoldout().split(tmp_path / "holdout", "late", tmp_path / "rows")
    assert labels.tolist() == LATE.to_pylist()
    with pa.memory_map(str(tmp_path / "rows")) as source:
        assert pa.ipc.open_file(source).read_all().equals(table.drop_columns(["late"]))
