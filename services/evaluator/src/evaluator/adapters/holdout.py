"""Takes a holdout apart: the label stays with us, all other columns go to a file that a model's process may read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluator.domain.statistics import Floats
from evaluator.ports import Unjudgeable


class ParquetHoldout:
    """Reads holdouts that were pushed as Parquet; writes the rest as an Arrow file."""

    def split(self, file: Path, label: str, rows: Path) -> Floats:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise Unjudgeable(f"the holdout is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
        if label not in table.column_names:
            raise Unjudgeable(f"the holdout has no column {label!r} for the label; it has {', '.join(table.column_names)}")
        column = table[label]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
            raise Unjudgeable(f"the holdout's label column {label!r} holds {column.type}, and not 0 and 1")
        if column.null_count:
            raise Unjudgeable(f"the holdout's label column {label!r} has {column.null_count} gaps")
        labels: Floats = column.cast(pa.float64()).to_numpy() if not pa.types.is_boolean(column.type) else _booleans(column)
        features = table.drop_columns([label])
        # Arrow's file form can be mapped into memory by the process that predicts.
        with pa.OSFile(str(rows), "wb") as sink, pa.ipc.new_file(sink, features.schema) as writer:
            writer.write_table(features)
        return labels


def _booleans(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_pylist(), dtype=np.float64)
