"""The private names of aiokafka: a version that lacks one is refused before anything is sent with it."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaClient
from aiokafka.producer.sender import Sender
from eventing import kafka


def test_the_installed_aiokafka_has_them() -> None:
    kafka.check_aiokafka()


def test_a_version_that_keeps_no_sender_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Sender, "sender_task")
    with pytest.raises(RuntimeError, match="lacks sender_task"):
        kafka.KafkaBroker("127.0.0.1:1", "test")


def test_a_version_that_tells_of_lost_connections_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def _get_conn(self: object) -> None:
        return None

    monkeypatch.setattr(AIOKafkaClient, "_get_conn", _get_conn)
    with pytest.raises(RuntimeError, match="lacks _on_connection_closed"):
        kafka.KafkaBroker("127.0.0.1:1", "test")
