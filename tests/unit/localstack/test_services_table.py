"""What the local stack gives each service is what that service reads: no name is mistyped, no required setting is missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from localstack.services import SERVICES, Addresses, Service, environment, inherited
from servicekit.access import hash_secret
from servicekit.lifecycle import ANNOUNCE_VARIABLE
from servicekit.settings import PREFIX, ServiceSettings

NAMES = [service.name for service in SERVICES]
KEY = "hr_0123456789abcdef_" + "k" * 32


def by_name(pattern: str) -> Mapping[str, str]:
    return {name: pattern.format(name=name, number=number) for number, name in enumerate(NAMES)}


AT = Addresses(
    database=by_name("postgresql+asyncpg://{name}:pw@127.0.0.1:1/headrace"),
    kafka="127.0.0.1:2",
    s3_endpoint="127.0.0.1:3",
    s3_access_key="access",
    s3_secret_key="secret",
    s3_bucket="headrace",
    triton_grpc="127.0.0.1:4",
    triton_http="127.0.0.1:5",
    triton_secret="triton",
    otlp="http://127.0.0.1:6",
    traces_secret="traces",
    grpc=by_name("127.0.0.1:10{number}"),
    http=by_name("127.0.0.1:20{number}"),
    gateway="127.0.0.1:8080",
    tokens=by_name("{name}.0123456789"),
    run_token_secret="0123456789abcdef0123",
    admin_key=KEY,
)


def settings_class(name: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"{name}.settings")
    (found,) = [
        each for each in vars(module).values() if isinstance(each, type) and issubclass(each, ServiceSettings) and each.service_name
    ]
    return found


@pytest.mark.parametrize("service", SERVICES, ids=NAMES)
def test_a_service_knows_every_setting_it_is_given_and_starts_with_them(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = environment(service, AT, tmp_path)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cls = settings_class(service.name)
    known = {PREFIX + field.upper() for field in cls.model_fields} | {ANNOUNCE_VARIABLE}
    assert sorted(set(given) - known) == []
    settings = cls()
    assert (settings.kafka_bootstrap, settings.trace_sample_ratio) == ("127.0.0.1:2", 1.0)
    assert bool(settings.database_url) == service.database


@pytest.mark.parametrize("service", SERVICES, ids=NAMES)
def test_a_service_gets_what_its_settings_ask_for(service: Service, tmp_path: Path) -> None:
    given = environment(service, AT, tmp_path)
    asked = settings_class(service.name).model_fields
    offered = {"s3_endpoint", "run_token_secret", "triton_http", "traces_url", "state_dir", *(f"{name}_address" for name in NAMES)}
    assert sorted(f"{PREFIX}{name.upper()}" for name in offered.intersection(asked)) == sorted(
        f"{PREFIX}{name.upper()}" for name in offered if f"{PREFIX}{name.upper()}" in given
    )


def test_the_registry_learns_the_admin_key_only_as_a_hash(tmp_path: Path) -> None:
    (registry,) = [service for service in SERVICES if service.name == "registry"]
    given = environment(registry, AT, tmp_path)
    assert given["HEADRACE_BOOTSTRAP_ADMIN_KEY_HASH"] == f"0123456789abcdef:{hash_secret(KEY)}"
    assert not any(KEY in value for value in given.values())


def test_nothing_of_the_callers_own_settings_reaches_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_DATABASE_URL", "postgresql://elsewhere")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("LANG", "C.UTF-8")
    kept = inherited()
    assert "HEADRACE_DATABASE_URL" not in kept
    assert "PYTHONDONTWRITEBYTECODE" not in kept
    assert kept["LANG"] == "C.UTF-8"
