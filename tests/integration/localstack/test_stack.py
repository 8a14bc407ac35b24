"""The local stack as a user meets it: it starts anywhere, survives being killed, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from localstack import api, kafka_wire, layout, process, s3_probe, seaweed
from localstack.errors import Missing, StackError
from localstack.ports import LOOPBACK, Ports
from localstack.services import SERVICES

T = TypeVar("T")


class RecordedSteps:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def step(self, name: str, text: str, done: int = 0, total: int = 0) -> None:
        self.seen.append((name, text))


def until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def listen_on(port: int) -> socket.socket | None:
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError:
        return None


def up(state: Path) -> layout.Stack:
    """Starts the servers, and says where they are."""
    api.up(state, False, with_services=False)
    return layout.make(state, running=True)


def rows(state: Path) -> dict[str, api.PartStatus]:
    return {row.name: row for row in api.status(state)}


def left_behind(state: Path) -> list[str]:
    """Processes and files outside the state folder that belong to a stack."""
    mark = layout.Paths(state).mark()
    stack = layout.make(state, running=True)
    twins = [str(stack.seaweed.port + offset + twin) for offset in range(5) for twin in (0, 10_000)]
    processes = [f"process {each.pid}" for each in process.marked(mark)]
    sockets = [str(file) for file in Path("/tmp").glob("seaweedfs-*") if any(file.stem.endswith(f"-{port}") for port in twins)]
    links = [str(file) for file in Path("/tmp").glob("hr-triton-*") if (file / "models").resolve().is_relative_to(state)]
    shared = [str(file) for file in Path("/dev/shm").glob(f"{stack.triton._shm_prefix}*")]
    return processes + sockets + links + shared


def prepared(folder: Path) -> Path:
    """A state folder with ports that no other test run uses."""
    folder.mkdir(parents=True)
    ports = Ports(folder / "ports.json", random_only=True)
    for name in ("otlp", "postgres", "kafka", "kafka-controller", "triton-http", "triton-grpc", "triton-metrics", "gateway"):
        ports.claim(name, 0)
    ports.claim("s3", 0, seaweed.PORTS, seaweed.usable)
    for service in SERVICES:
        ports.claim(f"{service.name}-grpc", 0)
        ports.claim(f"{service.name}-http", 0)
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder whose path is no plain word; what runs there is stopped after the test."""
    folder = prepared(tmp_path / "with a space, and ü" / ".headrace")
    yield folder
    api.down(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running stack that the test only looks at."""
    folder = prepared(tmp_path_factory.mktemp("with a space") / ".headrace")
    api.up(folder, False, with_services=False)
    yield folder
    api.down(folder)


def store_something(stack: layout.Stack) -> None:
    stack.postgres.sql("CREATE TABLE kept (id int); INSERT INTO kept VALUES (7)")
    assert s3_probe.request(stack.seaweed.access, "PUT", "/headrace/kept", b"bytes")[0] == 200


def what_was_stored(stack: layout.Stack) -> tuple[str, tuple[int, bytes], str]:
    cluster = kafka_wire.describe((LOOPBACK, stack.kafka.port)).cluster_id
    return stack.postgres.sql("SELECT id FROM kept"), s3_probe.request(stack.seaweed.access, "GET", "/headrace/kept"), cluster


def test_everything_stored_survives_kill_9_of_everything_and_down_leaves_nothing_behind(state: Path) -> None:
    stack = up(state)
    store_something(stack)
    before = what_was_stored(stack)
    supervisor = layout.Paths(state).supervisor()
    assert supervisor is not None
    for each in (supervisor, *process.marked(stack.mark)):
        os.kill(each.pid, signal.SIGKILL)
    until(lambda: supervisor is not None and not supervisor.alive())
    assert {row.state for row in api.status(state)} == {"stopped"}

    again = up(state)
    assert what_was_stored(again) == before == ("7", (200, b"bytes"), stack.kafka.cluster_id)
    assert again.addresses == stack.addresses

    assert sorted(api.down(state)) == ["kafka", "otlp", "postgres", "s3", "supervisor", "triton"]
    assert left_behind(state) == []
    assert api.down(state) == []


def test_up_again_changes_nothing(running: Path) -> None:
    before = rows(running)
    assert all(row.state == "ready" and row.rss_bytes > 1_000_000 for row in before.values())
    assert api.up(running, False, with_services=False).state_dir == str(running)
    assert {name: row.pid for name, row in rows(running).items()} == {name: row.pid for name, row in before.items()}


def test_down_also_finds_what_a_killed_supervisor_left(state: Path) -> None:
    up(state)
    supervisor = layout.Paths(state).supervisor()
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    api.down(state)
    assert left_behind(state) == []


def test_taken_ports_are_replaced_and_the_data_is_there(state: Path) -> None:
    before = up(state)
    store_something(before)
    api.down(state)
    taken = (before.postgres.port, before.kafka.port, before.seaweed.port, before.triton.port, before.triton.grpc_port)
    sockets = [socket.create_server((LOOPBACK, port)) for port in taken]
    try:
        after = up(state)
        assert what_was_stored(after) == ("7", (200, b"bytes"), before.kafka.cluster_id)
        assert not {after.postgres.port, after.kafka.port, after.seaweed.port, after.triton.port}.intersection(taken)
    finally:
        for each in sockets:
            each.close()


def test_a_server_that_is_killed_comes_back_by_itself(state: Path) -> None:
    stack = up(state)
    store_something(stack)
    killed = {name: row.pid for name, row in rows(state).items() if name != "supervisor"}
    for pid in killed.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def all_back() -> bool:
        now = rows(state)
        return all(now[name].state == "ready" and now[name].restarts >= 1 and now[name].pid != pid for name, pid in killed.items())

    until(all_back)
    assert what_was_stored(stack)[0] == "7"


def test_up_moves_a_server_whose_port_somebody_took(state: Path) -> None:
    stack = up(state)
    pid = rows(state)["postgres"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    thief = until(lambda: listen_on(stack.postgres.port))
    try:
        until(lambda: rows(state)["postgres"].restarts >= 2)
        assert up(state).postgres.port != stack.postgres.port
    finally:
        thief.close()


def test_secrets_are_for_their_owner_alone_and_the_listing_holds_none(running: Path) -> None:
    files = list((running / "secrets").iterdir())
    assert {"admin-key", "postgres-password", "s3-secret-key", "triton-secret"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((running / "secrets").stat().st_mode) == 0o700
    public = (running / "stack.json").read_text() + "".join(file.read_text(errors="replace") for file in (running / "logs").iterdir())
    assert [file.name for file in files if file.name != "s3-access-key" and file.read_text().strip() in public] == []


def test_progress_and_logs_name_every_part(running: Path) -> None:
    steps = RecordedSteps()
    api.up(running, steps, with_services=False)
    assert {name for name, text in steps.seen if text == "ready"} == {"otlp", "postgres", "kafka", "s3", "triton"}
    lines = list(api.logs(running, ["kafka", "supervisor"]))
    assert any(line.startswith("kafka      | ") and "Kafka version" in line for line in lines)
    assert any("postgres is ready" in line for line in lines)
    with pytest.raises(StackError, match="no log of nonsense: there is kafka, "):
        next(api.logs(running, ["nonsense"]))


def test_a_part_that_does_not_start_is_named_with_the_end_of_its_log(state: Path) -> None:
    data = state / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(StackError, match=r"(?s)postgres does not start.*its log ends.*could not access the server configuration file"):
        api.up(state, False, with_services=False)
    assert rows(state)["postgres"].state != "ready"


def test_a_settings_file_with_an_unknown_name_is_refused(state: Path) -> None:
    (state / "settings.toml").write_text("[gatway]\nHEADRACE_LOG_LEVEL = 'DEBUG'\n")
    with pytest.raises(StackError, match=r"\[gatway\] is neither \[all\] nor a service"):
        api.up(state, False)


def test_a_machine_without_util_linux_is_told_what_to_install(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(state))
    with pytest.raises(Missing, match="setpriv, unshare, setsid; they belong to util-linux"):
        api.up(state, False)


def test_nothing_was_ever_started_here(tmp_path: Path) -> None:
    assert api.status(tmp_path / "nowhere") == []
    assert api.down(tmp_path / "nowhere") == []


def test_another_server_on_our_port_is_not_taken_for_ours(own_postgres: Callable[[], object], tmp_path: Path) -> None:
    from localstack.postgres import Postgres

    other = own_postgres()
    assert isinstance(other, Postgres)
    impostor = Postgres(tmp_path, port=other.port, password="ours", mark="x", log=tmp_path / "log")
    assert "password authentication failed" in (impostor.ready() or "")
