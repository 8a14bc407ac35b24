"""The envelope of an event: CloudEvents 1.0 in the binary mode of its Kafka binding.

The value of a Kafka record is the bare protobuf message; everything about it stands in the record's headers. Source: CloudEvents
1.0.2, "Kafka Protocol Binding", section 3.2, and the extension "sequence".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from servicekit.errors import Invalid

Headers = tuple[tuple[str, bytes], ...]

CONTENT_TYPE = b"application/protobuf"
_SPEC_VERSION = b"1.0"


@dataclass(frozen=True, slots=True)
class Event:
    """An event to publish.

    `type` as `run.finished`; `topic` a name of `eventing.topics` without the prefix; `key` what must stay in order; `sequence` the
    key's next number in this topic, from 1 without gaps, taken under the lock of the aggregate's row; `payload` a serialised
    protobuf message. `traceparent` is filled from the current trace context when it is empty. `must_understand` keeps consumers
    that do not know the type from skipping the event.
    """

    type: str
    topic: str
    key: str
    sequence: int
    payload: bytes
    id: UUID
    time: datetime
    subject: str = ""
    traceparent: str = ""
    must_understand: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """An event as a consumer gets it: the fields of `Event`, who sent it, and where in the log it stands.

    `topic` is without the prefix. `sequence` is 0 in best-effort topics and notices, which are not sequenced.
    """

    type: str
    topic: str
    key: str
    sequence: int
    payload: bytes
    id: UUID
    time: datetime
    subject: str
    traceparent: str
    must_understand: bool
    source: str
    partition: int
    offset: int
    headers: Headers
    cluster_id: str


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the headers of a record say."""

    id: UUID
    type: str
    source: str
    time: datetime
    sequence: int
    subject: str
    traceparent: str
    must_understand: bool


def encode_headers(event: Event, source: str) -> Headers:
    """The headers of the record that carries `event`, sent by `source` (a URI reference such as `/headrace/tracker`)."""
    headers = [
        ("ce_specversion", _SPEC_VERSION),
        ("ce_id", str(event.id).encode()),
        ("ce_type", event.type.encode()),
        ("ce_source", source.encode()),
        ("ce_time", _format_time(event.time).encode()),
        ("content-type", CONTENT_TYPE),
    ]
    if event.sequence:
        headers.append(("ce_sequence", str(event.sequence).encode()))
    if event.subject:
        headers.append(("ce_subject", event.subject.encode()))
    if event.traceparent:
        headers.append(("traceparent", event.traceparent.encode()))
    if event.must_understand:
        headers.append(("ce_mustunderstand", b"1"))
    return tuple(headers)


def decode_headers(headers: Iterable[tuple[str, bytes]]) -> Attributes:
    """Reads the headers of a record. Raises Invalid naming the header that is missing or wrong.

    Headers that are not ours are passed over; where one is given twice the first counts.
    """
    found: dict[str, bytes] = {}
    for name, value in headers:
        found.setdefault(name, value)
    if found.get("ce_specversion") != _SPEC_VERSION:
        raise Invalid(f"header ce_specversion is not 1.0 but {found.get('ce_specversion')!r}")
    try:
        return Attributes(
            id=UUID(found["ce_id"].decode()),
            type=found["ce_type"].decode(),
            source=found["ce_source"].decode(),
            time=_parse_time(found["ce_time"].decode()),
            sequence=_parse_sequence(found.get("ce_sequence", b"0")),
            subject=found.get("ce_subject", b"").decode(),
            traceparent=found.get("traceparent", b"").decode(),
            must_understand=found.get("ce_mustunderstand") == b"1",
        )
    except KeyError as exc:
        raise Invalid(f"header {exc.args[0]} is missing") from exc
    except ValueError as exc:  # UnicodeDecodeError is one too
        raise Invalid(f"unreadable header: {exc}") from exc


def _parse_sequence(text: bytes) -> int:
    if not text.isdigit():
        raise ValueError(f"ce_sequence is {text!r}")
    return int(text)


def _format_time(time: datetime) -> str:
    if time.tzinfo is None:
        raise Invalid("the time of an event has no time zone")
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"ce_time {text!r} has no time zone")
    return time.astimezone(UTC)
