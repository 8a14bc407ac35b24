"""Log lines are JSON, carry their trace, and hold no secret."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr
from servicekit import access, runtoken, telemetry
from servicekit.clock import FakeClock, SystemIds
from servicekit.jsonlog import Seldom, redact
from servicekit.settings import ServiceSettings


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    made = io.StringIO()
    active = telemetry.setup("tracker", ServiceSettings(trace_sample_ratio=1.0), log_stream=made)
    yield made
    active.shutdown()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_when_where_and_in_which_trace(stream: io.StringIO) -> None:
    log = logging.getLogger("tracker.handlers")
    log.info("finished %s", "run")
    with telemetry.start_span("outer") as span:
        log.warning("multi\nline", extra={"run_id": UUID(int=7), "count": 3})
    first, second = lines(stream)
    assert first.keys() == {"ts", "level", "logger", "msg", "service"}
    assert (first["level"], first["logger"], first["msg"], first["service"]) == ("INFO", "tracker.handlers", "finished run", "tracker")
    assert first["ts"].endswith("Z")
    assert second["msg"] == "multi\nline"
    assert second["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert second["span_id"] == f"{span.get_span_context().span_id:016x}"
    assert (second["run_id"], second["count"]) == (str(UUID(int=7)), 3)


def test_the_stack_of_an_error_is_one_field_of_one_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("tracker").exception("it failed")
    (line,) = lines(stream)
    assert "Traceback" in line["stack"]
    assert "ValueError: broken" in line["stack"]


def test_levels_are_those_of_the_settings(stream: io.StringIO) -> None:
    logging.getLogger("tracker").debug("not this")
    assert lines(stream) == []


API_KEY = access.new_api_key(SystemIds())[1]
RUN_TOKEN = runtoken.issue("secret", "a" * 32, 1, FakeClock().now())
SERVICE_TOKEN = access.new_service_token("tracker")[0]
SECRETS = {
    "api key": (API_KEY, API_KEY[-24:]),
    "run token": (RUN_TOKEN, RUN_TOKEN[-40:]),
    "bearer": (f"authorization: Bearer {SERVICE_TOKEN}", SERVICE_TOKEN[-30:]),
    "database url": ("postgresql+asyncpg://tracker:hunter2-and-more@127.0.0.1:5432/tracker", "hunter2-and-more"),
}


@pytest.mark.parametrize(("text", "hidden"), SECRETS.values(), ids=SECRETS.keys())
def test_what_looks_like_a_secret_is_blotted_out(stream: io.StringIO, text: str, hidden: str) -> None:
    log = logging.getLogger("tracker")
    log.info("got %s here", text)
    log.info("extra", extra={"header": text, "nested": {"a": [text]}})
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
    assert len(lines(stream)) == 3
    assert hidden not in stream.getvalue()
    assert stream.getvalue().count("[redacted]") == 4


def test_a_secret_str_shows_nothing(stream: io.StringIO) -> None:
    logging.getLogger("tracker").info("%s %r", SecretStr("hunter2"), SecretStr("hunter2"), extra={"token": SecretStr("hunter2")})
    assert "hunter2" not in stream.getvalue()


@pytest.mark.parametrize(
    "text", ["hr_ is a prefix", "http://127.0.0.1:4318/v1", '"http://h:1", "a@b"', "the bearer of news", "a hrr_x", "user@example.com"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_collector_that_is_away_is_told_once_in_a_while(stream: io.StringIO) -> None:
    exporter, other = logging.getLogger("opentelemetry.exporter.otlp"), logging.getLogger("tracker")
    for attempt in range(5):
        exporter.error("failed to export: %s", attempt)
        exporter.error("something else")
        other.error("the same")
    assert [line["msg"] for line in lines(stream)].count("failed to export: 0") == 1
    assert len(lines(stream)) == 2 + 5
    late = logging.makeLogRecord({"name": exporter.name, "msg": "failed to export: %s", "created": time.time() + 61})
    seldom = Seldom("opentelemetry", seconds=60)
    assert [seldom.filter(late), seldom.filter(late)] == [True, False]
    late.created += 60
    assert seldom.filter(late)
