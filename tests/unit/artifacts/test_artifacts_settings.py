"""A service's settings say where the object store is, and only those that hand out URLs say where clients find it."""

from __future__ import annotations

import pytest
from artifacts import S3Location
from artifacts.settings import PresigningSettings, S3Settings
from servicekit import settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT": "store:9000", "ACCESS_KEY": "key", "SECRET_KEY": "a-secret", "BUCKET": "b", "SECURE": "true"}.items():
        monkeypatch.setenv(f"HEADRACE_S3_{name}", value)


def test_the_location_is_what_the_environment_says() -> None:
    loaded = settings.load(S3Settings)
    assert loaded.s3 == S3Location("store:9000", "key", "a-secret", "b", secure=True)
    assert "a-secret" not in repr(loaded)
    assert "a-secret" not in repr(loaded.s3)


def test_who_hands_out_urls_says_where_clients_find_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load(PresigningSettings).s3.public_endpoint is None
    monkeypatch.setenv("HEADRACE_S3_PUBLIC_ENDPOINT", "https://artifacts.example.com")
    assert settings.load(PresigningSettings).s3.public_endpoint == "https://artifacts.example.com"
    assert settings.load(S3Settings).s3.public_endpoint is None
