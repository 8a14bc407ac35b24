"""Three requests of the Kafka protocol, spoken directly: whose broker this is, which topics it has, delete some topics.

No client library is worth its start-up time here. Layouts: the protocol guide of Apache
Kafka, Metadata version 5 and DeleteTopics version 3 (the last ones without tagged fields).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from localstack.errors import StackError

_METADATA, _DELETE_TOPICS = 3, 20
_CORRELATION = 7
_LARGEST_ANSWER = 64 * 1024 * 1024


@dataclass(frozen=True)
class ClusterView:
    """What a broker says of its cluster."""

    cluster_id: str
    brokers: int
    topics: tuple[str, ...]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise StackError("Kafka's answer is cut short")
        self._at += count
        return piece

    def number(self, layout: str) -> int:
        value: int = struct.unpack(">" + layout, self.take(struct.calcsize(">" + layout)))[0]
        return value

    def text(self) -> str:
        length = self.number("h")
        return "" if length < 0 else self.take(length).decode()

    def skip_numbers(self) -> None:
        self.take(4 * max(0, self.number("i")))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">h", len(raw)) + raw


def _ask(address: tuple[str, int], api: int, version: int, body: bytes, timeout_s: float) -> _Reader:
    message = struct.pack(">hhi", api, version, _CORRELATION) + _string("localstack") + body
    try:
        with socket.create_connection(address, timeout_s) as connection:
            connection.sendall(struct.pack(">i", len(message)) + message)
            with connection.makefile("rb") as answer:
                head = answer.read(4)
                length = struct.unpack(">i", head)[0] if len(head) == 4 else -1
                if not 0 <= length <= _LARGEST_ANSWER:
                    raise StackError("what listens there does not speak Kafka")
                reader = _Reader(answer.read(length))
    except OSError as error:
        raise StackError(f"Kafka at {address[0]}:{address[1]} does not answer: {error}") from error
    if reader.number("i") != _CORRELATION:
        raise StackError("what listens there does not speak Kafka")
    return reader


def describe(address: tuple[str, int], timeout_s: float = 5) -> ClusterView:
    """Cluster id, number of live brokers and all topics. Blocks; raises StackError."""
    reader = _ask(address, _METADATA, 5, struct.pack(">i?", -1, False), timeout_s)
    reader.number("i")  # throttle time
    brokers = reader.number("i")
    for _ in range(brokers):
        reader.number("i")
        reader.text()
        reader.number("i")
        reader.text()
    cluster_id = reader.text()
    reader.number("i")  # controller
    topics = []
    for _ in range(reader.number("i")):
        reader.number("h")
        topics.append(reader.text())
        reader.take(1)
        for _ in range(reader.number("i")):
            reader.take(2 + 4 + 4)
            for _ in ("replicas", "in sync", "offline"):
                reader.skip_numbers()
    return ClusterView(cluster_id, brokers, tuple(topics))


def delete_topics(address: tuple[str, int], topics: Sequence[str], timeout_s: float = 30) -> None:
    """Deletes topics; those that are gone already are fine. Blocks; raises StackError."""
    if not topics:
        return
    body = struct.pack(">i", len(topics)) + b"".join(map(_string, topics)) + struct.pack(">i", int(timeout_s * 1000))
    reader = _ask(address, _DELETE_TOPICS, 3, body, timeout_s + 5)
    reader.number("i")
    unknown_topic = 3
    for _ in range(reader.number("i")):
        name, code = reader.text(), reader.number("h")
        if code not in (0, unknown_topic):
            raise StackError(f"Kafka refused to delete {name}: error code {code}")
