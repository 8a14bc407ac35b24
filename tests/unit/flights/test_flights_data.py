"""The example's data: what is in a row, what must not be, and the gaps as clients send them."""

from __future__ import annotations

import csv
import importlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

FLIGHTS = Path(__file__).parents[3] / "examples" / "flights"

FLIGHT_COLUMNS = "year,month,day,dep_time,dep_delay,arr_time,arr_delay,sched_dep_time,sched_arr_time,carrier,origin,dest,distance,time_hour"
WEATHER_COLUMNS = "origin,year,time_hour,temp,humid,wind_speed,wind_gust,precip,pressure,visib"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the example as its own folder does, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FLIGHTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == FLIGHTS:
            del sys.modules[name]


@pytest.fixture
def data(example: Any) -> ModuleType:
    module: ModuleType = example("data")
    return module


def flight(**changes: Any) -> dict[str, Any]:
    return {
        "year": 2013,
        "month": 4,
        "day": 2,
        "dep_time": 700,
        "dep_delay": 12,
        "arr_time": 1000,
        "arr_delay": 16,
        "sched_dep_time": 629,
        "sched_arr_time": 959,
        "carrier": "UA",
        "origin": "EWR",
        "dest": "IAH",
        "distance": 1400,
        "time_hour": "2013-04-02T10:00:00Z",
    } | changes


def weather(**changes: Any) -> dict[str, Any]:
    return {
        "origin": "EWR",
        "year": 2013,
        "time_hour": "2013-04-02T09:00:00Z",
        "temp": 50,
        "humid": 60.5,
        "wind_speed": 8.0,
        "wind_gust": "NA",
        "precip": 0.1,
        "pressure": "NA",
        "visib": 10,
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Writes flights and weather as the package has them, and returns the folder."""

    def write(flights: list[dict[str, Any]], observations: list[dict[str, Any]]) -> Path:
        for name, columns, rows in (
            ("flights.csv", FLIGHT_COLUMNS.split(","), flights),
            ("weather.csv", WEATHER_COLUMNS.split(","), observations),
        ):
            text = io.StringIO()
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
            if name == "weather.csv":
                (tmp_path / name).write_text(text.getvalue())
            else:
                with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
                    archive.writestr(name, text.getvalue())
        return tmp_path

    return write


@pytest.fixture
def archive(data: ModuleType, folder: Any, tmp_path: Path) -> Any:
    """Flights and weather as the archive that everything is made from."""

    def write(flights: list[dict[str, Any]], observations: list[dict[str, Any]]) -> Path:
        data.write_source(tmp_path / "flights.zip", folder(flights, observations))
        return tmp_path / "flights.zip"

    return write


def test_a_row_holds_what_is_known_before_departure_and_the_label(data: ModuleType, archive: Any) -> None:
    (row,) = data.load(archive([flight()], [weather()]), [4]).to_pylist()
    assert row == {
        "carrier": "UA",
        "origin": "EWR",
        "dest": "IAH",
        "day_of_year": 92,
        "weekday": 1,  # a Tuesday
        "sched_dep_time": 629,
        "sched_arr_time": 959,
        "distance": 1400,
        "humid": 60.5,
        "wind_speed": 8.0,
        "wind_gust": 0.0,
        "precip": pytest.approx(0.1),
        "pressure": 0.0,
        "visib": 10.0,
        "weather_missing": 0.0,
        "wind_gust_missing": 1.0,
        "pressure_missing": 1.0,
        "late": 1,
    }


def test_the_weather_is_that_of_the_hour_before(data: ModuleType, archive: Any) -> None:
    observations = [weather(time_hour=f"2013-04-02T{hour:02}:00:00Z", humid=hour) for hour in (8, 9, 10, 11)]
    (row,) = data.load(archive([flight()], observations), [4]).to_pylist()
    assert row["humid"] == 9


def test_without_an_observation_all_weather_is_missing(data: ModuleType, archive: Any) -> None:
    (row,) = data.load(archive([flight()], [weather(origin="JFK")]), [4]).to_pylist()
    assert [row[name] for name in ("weather_missing", "wind_gust_missing", "pressure_missing")] == [1, 1, 1]
    assert row["humid"] == 0


@pytest.mark.parametrize("changes", [{"dep_time": 2, "dep_delay": 900}, {"arr_time": 3}, {"arr_delay": 300}])
def test_nothing_that_happens_after_the_schedule_is_in_the_inputs(data: ModuleType, archive: Any, changes: dict[str, Any]) -> None:
    columns = data.COLUMNS
    plain = data.load(archive([flight()], [weather()]), [4]).select(columns)
    assert data.load(archive([flight(**changes)], [weather()]), [4]).select(columns).equals(plain)


@pytest.mark.parametrize(("delay", "late"), [(15, 0), (16, 1), (-20, 0)])
def test_late_is_more_than_fifteen_minutes(data: ModuleType, archive: Any, delay: int, late: int) -> None:
    (row,) = data.load(archive([flight(arr_delay=delay)], [weather()]), [4]).to_pylist()
    assert row["late"] == late


def test_months_are_kept_apart_and_cancelled_flights_have_no_label(data: ModuleType, archive: Any) -> None:
    flights = [flight(month=month, arr_delay="NA" if month == 5 else 3) for month in (1, 4, 5)]
    where = archive(flights, [weather()])
    assert [row["day_of_year"] for row in data.load(where, [1, 4, 5]).to_pylist()] == [2, 92]
    assert data.load(where, [5]).num_rows == 0
    assert data.load(where, [5], landed_only=False)["late"].to_pylist() == [None]
    with pytest.raises(ValueError, match="between 1 and 12"):
        data.load(where, [13])


def test_the_holdout_is_april_and_the_same_bytes_each_time(data: ModuleType, archive: Any, tmp_path: Path) -> None:
    where = archive([flight(), flight(month=5), flight(day=1, time_hour="2013-04-01T10:00:00Z")], [weather()])
    assert data.prepare_holdout(where, tmp_path / "a.parquet") == 2
    data.prepare_holdout(where, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == [*data.COLUMNS, "late"]
    assert sum(column.null_count for column in table.columns) == 0


def test_a_request_is_what_the_protocol_takes(data: ModuleType, archive: Any) -> None:
    (body,) = data.requests(archive([flight(arr_delay="NA")], [weather()]), 4)
    assert [one["name"] for one in body["inputs"]] == list(data.COLUMNS)
    by_name = {one["name"]: one for one in body["inputs"]}
    assert by_name["origin"] == {"name": "origin", "datatype": "BYTES", "shape": [1, 1], "data": ["EWR"]}
    assert by_name["sched_dep_time"] == {"name": "sched_dep_time", "datatype": "INT64", "shape": [1, 1], "data": [629]}
    assert by_name["wind_gust"] == {"name": "wind_gust", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}
    assert "late" not in by_name


def test_the_source_is_one_archive_of_the_same_bytes_each_time(data: ModuleType, folder: Any, tmp_path: Path) -> None:
    where = folder([flight()], [weather()])
    for name in ("a.zip", "b.zip"):
        data.write_source(tmp_path / name, where)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == ["flights.csv.zip", "weather.csv"]


def test_what_trainings_read_is_without_the_holdout(data: ModuleType, archive: Any, tmp_path: Path) -> None:
    source = archive([flight(month=3), flight(), flight(month=5)], [weather()])
    for name in ("a.zip", "b.zip"):
        data.write_training(source, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert len(data.load(tmp_path / "a.zip", [3, 5])) == 2
    with pytest.raises(ValueError, match=r"a\.zip has no flights of months \[4\]: that is the holdout"):
        data.load(tmp_path / "a.zip", [3, 4])


def test_tensors_are_as_the_signature_says(data: ModuleType, example: Any, archive: Any) -> None:
    features = example("features")
    tensors = features.tensors(data.load(archive([flight(), flight()], [weather()]), [4]))
    dtypes = {"BYTES": "object", "INT64": "int64", "FP32": "float32"}
    for spec in features.signature()["inputs"]:
        array = tensors.pop(spec["name"])
        assert (array.shape, str(array.dtype)) == ((2, 1), dtypes[spec["datatype"]])
    assert not tensors
