"""Takes a holdout apart: the label stays with us, all other columns go to a file that a model's process may read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaluator.domain.statistics import Floats
from evaluator.ports import Unjudgeable

MAX_ROWS = 5_000_000
MAX_COLUMNS = 2_000
MAX_BYTES = 2 * 1024**3
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_TEXT = "BYTE_ARRAY"


class ParquetHoldout:
    """Reads holdouts that were pushed as Parquet; writes the rest as an Arrow file.

    A few KB of Parquet may unpack to any size, so it is measured before it is read: `max_bytes` is what its columns may take in memory.
    """

    def __init__(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes

    def split(self, file: Path, label: str, rows: Path) -> Floats:
        try:
            self._check_size(file)
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

    def _check_size(self, file: Path) -> None:
        """Raises Unjudgeable for a file that would take too much memory, without having it all in memory."""
        with pq.ParquetFile(file) as opened:
            told, fields = opened.metadata, {field.name: field.type for field in opened.schema_arrow}
        if told.num_rows > self._max_rows or told.num_columns > MAX_COLUMNS:
            found = f"{told.num_rows} rows of {told.num_columns} columns"
            raise Unjudgeable(f"the holdout has {found}: at most {self._max_rows} rows of {MAX_COLUMNS} are read")
        packed = unpacked = 0
        texts: set[str] = set()
        for group in range(told.num_row_groups):
            for number in range(told.num_columns):
                chunk, leaf = told.row_group(group).column(number), told.schema.column(number)
                packed += chunk.total_uncompressed_size
                if chunk.physical_type == _TEXT:
                    texts.add(leaf.path)
                unpacked += chunk.num_values * max(_WIDTHS.get(chunk.physical_type, leaf.length), _width(fields.get(leaf.path)))
        self._check_bytes(max(packed, unpacked))
        for name in sorted(texts):
            if name not in fields:
                raise Unjudgeable(
                    f"the holdout's column {name.partition('.')[0]!r} holds text in lists or structures, which no model is asked with"
                )
            # One long text may stand in every row and be in the file once: kept so, each row is a number here.
            with pq.ParquetFile(file, read_dictionary=[name]) as opened:
                for batch in opened.iter_batches(columns=[name]):
                    unpacked += _text_bytes(batch.column(0))
                    self._check_bytes(unpacked)

    def _check_bytes(self, size: int) -> None:
        if size > self._max_bytes:
            raise Unjudgeable(f"the holdout takes {size} bytes or more in memory, and {self._max_bytes} is the most that is read")


def _width(kind: pa.DataType | None) -> int:
    """Bytes of one value of a plain type; 0 where that is not fixed."""
    try:
        return 0 if kind is None else -(-kind.bit_width // 8)
    except ValueError:
        return 0


def _text_bytes(column: pa.Array) -> int:
    if not isinstance(column, pa.DictionaryArray):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)


def _booleans(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_pylist(), dtype=np.float64)
