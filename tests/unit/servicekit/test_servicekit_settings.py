"""Settings come from the environment, refuse what they cannot mean, and never show a secret."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError
from servicekit import settings
from servicekit.access import new_service_token
from servicekit.settings import ServiceSettings


class ExampleSettings(ServiceSettings):
    service_name: ClassVar[str] = "example"
    tracker_address: str = Field(description="Where the tracker is.")
    limit: int | None = Field(default=None, description="At most a|b.")


def test_they_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    token, digest = new_service_token("tracker")
    monkeypatch.setenv("HEADRACE_TRACKER_ADDRESS", "127.0.0.1:5000")
    monkeypatch.setenv("HEADRACE_TRACE_SAMPLE_RATIO", "1.0")
    monkeypatch.setenv("HEADRACE_SERVICE_TOKEN", token)
    monkeypatch.setenv("HEADRACE_SERVICE_TOKEN_HASHES", f"tracker={digest}")
    loaded = settings.load(ExampleSettings)
    assert loaded.tracker_address == "127.0.0.1:5000"
    assert loaded.trace_sample_ratio == 1.0
    assert loaded.service_token.get_secret_value() == token
    assert settings.parse_token_hashes(loaded.service_token_hashes) == {"tracker": digest}
    with pytest.raises(ValidationError):
        loaded.tracker_address = "elsewhere:1"


def test_secrets_may_come_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_TRACKER_ADDRESS", "127.0.0.1:5000")
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "headrace_service_token").write_text("tracker.from-a-file\n")
    assert settings.load(ExampleSettings).service_token.get_secret_value() == "tracker.from-a-file"


def test_neither_repr_nor_error_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = repr(
        ExampleSettings(
            tracker_address="a:1",
            database_url="postgresql+asyncpg://tracker:hunter2@127.0.0.1/x",
            service_token="tracker.hunter2",  # type: ignore[arg-type]  # as the environment gives it
        )
    )
    assert "hunter2" not in shown
    monkeypatch.setenv("HEADRACE_TRACKER_ADDRESS", "a:1")
    monkeypatch.setenv("HEADRACE_SERVICE_TOKEN", "hunter2")
    with pytest.raises(ValidationError) as caught:
        settings.load(ExampleSettings)
    assert "service_token" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GRPC_ADDRESS", "8000"),
        ("GRPC_ADDRESS", "host:99999"),
        ("HTTP_ADDRESS", ":80"),
        ("LOG_LEVEL", "LOUD"),
        ("TRACE_SAMPLE_RATIO", "1.5"),
        ("SHUTDOWN_GRACE_S", "0"),
        ("SERVICE_TOKEN_HASHES", "tracker=abc"),
        ("SERVICE_TOKEN_HASHES", f"a={'0' * 64},a={'1' * 64}"),
    ],
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("HEADRACE_TRACKER_ADDRESS", "a:1")
    monkeypatch.setenv(f"HEADRACE_{variable}", value)
    with pytest.raises(ValidationError, match=variable.lower()):
        settings.load(ExampleSettings)


def test_a_required_setting_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_TRACKER_ADDRESS", raising=False)
    with pytest.raises(ValidationError, match="tracker_address"):
        settings.load(ExampleSettings)


def test_addresses() -> None:
    assert settings.split_address("[::1]:80") == ("::1", 80)
    assert settings.split_address("0.0.0.0:0") == ("0.0.0.0", 0)


def test_the_table_names_every_setting_with_a_description() -> None:
    table = settings.markdown(ExampleSettings)
    for name, field in ExampleSettings.model_fields.items():
        assert field.description, name
        assert f"| `HEADRACE_{name.upper()}` |" in table
    assert "| `HEADRACE_TRACKER_ADDRESS` | str | required | Where the tracker is. |" in table
    assert "| `HEADRACE_LIMIT` | int \\| None |  | At most a\\|b. |" in table
    assert "| `HEADRACE_SERVICE_TOKEN` | secret |" in table
