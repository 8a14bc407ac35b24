"""The real NVIDIA Triton server of the `nvidia-pytriton` wheel (python backend only), with model control behind a secret."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from localstack.cache import Progress, cache_dir, exclusive, repository
from localstack.errors import Missing, StackError
from localstack.ports import LOOPBACK
from localstack.process import Child, spawn

SECRET_HEADER = "headrace-secret"  # noqa: S105 - a header's name
"""HTTP header whose value opens the restricted interfaces; over gRPC its name is prefixed, see GRPC_SECRET_METADATA."""
GRPC_SECRET_METADATA = f"triton-grpc-protocol-{SECRET_HEADER}"

_RESTRICTED = "model-repository,shared-memory,logging,trace"
_TMP = Path("/tmp")  # noqa: S108 - Triton unpacks pushed models there, whatever TMPDIR says
_UNPACKED = "/tmp/folder[A-Za-z0-9]{6}"  # noqa: S108
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_STALE_S = 60


class Triton:
    """One Triton server, empty at each start (models are pushed to it). Methods block and are safe to repeat."""

    name = "triton"

    def __init__(
        self,
        directory: Path,
        *,
        http_port: int,
        grpc_port: int,
        metrics_port: int,
        secret: str,
        mark: str,
        log: Path,
        otlp_endpoint: str = "",
    ) -> None:
        """`otlp_endpoint` ("http://host:port"): where spans go; empty: none are made."""
        self.directory = directory
        self.port = http_port
        self.grpc_port = grpc_port
        self.secret = secret
        self.child: Child | None = None
        self._metrics_port = metrics_port
        self._mark = mark
        self._log = log
        self._otlp_endpoint = otlp_endpoint
        self._shm_prefix = _shm_prefix(directory)

    @property
    def http(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def grpc(self) -> str:
        return f"{LOOPBACK}:{self.grpc_port}"

    def prepare(self, progress: Progress) -> None:
        """Installs the runtime environment (once per machine, 305 MB on disk)."""
        runtime(progress)
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Starts the server. Returns before it is ready."""
        sweep(self.directory)
        environment = _environment_folder()
        site = environment / "lib" / _python_version("python") / "site-packages"
        # A space in the path of the repository or of the backends would hang every load for ever: Triton sees links without one.
        links = Path(tempfile.mkdtemp(prefix="hr-triton-", dir=_TMP))
        (self.directory / "links").write_text(f"{links}\n")
        (self.directory / "models").mkdir(parents=True, exist_ok=True)
        (links / "models").symlink_to(self.directory / "models", target_is_directory=True)
        (links / "backends").symlink_to(environment / "backends", target_is_directory=True)
        (links / "environment").symlink_to(environment, target_is_directory=True)
        argv: list[str | Path] = [
            site / "pytriton" / "tritonserver" / "bin" / "tritonserver",
            f"--model-repository={links / 'models'}",
            f"--backend-directory={links / 'backends'}",
            "--model-control-mode=explicit",
            f"--http-address={LOOPBACK}",
            f"--grpc-address={LOOPBACK}",
            f"--metrics-address={LOOPBACK}",
            f"--http-port={self.port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self._metrics_port}",
            "--reuse-http-port=false",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=3",
            "--allow-gpu-metrics=false",
            "--strict-readiness=false",
            "--log-info=false",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            # Triton takes this secret only here, where `ps` shows it to the other users of the machine.
            f"--http-restricted-api={_RESTRICTED}:{SECRET_HEADER}={self.secret}",
            f"--grpc-restricted-protocol={_RESTRICTED}:{SECRET_HEADER}={self.secret}",
            *self._tracing(),
        ]
        libraries = [
            links / "environment" / site.relative_to(environment) / "nvidia_pytriton.libs",
            Path(sysconfig.get_config_var("LIBDIR")),
        ]
        env = {
            # The backend runs the first python3 on the PATH.
            "PATH": f"{links / 'environment' / 'bin'}{os.pathsep}{os.environ.get('PATH', '/usr/bin:/bin')}",
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "OMP_NUM_THREADS": "1",
        }
        self.child = spawn(self.name, argv, log=self._log, env=env, mark=self._mark, cwd=self.directory)

    def ready(self) -> str | None:
        """None when the server on our port is live and its model control opens to our secret and to it alone, else the reason."""
        try:
            if self._ask("GET", "/v2/health/ready", None) != 200:
                return "Triton is not ready yet"
            with_secret = self._ask("POST", "/v2/repository/index", self.secret)
            without = self._ask("POST", "/v2/repository/index", None)
        except (OSError, http.client.HTTPException) as error:
            return f"Triton at {self.http} does not answer: {error}"
        if with_secret != 200:
            return f"another Triton answers on port {self.port}: it does not take our secret ({with_secret})"
        return None if without == 403 else f"model control is open to everybody ({without} without the secret)"

    def stop(self) -> None:
        """Ends the server (up to 3 s) and removes what it leaves in /tmp and /dev/shm."""
        unpacked = self._unpacked_models()
        if self.child is not None:
            self.child.stop(8)
        for folder in unpacked:
            shutil.rmtree(folder, ignore_errors=True)
        sweep(self.directory)

    def _tracing(self) -> list[str]:
        if not self._otlp_endpoint:
            return []
        settings = (
            "mode=opentelemetry",
            f"opentelemetry,url={self._otlp_endpoint}/v1/traces",
            "opentelemetry,resource=service.name=triton",
            "opentelemetry,bsp_schedule_delay=500",
            "rate=1",
            "level=TIMESTAMPS",
        )
        return [f"--trace-config={setting}" for setting in settings]

    def _ask(self, method: str, path: str, secret: str | None) -> int:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=3)
        try:
            connection.request(method, path, headers={SECRET_HEADER: secret} if secret else {})
            return connection.getresponse().status
        finally:
            connection.close()

    def _unpacked_models(self) -> list[Path]:
        """The folders in /tmp of the models that this server runs, as its stubs name them."""
        if self.child is None:
            return []
        lines = (line for line in _command_lines() if f" {self._shm_prefix}" in line)
        return [Path(match[0]) for line in lines if (match := re.search(_UNPACKED, line))]


def sweep(directory: Path) -> None:
    """Removes links, shared memory and unpacked models of the Triton of this folder, which has ended, however it ended."""
    recorded = directory / "links"
    if recorded.exists():
        folder = Path(recorded.read_text().strip())
        if folder.parent == _TMP and folder.name.startswith("hr-triton-"):
            shutil.rmtree(folder, ignore_errors=True)
        recorded.unlink()
    for region in _SHARED_MEMORY.glob(f"{_shm_prefix(directory)}*"):
        region.unlink(missing_ok=True)
    _remove_unpacked_models()


def _shm_prefix(directory: Path) -> str:
    # Shared memory of several Tritons on one machine must not meet, and must be recognised when one was killed.
    return "hr" + hashlib.sha256(str(directory).encode()).hexdigest()[:8] + "_"


def _remove_unpacked_models() -> None:
    """A killed Triton leaves the models that were pushed to it in /tmp; those of running servers stand on their stubs' command lines."""
    in_use = "\n".join(_command_lines())
    for folder in _TMP.glob("folder??????"):
        try:
            status = folder.stat()
            ours = status.st_uid == os.geteuid() and any(folder.glob("*/model.py"))
        except OSError:
            continue  # removed meanwhile
        # The age protects a model that is being loaded: its stub is not running yet.
        if ours and time.time() - status.st_mtime > _STALE_S and str(folder) not in in_use:
            shutil.rmtree(folder, ignore_errors=True)


def _command_lines() -> list[str]:
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # ended meanwhile
    return lines


def _lock_file() -> Path:
    return repository() / "deploy" / "runtimes" / "triton" / "requirements.lock"


def _environment_folder() -> Path:
    key = hashlib.sha256(_lock_file().read_bytes() + _python_version("py").encode()).hexdigest()[:12]
    return cache_dir() / "runtimes" / f"triton-{key}"


def _python_version(prefix: str) -> str:
    return f"{prefix}{sys.version_info[0]}.{sys.version_info[1]}"


def runtime(progress: Progress) -> Path:
    """The environment with Triton, installed from its lock with hashes on first use. Blocks; safe to call from several processes.

    Raises Missing without uv, StackError when the installation fails.
    """
    target = _environment_folder()
    complete = target / "complete"
    if complete.exists():
        return target
    with exclusive(target.parent / "lock"):
        if complete.exists():
            return target
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        progress.step("triton", "making the runtime environment")
        _uv(["venv", "--quiet", "--python", sys.executable, str(target)], target, progress)
        # Compiled bytecode halves the start of every model's process.
        sync = ["pip", "sync", "--no-config", "--require-hashes", "--compile-bytecode", str(_lock_file())]
        _uv(sync, target, progress)
        site = target / "lib" / _python_version("python") / "site-packages" / "pytriton" / "tritonserver"
        stub = site / "python_backend_stubs" / _python_version("") / "triton_python_backend_stub"
        if not stub.exists():
            raise Missing(f"the Triton wheel has no backend for Python {_python_version('')}: use Python 3.11 or 3.12")
        backend = target / "backends" / "python"
        shutil.copytree(site / "backends" / "python", backend)
        shutil.copy2(stub, backend)
        complete.touch()
    return target


def _uv(arguments: list[str], target: Path, progress: Progress) -> None:
    from uv import find_uv_bin

    try:
        program = find_uv_bin()
    except FileNotFoundError as error:
        raise Missing("the package uv is not installed: run scripts/setup") from error
    env = {**os.environ, "VIRTUAL_ENV": str(target)}
    with subprocess.Popen([program, *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        lines = []
        for line in running.stderr or ():
            lines.append(line.rstrip())
            if match := re.match(r"\s*(Downloading|Downloaded|Prepared|Installed|Bytecode compiled)\s.*", line):
                progress.step("triton", match[0].strip())
    if running.returncode != 0:
        raise StackError("Triton's environment could not be installed: " + " ".join(lines[-8:]))
