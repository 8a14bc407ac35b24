"""The jars of Apache Kafka: exactly those of `kafka.lock.toml` (coordinates and hashes), fetched from the Maven repository into the cache.

`python -m localstack.jars` resolves the versions anew and rewrites the lock.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from localstack.cache import Progress, cache_dir, exclusive
from localstack.errors import StackError

LOCK = Path(__file__).with_name("kafka.lock.toml")
# Resolved apart: in one resolution log4j's bill of materials would pull in an older kafka-clients, with which the broker cannot start.
ENDPOINTS = ("org.apache.kafka:kafka_2.13:4.3.1", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4")


@dataclass(frozen=True, order=True)
class Jar:
    """One locked artifact."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"


def locked() -> list[Jar]:
    """What the lock names."""
    return sorted(Jar(**entry) for entry in tomllib.loads(LOCK.read_text())["jar"])


def folder() -> Path:
    """Where the locked jars are, or will be after `fetch`."""
    return cache_dir() / "kafka" / hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] / "jars"


def fetch(progress: Progress) -> Path:
    """The folder with all locked jars, downloaded once (42 MB), hashes checked. Blocks; safe to call from several processes.

    Raises StackError when one cannot be fetched or has another hash.
    """
    target = folder()
    if target.exists():
        return target
    with exclusive(cache_dir() / "kafka" / "lock"):
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        jars = locked()
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor(8) as pool:
            draft = Path(scratch) / "jars"
            draft.mkdir()
            for count, jar in enumerate(pool.map(lambda each: _download(each, Path(scratch), draft), jars), 1):
                progress.step("kafka", f"fetched {jar.filename}", count, len(jars))
            os.replace(draft, target)
    return target


def _download(jar: Jar, scratch: Path, target: Path) -> Jar:
    # jgo takes half a second to import: only when there is something to fetch.
    from jgo.maven import MavenContext

    context = MavenContext(repo_cache=scratch / "maven", timeout=60)
    try:
        path = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    except (OSError, RuntimeError) as error:
        raise StackError(f"cannot fetch {jar.filename} from the Maven repository: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != jar.sha256:
        raise StackError(f"{jar.filename} from the Maven repository has SHA-256 {digest}, the lock says {jar.sha256}")
    os.replace(path, target / jar.filename)
    return jar


def _resolve() -> list[Jar]:
    from jgo.env import EnvironmentBuilder
    from jgo.maven import MavenContext

    jars: dict[tuple[str, str], Jar] = {}
    with tempfile.TemporaryDirectory() as scratch:
        builder = EnvironmentBuilder(context=MavenContext(repo_cache=Path(scratch) / "maven"), cache_dir=Path(scratch) / "environments")
        for endpoint in ENDPOINTS:
            lock = builder.from_endpoint(endpoint).lockfile
            for each in lock.dependencies if lock else []:
                if each.sha256 is None:
                    raise StackError(f"no hash for {each.artifactId}")
                jar = Jar(each.groupId, each.artifactId, each.version, each.sha256)
                # Kafka is resolved first and its versions stand.
                jars.setdefault((jar.group, jar.artifact), jar)
    return sorted(jars.values())


def main() -> None:
    lines = ["# Written by `python -m localstack.jars`: Apache Kafka with a logger, every jar with its hash.\n"]
    for jar in _resolve():
        lines.append(f'\n[[jar]]\ngroup = "{jar.group}"\nartifact = "{jar.artifact}"\nversion = "{jar.version}"\nsha256 = "{jar.sha256}"\n')
    LOCK.write_text("".join(lines))


if __name__ == "__main__":
    main()
