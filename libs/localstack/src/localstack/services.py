"""The six services of the local stack: one table says what each needs, and one function turns that into its environment."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from localstack import mlflow_page
from localstack.cache import Progress, cache_dir
from localstack.ports import LOOPBACK
from localstack.process import Child, spawn


@dataclass(frozen=True)
class Service:
    """What one service is given, beyond what all are given."""

    name: str
    peers: tuple[str, ...] = ()
    """Services that it calls: it learns their gRPC addresses."""
    http_peers: tuple[str, ...] = ()
    """Services whose HTTP addresses it learns."""
    s3: bool = False
    run_tokens: bool = False
    """Whether it issues or verifies run tokens."""
    files: bool = False
    """Whether it keeps local files."""
    database: bool = True


SERVICES = (
    Service("tracker", s3=True, run_tokens=True, files=True),
    Service("registry", peers=("trainer", "evaluator", "deployer")),
    Service("trainer", peers=("tracker",), s3=True, files=True),
    Service("evaluator", peers=("tracker",), s3=True, files=True),
    Service("deployer", s3=True),
    Service(
        "gateway",
        peers=("tracker", "registry", "trainer", "evaluator", "deployer"),
        http_peers=("tracker", "registry"),
        run_tokens=True,
        files=True,
        database=False,
    ),
)


@dataclass(frozen=True)
class Addresses:
    """Where everything is, and the secrets that open it; what the environments are made from."""

    database: Mapping[str, str]
    """SQLAlchemy URL by service."""
    kafka: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    s3_bucket: str
    triton_grpc: str
    triton_http: str
    triton_secret: str
    otlp: str
    traces_secret: str
    grpc: Mapping[str, str]
    """gRPC address by service."""
    http: Mapping[str, str]
    """Address of /healthz and /readyz by service."""
    gateway: str
    tokens: Mapping[str, str]
    """Service token by service."""
    run_token_secret: str
    admin_key: str


def environment(service: Service, at: Addresses, state_dir: Path) -> dict[str, str]:
    """The HEADRACE_* settings of one service. Names that it does not know are ignored by it."""
    hashes = ",".join(f"{name}={_sha256(token)}" for name, token in sorted(at.tokens.items()))
    settings = {
        "KAFKA_BOOTSTRAP": at.kafka,
        "GRPC_ADDRESS": at.grpc[service.name],
        "HTTP_ADDRESS": at.http[service.name],
        "OTLP_ENDPOINT": at.otlp,
        "TRACE_SAMPLE_RATIO": "1.0",
        "SERVICE_TOKEN": at.tokens[service.name],
        "SERVICE_TOKEN_HASHES": hashes,
        "ANNOUNCE_FILE": str(state_dir / "announce.json"),
    }
    if service.database:
        settings["DATABASE_URL"] = at.database[service.name]
    settings |= {f"{peer.upper()}_ADDRESS": at.grpc[peer] for peer in service.peers}
    settings |= {f"{peer.upper()}_HTTP": at.http[peer] for peer in service.http_peers}
    if service.s3:
        settings |= {
            "S3_ENDPOINT": at.s3_endpoint,
            "S3_ACCESS_KEY": at.s3_access_key,
            "S3_SECRET_KEY": at.s3_secret_key,
            "S3_BUCKET": at.s3_bucket,
        }
    if service.run_tokens:
        settings["RUN_TOKEN_SECRET"] = at.run_token_secret
    if service.files:
        settings["STATE_DIR"] = str(state_dir)
    match service.name:
        case "registry":
            # An API key is written hr_<id>_<secret>.
            settings["BOOTSTRAP_ADMIN_KEY_HASH"] = f"{at.admin_key.split('_', 2)[1]}:{_sha256(at.admin_key)}"
        case "deployer":
            settings |= {"TRITON_GRPC": at.triton_grpc, "TRITON_HTTP": at.triton_http, "TRITON_SECRET": at.triton_secret}
        case "gateway":
            settings |= {
                "GATEWAY_ADDRESS": at.gateway,
                "TRITON_HTTP": at.triton_http,
                "TRACES_URL": at.otlp,
                "TRACES_SECRET": at.traces_secret,
            }
            if (page := mlflow_page.installed()) is not None:
                settings["MLFLOW_PAGE"] = str(page)
        case "trainer":
            settings["PUBLIC_URL"] = f"http://{at.gateway}"
            # Like every download it outlives the state of one stack: PyTorch alone takes minutes.
            settings["VENV_DIR"] = str(cache_dir() / "venvs")
            # What trainings may reach besides the stack is for whoever starts it to say.
            settings |= {
                name: os.environ[f"HEADRACE_{name}"] for name in ("TRAINING_EGRESS", "GIT_HOSTS") if f"HEADRACE_{name}" in os.environ
            }
    return {f"HEADRACE_{name}": value for name, value in settings.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def inherited() -> dict[str, str]:
    """What our processes inherit from the environment of `headrace up`: all but the settings of services, and with compiled bytecode."""
    # Without bytecode every start compiles hundreds of modules anew.
    dropped = {"PYTHONDONTWRITEBYTECODE"}
    kept = {"HEADRACE_CACHE_DIR"}
    return {name: value for name, value in os.environ.items() if name in kept or not (name.startswith("HEADRACE_") or name in dropped)}


class ServiceProcess:
    """One service as one of the stack's servers. Methods block and are safe to repeat."""

    def __init__(self, name: str, directory: Path, *, http_address: str, port: int, env: Mapping[str, str], mark: str, log: Path) -> None:
        """`port`: the one to show in listings (the gateway's public one, else gRPC)."""
        self.name = name
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self._health_port = int(http_address.rsplit(":", 1)[1])
        self._env = dict(env)
        self._mark = mark
        self._log = log

    def prepare(self, progress: Progress) -> None:
        """Makes the folder."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts `python -m NAME`. Returns before it is ready."""
        (self.directory / "announce.json").unlink(missing_ok=True)
        env = {**inherited(), **self._env}
        self.child = spawn(self.name, [sys.executable, "-m", self.name], log=self._log, env=env, mark=self._mark, cwd=self.directory)

    def ready(self) -> str | None:
        """None when our process has announced itself and /readyz agrees, else the reason."""
        try:
            announced = json.loads((self.directory / "announce.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return "it does not listen yet"
        if self.child is None or announced.get("pid") != self.child.pid:
            return "another process announced itself"
        connection = http.client.HTTPConnection(LOOPBACK, self._health_port, timeout=3)
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            body = answer.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return f"/readyz does not answer: {error}"
        finally:
            connection.close()
        return None if answer.status == 200 else f"/readyz says {answer.status}: {body}"

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when it has not ended after its grace period."""
        if self.child is not None:
            self.child.stop(15)
