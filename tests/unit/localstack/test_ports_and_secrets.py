"""Ports are remembered and never taken from others; secrets are made once and shown to nobody else."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from localstack.errors import StackError
from localstack.ports import LOOPBACK, Ports, is_free
from localstack.secretbox import Secrets


def listen() -> socket.socket:
    server = socket.socket()
    server.bind((LOOPBACK, 0))
    server.listen()
    return server


def test_the_wanted_port_is_taken_when_it_is_free_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    assert Ports(file).claim("kafka", 12345, usable=lambda port: True) == 12345
    assert Ports(file).claim("kafka", 23456, usable=lambda port: True) == 12345


def test_another_port_is_chosen_when_the_wanted_one_is_taken(tmp_path: Path) -> None:
    with listen() as server:
        taken = server.getsockname()[1]
        assert not is_free(taken)
        chosen = Ports(tmp_path / "ports.json").claim("kafka", taken)
    assert chosen != taken


def test_a_remembered_port_that_was_taken_meanwhile_is_replaced_unless_the_stack_itself_runs_on_it(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    with listen() as server:
        port = server.getsockname()[1]
        Ports(file).claim("kafka", port, usable=lambda port: True)
        assert Ports(file, in_use=True).claim("kafka", port) == port
        assert Ports(file).claim("kafka", port) != port


def test_two_servers_never_get_the_same_port(tmp_path: Path) -> None:
    ports = Ports(tmp_path / "ports.json")
    first = ports.claim("s3", 15000, width=5, usable=lambda port: True)
    second = ports.claim("kafka", 15003, usable=lambda port: True)
    assert first == 15000
    assert second not in range(15000, 15005)


def test_no_free_port_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no free port"):
        Ports(tmp_path / "ports.json").claim("kafka", 12345, usable=lambda port: False)


def test_a_secret_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "secrets")
    first = secrets.get("admin-key")
    assert len(first) >= 24
    assert Secrets(tmp_path / "secrets").get("admin-key", lambda: "another") == first
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "secrets" / "admin-key").stat().st_mode) == 0o600
