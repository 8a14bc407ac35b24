"""docker-compose.yml: every setting in it exists and what a service must be told is told; health checks, privileges, pins, no secret."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr
from servicekit.settings import PREFIX, ServiceSettings

ROOT = Path(__file__).parents[3]
SERVICES = ("tracker", "registry", "trainer", "evaluator", "deployer", "gateway")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
CONTAINERS: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = (*SERVICES, "init")

# A training script imports the SDK from the trainer's image; the trainer itself does not.
FOR_CODE_THEY_RUN = {"trainer": {"sdk"}}

# What may be left untold: this system keeps its traces in Jaeger.
OPTIONAL_SECRETS = {("gateway", "traces_secret"), ("gateway", "session_secret")}


def settings_class(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"{service}.settings")
    classes = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, ServiceSettings) and c.__module__ == module.__name__
    ]
    assert len(classes) == 1
    return classes[0]


def resolved(value: object) -> str:
    """A value with `${NAME:-default}` as Compose fills it in when NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def environment(service: str) -> dict[str, str]:
    return {name: resolved(value) for name, value in CONTAINERS[service].get("environment", {}).items()}


def mounted(service: str) -> dict[str, str]:
    """Secrets of a container: file name in /run/secrets -> name of the secret."""
    given = CONTAINERS[service].get("secrets", [])
    return {s if isinstance(s, str) else s["target"]: s if isinstance(s, str) else s["source"] for s in given}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Secrets as the script makes them."""
    folder = tmp_path_factory.mktemp("secrets")
    runpy.run_path(str(ROOT / "scripts" / "compose_secrets"))["make"](folder)
    return folder


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_exists(service: str) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in settings_class(service).model_fields} | {f"{PREFIX}SECRETS_DIR"}
    told = [name for name in environment(service) if name.startswith(PREFIX)] + [target.upper() for target in mounted(service)]
    assert set(told) <= known
    assert len(set(told)) == len(told), "told twice"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_told_all_it_must_know(service: str, secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(service).items():
        monkeypatch.setenv(name, value)
    for target, source in mounted(service).items():
        (tmp_path / target).write_text((secrets / source).read_text())
    cls = settings_class(service)
    settings = cls(_secrets_dir=str(tmp_path))  # type: ignore[call-arg]  # pydantic-settings takes it
    empty = [
        name
        for name, field in cls.model_fields.items()
        if field.annotation is SecretStr and not getattr(settings, name).get_secret_value() and (service, name) not in OPTIONAL_SECRETS
    ]
    assert empty == []
    assert bool(settings.database_url) == (service != "gateway")
    assert f"{service}=" in settings.service_token_hashes
    for name in cls.model_fields:
        peer = name.removesuffix("_address")
        if peer in SERVICES and peer != service:
            assert getattr(settings, name) == f"{peer}:7000", f"{name} leads elsewhere"
    assert settings.grpc_address.endswith(":7000")
    for name in ("s3_access_key", "state_dir"):
        if name in cls.model_fields:
            assert str(getattr(settings, name)) == str(environment(service)[f"{PREFIX}{name.upper()}"])


def test_addresses_lead_to_containers() -> None:
    names = set(CONTAINERS) | {
        alias
        for c in CONTAINERS.values()
        if isinstance(c["networks"], dict)
        for n in c["networks"].values()
        for alias in (n or {}).get("aliases", [])
    }
    for service in SERVICES:
        for name, value in environment(service).items():
            match = re.fullmatch(r"(?:https?://)?([a-z][a-z0-9.-]*):\d+", value)
            assert match is None or match[1] in names, f"{service}: {name} leads to {value}"
    assert environment("deployer")["HEADRACE_TRITON_HTTP"] == environment("gateway")["HEADRACE_TRITON_HTTP"], "routes name it"


def test_the_first_admin_key_is_the_one_that_is_written_down(secrets: Path) -> None:
    from servicekit.access import matches
    from servicekit.settings import parse_token_hashes

    key = (secrets / "admin_key").read_text().strip()
    key_id, _, digest = (secrets / "bootstrap_admin_key_hash").read_text().strip().partition(":")
    assert key.startswith(f"hr_{key_id}_")
    assert len(key_id) == 16
    assert matches(key, digest)
    hashes = parse_token_hashes((secrets / "service_token_hashes").read_text().strip())
    assert all(matches((secrets / f"{service}_service_token").read_text().strip(), hashes[service]) for service in SERVICES)


def test_secrets_are_made_once_and_nobody_else_can_enter_their_folder(tmp_path: Path) -> None:
    make = runpy.run_path(str(ROOT / "scripts" / "compose_secrets"))["make"]
    first = make(tmp_path / "s")
    before = {file.name: file.read_text() for file in (tmp_path / "s").iterdir()}
    assert make(tmp_path / "s") == first
    assert {file.name: file.read_text() for file in (tmp_path / "s").iterdir()} == before
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert set(COMPOSE["secrets"]) <= set(before)


def test_no_secret_is_in_the_file() -> None:
    assert (ROOT / "deploy/compose/.gitignore").read_text().split() == ["secrets/"]
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"deploy/compose/secrets/{name}"}
    used = {source for container in CONTAINERS for source in mounted(container).values()}
    assert used == set(COMPOSE["secrets"]), "every secret is used, every used one is there"
    innocent = {"HEADRACE_SECRETS_DIR", "HEADRACE_S3_ACCESS_KEY"}
    for container in CONTAINERS:
        for name, value in environment(container).items():
            if re.search("PASS|SECRET|TOKEN|KEY|HASH", name) and name not in innocent:
                assert value.startswith("/run/secrets/"), f"{container}: {name} is written out"
            assert not re.search(r"://[^/]*:[^/@]+@", value), f"{container}: {name} holds a password"


def test_everything_that_keeps_running_says_how_it_is() -> None:
    without = {name for name, container in CONTAINERS.items() if "healthcheck" not in container}
    assert without == {"init", "otel-collector"}
    for name, container in CONTAINERS.items():
        if name != "init":
            assert container["restart"] == "unless-stopped"
        for other, condition in container.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            assert healthy == (other != "init")
            assert not healthy or "healthcheck" in CONTAINERS[other]


def test_nothing_has_privileges() -> None:
    for name, container in CONTAINERS.items():
        assert "no-new-privileges:true" in container["security_opt"], name
        # PostgreSQL's image starts as the user it is given, and needs no capability then.
        assert container.get("cap_drop") == ["ALL"] or container.get("user") == "postgres", name
        assert "privileged" not in container
        assert container.get("user") not in ("root", "0", "0:0")
    assert all(CONTAINERS[name].get("read_only") or name in ("trainer", "evaluator") for name in OURS)
    assert {name for name, c in CONTAINERS.items() if "seccomp:unconfined" in c["security_opt"]} == {"trainer", "evaluator"}


def test_only_what_people_use_can_be_reached_from_outside() -> None:
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {name for name, container in CONTAINERS.items() if container.get("ports")} == {
        "gateway",
        "minio",
        "jaeger",
        "prometheus",
        "grafana",
    }
    for name, container in CONTAINERS.items():
        assert "inside" in container["networks"], name
        for port in container.get("ports", []):
            assert resolved(port).startswith("127.0.0.1:"), name
            assert "outside" in container["networks"], f"{name}: Docker publishes no port of an internal network"


def test_images_are_pinned() -> None:
    for name, container in CONTAINERS.items():
        image, _, tag = container["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d+\.\d+", tag) or tag.startswith("RELEASE."), f"{name}: {tag} is no version"
        assert ("build" in container) == (name in OURS)


def test_mounted_files_are_there() -> None:
    for name, container in CONTAINERS.items():
        for volume in container.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name}: {source}"
                assert volume.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"], f"{name}: {source}"
        if "build" in container:
            assert (ROOT / container["build"]["dockerfile"]).is_file()


# What the observers are told


def test_the_collector_hands_on_what_it_receives() -> None:
    collector = yaml.safe_load((ROOT / "deploy/compose/collector.yaml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(collector[kind])
    assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")
    assert environment("tracker")["HEADRACE_OTLP_ENDPOINT"] == "http://otel-collector:4318"
    scraped = yaml.safe_load((ROOT / "deploy/compose/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    assert targets == {f"otel-collector:{collector['exporters']['prometheus']['endpoint'].rpartition(':')[2]}", "triton:8002"}


def declared_metrics() -> dict[str, tuple[str, str]]:
    """Every metric that the code declares: name -> (kind, unit)."""
    found: dict[str, tuple[str, str]] = {}
    files = [*(ROOT / "libs").glob("*/src/**/*.py"), *(ROOT / "services").glob("*/src/**/*.py")]
    for file in files:
        text = file.read_text()
        if ".create_" not in text:
            continue
        tree = ast.parse(text)
        constants = {
            t.id: n.value.value
            for n in tree.body
            if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
            for t in n.targets
            if isinstance(t, ast.Name)
        }
        for call in ast.walk(tree):
            kind = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else ""
            if not isinstance(call, ast.Call) or not re.fullmatch("create_(observable_)?(counter|gauge|histogram|up_down_counter)", kind):
                continue
            texts = [
                constants.get(a.id, "") if isinstance(a, ast.Name) else a.value if isinstance(a, ast.Constant) else "" for a in call.args
            ]
            units = [str(k.value.value) for k in call.keywords if k.arg == "unit" and isinstance(k.value, ast.Constant)]
            units += [str(text) for text in texts[1:] if text and not isinstance(text, list)][:1]
            found[str(texts[0])] = (kind.removeprefix("create_").removeprefix("observable_"), units[0] if units else "")
    return found


def prometheus_names(name: str, kind: str, unit: str) -> set[str]:
    """The series that the collector makes of a metric: dots become _, the unit is spelt out, counters end in _total.

    Source: OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility".
    """
    spelt = {"s": "seconds", "ms": "milliseconds", "By": "bytes"}.get(unit, "")
    if unit == "1" and kind == "gauge":
        spelt = "ratio"
    base = name.replace(".", "_") + (f"_{spelt}" if spelt else "")
    if kind == "histogram":
        return {f"{base}_{part}" for part in ("bucket", "count", "sum")}
    return {f"{base}_total"} if kind == "counter" else {base}


# Source: Triton user guide, "Metrics".
TRITON_METRICS = {"nv_inference_count", "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_exec_count"}
_WORDS = {"sum", "by", "rate", "increase", "max", "histogram_quantile"}


def test_the_dashboard_shows_metrics_that_the_code_has() -> None:
    board = json.loads((ROOT / "deploy/compose/grafana/dashboards/headrace.json").read_text())
    sources = yaml.safe_load((ROOT / "deploy/compose/grafana/datasources/headrace.yaml").read_text())["datasources"]
    there = {series for name, (kind, unit) in declared_metrics().items() for series in prometheus_names(name, kind, unit)} | TRITON_METRICS
    shown = set()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] in {source["uid"] for source in sources}
        assert panel["description"]
        for target in panel["targets"]:
            expression = re.sub(r"by \([^)]*\)|\[[^]]*\]|\{[^}]*\}", "", target["expr"])
            series = set(re.findall(r"[a-z_][a-z_0-9]*", expression)) - _WORDS
            assert series, target["expr"]
            assert series <= there, f"{panel['title']}: {series - there}"
            shown |= series
    assert {
        "eventing_outbox_depth",
        "headrace_gateway_requests_total",
        "rpc_server_call_duration_seconds_bucket",
        "registry_events_total",
    } <= shown


# What images are built from


def dockerfile(container: str) -> str:
    path: str = CONTAINERS[container]["build"]["dockerfile"]
    return (ROOT / path).read_text()


def test_images_start_from_one_pinned_base() -> None:
    bases = {base for name in OURS for base in re.findall(r"^FROM (\S+)", dockerfile(name), re.MULTILINE)}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases.pop())


@pytest.mark.parametrize("name", OURS)
def test_images_are_small_unprivileged_and_complete(name: str) -> None:
    text = dockerfile(name)
    build, final = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert "uv pip sync --require-hashes --compile-bytecode" in build
    assert "pip install" not in final, "what builds stays in the first stage"
    user = re.search(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 0
    assert final.index("USER") < final.index("ENTRYPOINT")
    assert not re.search(r"^(ARG|ENV) .*(PASSWORD|SECRET|TOKEN)", text, re.MULTILINE)
    if name != "init":
        assert f'ENTRYPOINT ["python", "-m", "{name}"]' in final
        assert "HEALTHCHECK" in final
        assert f"{CONTAINERS[name]['healthcheck']['test'][-1]}" in final


@pytest.mark.parametrize("name", OURS)
def test_what_is_copied_exists_and_reaches_the_builder(name: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in re.findall(r"^COPY (?!--from)(\S+)", dockerfile(name), re.MULTILINE):
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in allowed), f"{source} is in .dockerignore"


def names_in(lock: Path) -> set[str]:
    return set(re.findall(r"^([a-z0-9._-]+)==", lock.read_text(), re.MULTILINE))


def required(member: Path) -> set[str]:
    """The packages that a member of the workspace and those it stands on ask for."""
    project = tomllib.loads((member / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=!~ ]", dependency)[0] for dependency in project["dependencies"]]
    found = {name for name in names if not name.startswith("headrace")}
    for name in names:
        if name.startswith("headrace-"):
            found |= required(ROOT / "libs" / name.removeprefix("headrace-"))
    return found


def test_each_image_installs_its_part_of_the_lock() -> None:
    whole = (ROOT / "requirements.lock").read_text()
    parts = {ROOT / "services" / service / "requirements.lock": required(ROOT / "services" / service) for service in SERVICES}
    parts[ROOT / "deploy/compose/init.lock"] = {"asyncpg", "aiokafka", "alembic", "minio", "sqlalchemy"}
    parts[ROOT / "deploy/compose/build.lock"] = {"uv"}
    for part, needed in parts.items():
        text = part.read_text()
        assert needed <= names_in(part), f"{part}: {needed - names_in(part)} missing; run scripts/lock"
        pins = re.findall(r"^\S+==[^\s\\]+", text, re.MULTILINE)
        assert all(pin in whole for pin in pins), f"{part} is older than requirements.lock; run scripts/lock"
        assert text.count("--hash=sha256:") >= len(pins)
        assert "http" not in re.sub(r"[a-z-]*http[a-z0-9-]*==", "", text)


@pytest.mark.parametrize("service", SERVICES)
def test_each_image_has_the_libraries_it_stands_on(service: str) -> None:
    project = tomllib.loads((ROOT / "services" / service / "pyproject.toml").read_text())["project"]
    wanted = {dependency.removeprefix("headrace-") for dependency in project["dependencies"] if dependency.startswith("headrace-")}
    wanted |= FOR_CODE_THEY_RUN.get(service, set())
    copied = set(re.findall(r"^COPY libs/(\w+)/src", dockerfile(service), re.MULTILINE))
    assert copied == wanted
