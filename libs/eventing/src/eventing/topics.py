"""The one table of topics: names, partition counts, what their keys mean. Names here are without the installation's prefix."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.errors import Invalid

from eventing.broker import Broker, TopicSpec

_DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. The partition count is fixed for ever: with another one, a key's events would change partition and lose their order."""

    name: str
    partitions: int
    key: str
    compacted: bool = False
    best_effort: bool = False
    """Outside the promise: no outbox, no inbox, no sequence, kept for a day."""
    retention_ms: int = -1

    @property
    def dead_letters(self) -> str:
        """The topic that gets a notice of every parked event of this one."""
        return f"{self.name}.dlq"


RUNS = "headrace.runs"
EVALS = "headrace.evals"
MODELS = "headrace.models"
DEPLOYS = "headrace.deploys"
ROUTES = "headrace.routes"
DELIVERIES = "headrace.deliveries"
ACCESS = "headrace.access"
JOBS = "headrace.jobs"
TRAFFIC = "headrace.traffic"

TOPICS: tuple[Topic, ...] = (
    Topic(RUNS, 12, key="run id"),
    Topic(EVALS, 6, key="model, as the delivery claims it"),
    Topic(MODELS, 6, key="model id"),
    Topic(DEPLOYS, 6, key="endpoint"),
    Topic(ROUTES, 4, key="endpoint", compacted=True),
    Topic(DELIVERIES, 4, key="delivery name", compacted=True),
    Topic(ACCESS, 4, key="access key id", compacted=True),
    Topic(JOBS, 6, key="job id"),
    Topic(TRAFFIC, 4, key="gateway instance", best_effort=True, retention_ms=_DAY_MS),
)

_BY_NAME = {topic.name: topic for topic in TOPICS}
_DEAD_LETTERS = {topic.dead_letters: topic for topic in TOPICS if not topic.best_effort}
_DLQ_RETENTION_MS = 30 * _DAY_MS


def topic(name: str) -> Topic:
    """The topic of this name (without prefix). Raises Invalid if there is none."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise Invalid(f"there is no topic {name!r}; topics stand in eventing.topics") from None


def durable(name: str) -> Topic:
    """The topic, if events in it are under the promise. Raises Invalid otherwise."""
    found = topic(name)
    if found.best_effort:
        raise Invalid(f"topic {name!r} is best effort: it takes no part in outbox and inbox")
    return found


def is_dead_letters(name: str) -> bool:
    return name in _DEAD_LETTERS


def specs(prefix: str = "", replication: int = -1) -> list[TopicSpec]:
    """How all topics are created, those for dead-letter notices included."""
    main = [TopicSpec(prefix + t.name, t.partitions, t.compacted, t.retention_ms, replication) for t in TOPICS]
    notices = [TopicSpec(prefix + name, 1, retention_ms=_DLQ_RETENTION_MS, replication=replication) for name in _DEAD_LETTERS]
    return main + notices


async def ensure_topics(broker: Broker, prefix: str = "", replication: int = -1) -> None:
    """Creates the topics that are missing. May be repeated, also by several processes at once.

    Raises Invalid if a topic exists with another partition count than the table says, Unavailable if the broker does not answer.
    """
    wanted = specs(prefix, replication)
    existing = await broker.topics()
    missing = [spec for spec in wanted if spec.name not in existing]
    if missing:
        await broker.create_topics(missing)
        existing = await broker.topics()
    for spec in wanted:
        count = existing.get(spec.name)
        if count is not None and count != spec.partitions:
            raise Invalid(f"topic {spec.name} has {count} partitions and must have {spec.partitions}: its keys would change their order")
