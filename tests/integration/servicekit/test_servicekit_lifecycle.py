"""A real process under servicekit.main: it announces its ports, tells its readiness, and ends as its components and signals say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import asyncio, logging, sys
from typing import ClassVar
from pydantic import Field
from servicekit.main import main
from servicekit.rpc import Server
from servicekit.settings import ServiceSettings

log = logging.getLogger("example")
MODE = {mode!r}

class Settings(ServiceSettings):
    service_name: ClassVar[str] = "example"
    greeting: str = Field(default="hello", description="What is said.")

class Part:
    def __init__(self, name):
        self.name = name
        self.failed = asyncio.Event()
        self.reason = None
    async def start(self):
        log.info("start %s", self.name)
        if MODE == "bad-start" and self.name == "second":
            raise RuntimeError("cannot start")
        if MODE == "slow-start" and self.name == "second":
            await asyncio.sleep(3600)
        if MODE == "fails" and self.name == "second":
            asyncio.get_running_loop().call_later(0.1, self.failed.set)
        if MODE == "not-ready" and self.name == "second":
            self.reason = "no connection to Kafka"
    async def stop(self):
        log.info("stop %s", self.name)
        if MODE == "hangs" and self.name == "second":
            await asyncio.sleep(3600)
        if MODE == "slow-stop" and self.name == "second":
            await asyncio.sleep(0.3)
            log.info("finished the work")
    def ready(self):
        return self.reason
    async def wait(self):
        await self.failed.wait()
        raise RuntimeError("the background work broke")

def build(settings):
    return [Part("first"), Part("second"), Server(settings.grpc_address, settings, {{}})]

main(Settings, build, argv=sys.argv[1:])
"""


class Running:
    """A service process and what it printed."""

    def __init__(self, mode: str, folder: Path, *arguments: str, **environment: str) -> None:
        self.announce = folder / "announced file.json"
        env = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
        env |= {"HEADRACE_SHUTDOWN_GRACE_S": "5", "PYTHONWARNINGS": "error", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(mode=mode), "--announce", str(self.announce), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ports(self) -> dict[str, int]:
        deadline = time.monotonic() + 30
        while not self.announce.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it never announced its ports"
            time.sleep(0.02)
        ports: dict[str, int] = json.loads(self.announce.read_text())
        return ports

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()] + [{"stderr": err}]


def get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Running] = []

    def make(mode: str, *arguments: str, **environment: str) -> Running:
        started.append(Running(mode, tmp_path, *arguments, **environment))
        return started[-1]

    yield make
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


def messages(lines: list[dict[str, Any]]) -> list[str]:
    return [line["msg"] for line in lines if line.get("logger") == "example"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_runs_until_it_is_told_to_stop(start: Start, number: signal.Signals) -> None:
    running = start("slow-stop")
    ports = running.ports()
    assert ports["pid"] == running.process.pid
    assert get(ports["http"], "/healthz") == (200, {"alive": True})
    assert get(ports["http"], "/readyz") == (200, {"ready": True, "reasons": {}})
    running.process.send_signal(number)
    code, lines = running.end()
    assert code == 0
    assert messages(lines) == ["start first", "start second", "stop second", "finished the work", "stop first"]
    listening = next(line for line in lines if line.get("msg") == "listening")
    assert listening["grpc"] == ports["grpc"]
    assert listening["http"] == ports["http"]
    assert {"ts", "level", "logger", "service"} <= listening.keys()
    assert lines[-1] == {"stderr": ""}


def test_readiness_tells_the_reason_by_component(start: Start) -> None:
    ports = start("not-ready").ports()
    assert get(ports["http"], "/healthz")[0] == 200
    assert get(ports["http"], "/readyz") == (503, {"ready": False, "reasons": {"second": "no connection to Kafka"}})


def test_a_component_that_fails_stops_the_process_loudly(start: Start) -> None:
    code, lines = start("fails").end()
    assert code == 1
    critical = next(line for line in lines if line.get("level") == "CRITICAL")
    assert "second failed" in critical["msg"]
    assert "the background work broke" in critical["stack"]
    assert messages(lines)[-2:] == ["stop second", "stop first"]


def test_a_component_that_cannot_start_stops_those_that_did(start: Start) -> None:
    running = start("bad-start")
    code, lines = running.end()
    assert code == 1
    assert messages(lines) == ["start first", "start second", "stop second", "stop first"]
    assert any("second failed" in line.get("msg", "") and "cannot start" in line.get("stack", "") for line in lines)
    assert not running.announce.exists()


def test_a_signal_while_starting_stops_it_cleanly(start: Start) -> None:
    running = start("slow-start")
    assert running.process.stdout is not None
    seen = []
    for line in running.process.stdout:
        seen.append(json.loads(line)["msg"])
        if seen[-1] == "start second":
            break
    running.process.send_signal(signal.SIGTERM)
    code, lines = running.end()
    assert code == 0
    assert messages(lines) == ["stop second", "stop first"]


def test_a_component_that_will_not_stop_is_given_up_after_the_grace(start: Start) -> None:
    running = start("hangs", HEADRACE_SHUTDOWN_GRACE_S="0.2")
    running.ports()
    running.process.send_signal(signal.SIGTERM)
    code, lines = running.end()
    assert code == 1
    assert "second did not stop in time" in [line.get("msg") for line in lines]
    assert messages(lines)[-1] == "stop first"


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    running = start("hangs", HEADRACE_SHUTDOWN_GRACE_S="3600")
    running.ports()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.stdout is not None
    for line in running.process.stdout:
        if json.loads(line)["msg"] == "stop second":
            break
    running.process.send_signal(signal.SIGTERM)
    assert running.end()[0] == 130


def test_the_announce_file_may_be_named_by_the_environment(tmp_path: Path, start: Start) -> None:
    target = tmp_path / "by-environment.json"
    running = Running.__new__(Running)
    running.announce = target
    env = os.environ | {"HEADRACE_ANNOUNCE_FILE": str(target)}
    running.process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(mode="plain")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert running.ports().keys() == {"grpc", "http", "pid"}
        running.process.terminate()
        assert running.end()[0] == 0
    finally:
        running.process.kill()


def test_a_port_that_is_taken_is_a_clear_failure(start: Start) -> None:
    ports = start("plain").ports()
    code, lines = start("plain", HEADRACE_GRPC_ADDRESS=f"127.0.0.1:{ports['grpc']}").end()
    assert code == 1
    assert any("grpc failed" in line.get("msg", "") for line in lines)
    code, lines = start("plain", HEADRACE_HTTP_ADDRESS=f"127.0.0.1:{ports['http']}").end()
    assert code == 1
    assert any("http failed" in line.get("msg", "") for line in lines)


def test_settings_are_printed_without_being_needed(start: Start) -> None:
    running = start("plain", "settings", HEADRACE_GRPC_ADDRESS="nonsense")
    out, err = running.process.communicate(timeout=30)
    assert running.process.returncode == 0
    assert "| `HEADRACE_GREETING` | str | `hello` | What is said. |" in out
    assert err == ""


def test_wrong_settings_are_named_and_not_shown(start: Start) -> None:
    running = start("plain", HEADRACE_SERVICE_TOKEN="hunter2", HEADRACE_TRACE_SAMPLE_RATIO="7")
    out, err = running.process.communicate(timeout=30)
    assert running.process.returncode == 2
    assert "HEADRACE_SERVICE_TOKEN:" in err
    assert "HEADRACE_TRACE_SAMPLE_RATIO:" in err
    assert "hunter2" not in out + err


async def test_names_are_distinct() -> None:
    from servicekit import lifecycle

    class Part:
        async def start(self) -> None: ...

        async def stop(self) -> None: ...

    class Named(Part):
        name = "relay"

    assert lifecycle.names([Part(), Named(), Part(), Named()]) == ["Part", "relay", "Part-2", "relay-2"]
    await asyncio.sleep(0)
