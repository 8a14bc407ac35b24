"""Points in time on the wire."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp


def moment(at: datetime) -> Timestamp:
    """A point in time, given aware of its zone."""
    message = Timestamp()
    message.FromDatetime(at)
    return message
