"""The broker port on Apache Kafka. The only module that imports aiokafka.

What aiokafka 0.14 needs: `getmany` is never cancelled, sends and stops are bounded by time-outs of our own (an idempotent send never
expires, and `stop` can wait for one), and a producer that has failed or lost its connection is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import defaultdict
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaClient, AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import CloseReason
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.producer.sender import Sender
from servicekit.errors import Unavailable

from eventing.broker import Fetched, OffsetOutOfRange, Partition, Polled, Producer, Reader, Record, TopicSpec
from eventing.partitioning import partition_of

_log = logging.getLogger(__name__)

_MAX_BATCH_BYTES = 1_000_000
"""Of one record batch; the broker's default limit is 1,048,588."""

_LOUD = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.CorruptRecordException,
    kafka_errors.RecordTooLargeError,
    kafka_errors.UnsupportedCodecError,
)
"""What no new consumer would mend. (aiokafka has passed over the record that is corrupt or too large.)"""

_TOPIC_WAIT_S = 2.0
"""How long a send looks for a topic that it does not know yet."""


_PRIVATE = (
    (AIOKafkaClient, "_get_conn", "_on_connection_closed"),
    (AIOKafkaClient, "__init__", "_md_update_fut"),
    (AIOKafkaProducer, "__init__", "_closed"),
    (AIOKafkaProducer, "__init__", "_sender"),
    (Sender, "__init__", "_sender_task"),
)
"""Private names of aiokafka that this module reads or sets, each with a function of aiokafka that does so too."""


def check_aiokafka() -> None:
    """Raises RuntimeError unless aiokafka has the private names that this module uses: a lost connection would pass unnoticed without."""
    missing = [name for cls, function, name in _PRIVATE if name not in _names(cls, function)]
    if not isinstance(getattr(Sender, "sender_task", None), property):
        missing.append("sender_task")
    if list(inspect.signature(AIOKafkaClient._on_connection_closed).parameters) != ["self", "conn", "reason"]:
        missing.append("_on_connection_closed(conn, reason)")
    if missing:
        raise RuntimeError(f"this aiokafka lacks {', '.join(missing)}")


def _names(cls: type, function: str) -> tuple[str, ...]:
    code = getattr(getattr(cls, function, None), "__code__", None)
    return () if code is None else code.co_names


class KafkaBroker:
    """A Kafka cluster. `options` go to every client of aiokafka: `security_protocol`, `ssl_context`, `sasl_mechanism` and so on."""

    def __init__(
        self,
        bootstrap: str,
        client_id: str,
        *,
        session_timeout_s: float = 6.0,
        request_timeout_s: float = 10.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`session_timeout_s`: after this long without a sign of life a member's partitions go to the others of its group."""
        check_aiokafka()
        own_log = logging.getLogger("aiokafka")
        if own_log.level == logging.NOTSET:
            # It logs an error for each of its ten attempts a second while a broker is away; we say that ourselves, with a backoff.
            own_log.setLevel(logging.CRITICAL)
        self._common = {
            **(options or {}),
            "bootstrap_servers": bootstrap,
            "client_id": client_id,
            "request_timeout_ms": int(request_timeout_s * 1000),
        }
        self._session_timeout_ms = int(session_timeout_s * 1000)
        self._request_timeout_s = request_timeout_s
        self._inspector: AIOKafkaConsumer | None = None
        self._inspecting = asyncio.Lock()

    def producer(self, *, best_effort: bool = False) -> Producer:
        return _KafkaProducer(self._common, best_effort, self._request_timeout_s)

    def group_reader(self, group: str, topics: Collection[str]) -> Reader:
        options = {
            **self._common,
            "group_id": group,
            "session_timeout_ms": self._session_timeout_ms,
            "heartbeat_interval_ms": self._session_timeout_ms // 5,
        }
        return _KafkaReader(self, options, topics, self._request_timeout_s)

    def reader(self, topics: Collection[str]) -> Reader:
        return _KafkaReader(self, {**self._common, "group_id": None}, topics, self._request_timeout_s)

    async def cluster_id(self) -> str:
        described = await self._administer(lambda admin: admin.describe_cluster())
        return str(described["cluster_id"])

    async def topics(self) -> Mapping[str, int]:
        described = await self._administer(lambda admin: admin.describe_topics())
        return {topic["topic"]: len(topic["partitions"]) for topic in described if not topic["is_internal"] and not topic["error_code"]}

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        new = [
            NewTopic(
                spec.name,
                spec.partitions,
                spec.replication,
                replica_assignments={} if spec.replication == -1 else None,  # else aiokafka refuses -1
                topic_configs={
                    "cleanup.policy": "compact" if spec.compacted else "delete",
                    "retention.ms": str(spec.retention_ms),
                    "max.message.bytes": str(spec.max_message_bytes),
                },
            )
            for spec in specs
        ]
        response = await self._administer(lambda admin: admin.create_topics(new))
        for name, code, *_ in response.topic_errors:
            error = kafka_errors.for_code(code)
            if error not in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
                raise Unavailable(f"topic {name} was not created: {error.__name__}")
        await self._wait_for_leaders([spec.name for spec in specs])

    async def _wait_for_leaders(self, names: Sequence[str]) -> None:
        """A topic is created some moments before it can be seen and used."""
        try:
            async with asyncio.timeout(self._request_timeout_s):
                while True:
                    described = await self._administer(lambda admin: admin.describe_topics(list(names)))
                    if all(topic["partitions"] and all(part["leader"] >= 0 for part in topic["partitions"]) for topic in described):
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError as exc:
            raise Unavailable("the new topics have no leaders yet") from exc

    async def offsets(self, partitions: Collection[Partition]) -> Mapping[Partition, tuple[int, int]]:
        wanted = [TopicPartition(*partition) for partition in partitions]
        async with self._inspecting:
            try:
                if self._inspector is None:
                    self._inspector = AIOKafkaConsumer(**self._common, group_id=None, enable_auto_commit=False)
                    await _bounded(self._inspector.start(), self._request_timeout_s)
                async with asyncio.timeout(self._request_timeout_s):
                    ends = await self._inspector.end_offsets(wanted)
                    starts = await self._inspector.beginning_offsets(wanted)
            except Exception as exc:
                await self._drop_inspector()
                raise Unavailable("Kafka does not tell its offsets", detail=repr(exc)) from exc
        return {partition: (starts[TopicPartition(*partition)], ends[TopicPartition(*partition)]) for partition in partitions}

    async def close(self) -> None:
        async with self._inspecting:
            await self._drop_inspector()

    async def _drop_inspector(self) -> None:
        inspector, self._inspector = self._inspector, None
        if inspector is not None:
            await _quietly(inspector.stop(), 1.5, "an inspecting consumer")

    async def _administer(self, ask: Any) -> Any:
        admin = AIOKafkaAdminClient(**self._common)
        try:
            await _bounded(admin.start(), self._request_timeout_s)
            return await _bounded(ask(admin), self._request_timeout_s)
        except (kafka_errors.KafkaError, OSError, TimeoutError) as exc:
            raise Unavailable("Kafka does not answer", detail=repr(exc)) from exc
        finally:
            await _quietly(admin.close(), 1.5, "an admin client")


class _KafkaProducer:
    """A producer of aiokafka that ends with its connection.

    aiokafka would reconnect and send what is in flight again by itself, for ever, and to whichever broker answers then: also to one that
    was wiped meanwhile. Here a connection that breaks fails the send at once, and a new producer is made after a look at the cluster.
    """

    def __init__(self, common: Mapping[str, Any], best_effort: bool, request_timeout_s: float) -> None:
        tuning = {"acks": 1} if best_effort else {"acks": "all", "enable_idempotence": True}
        self._options = {**common, **tuning, "max_batch_size": _MAX_BATCH_BYTES, "max_request_size": 8 * _MAX_BATCH_BYTES}
        self._request_timeout_s = request_timeout_s
        self._producer: AIOKafkaProducer | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self._producer = AIOKafkaProducer(**self._options)
        self._producer.client._on_connection_closed = self._connection_closed
        try:
            await _bounded(self._producer.start(), self._request_timeout_s)
        except (kafka_errors.KafkaError, OSError, TimeoutError) as exc:
            await self.stop()
            raise Unavailable("Kafka does not answer", detail=repr(exc)) from exc

    def _connection_closed(self, conn: object, reason: CloseReason) -> None:
        if reason not in (CloseReason.IDLE_DROP, CloseReason.SHUTDOWN):
            self._lose()

    def check(self) -> None:
        if self._lost.done():
            raise Unavailable("the connection to Kafka broke")

    def _lose(self) -> None:
        if not self._lost.done():
            self._lost.set_result(None)

    async def send(self, records: Sequence[Record], timeout_s: float = 10.0) -> Sequence[BaseException | None]:
        self._started()
        outcomes: list[BaseException | None] = [None] * len(records)
        sending = asyncio.ensure_future(self._send(records, outcomes))
        try:
            done, _ = await asyncio.wait({sending, self._lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not sending.done():
                # What is in flight may be stored all the same: sending it again is for the inbox to sort out.
                self._lose()
                sending.cancel()
                await asyncio.wait({sending})
        if not sending.cancelled():
            sending.result()
            return outcomes
        reason = "the connection broke" if done else f"no acknowledgement within {timeout_s:g} s"
        return [Unavailable(f"not written: {reason}")] * len(records)

    async def _send(self, records: Sequence[Record], outcomes: list[BaseException | None]) -> None:
        queues: dict[Partition, list[int]] = defaultdict(list)
        counts: dict[str, int | BaseException] = {}
        for index, record in enumerate(records):
            count = counts.get(record.topic)
            if count is None:
                count = counts[record.topic] = await self._partition_count(record.topic)
            if isinstance(count, BaseException):
                outcomes[index] = count
            else:
                queues[Partition(record.topic, partition_of(record.key, count))].append(index)
        await asyncio.gather(*(self._send_partition(partition, queue, records, outcomes) for partition, queue in queues.items()))

    async def _partition_count(self, topic: str) -> int | BaseException:
        try:
            # Not for long: the records of other topics wait behind.
            return len(await _bounded(self._started().partitions_for(topic), _TOPIC_WAIT_S))
        except (kafka_errors.KafkaError, TimeoutError) as exc:
            return Unavailable(f"topic {topic} cannot be written", detail=repr(exc))

    async def _send_partition(
        self, partition: Partition, queue: list[int], records: Sequence[Record], outcomes: list[BaseException | None]
    ) -> None:
        """Sends one partition's records as few batches, one at a time: the next only when the last is acknowledged."""
        producer = self._started()
        done = 0
        try:
            while done < len(queue):
                batch = producer.create_batch()
                end = done
                while end < len(queue) and _append(batch, records[queue[end]]):
                    end += 1
                batch.close()
                acknowledged = await producer.send_batch(batch, partition.topic, partition=partition.number)
                await acknowledged
                done = end
        except kafka_errors.KafkaError as exc:
            for index in queue[done:]:
                outcomes[index] = Unavailable(f"{partition} was not written", detail=repr(exc))

    def _started(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise RuntimeError("the producer is not started, or stopped")
        return self._producer

    async def stop(self, timeout_s: float = 1.5) -> None:
        producer, self._producer = self._producer, None
        if producer is None:
            return
        # A regular stop flushes: not after a loss, and it may wait for an acknowledgement that does not come.
        if self._lost.done() or not await _quietly(producer.stop(), timeout_s, "a producer"):
            await _abandon(producer, timeout_s)


async def _abandon(producer: AIOKafkaProducer, timeout_s: float) -> None:
    """Closes a producer without sending what it holds."""
    producer._closed = True
    if (sender := producer._sender.sender_task) is not None:
        sender.cancel()
    await _quietly(producer.client.close(), timeout_s, "a producer's client")
    if (refresh := producer.client._md_update_fut) is not None:
        refresh.cancel()  # its tasks would wait for this for ever


def _append(batch: BatchBuilder, record: Record) -> bool:
    added = batch.append(timestamp=record.timestamp_ms, key=record.key, value=record.value, headers=list(record.headers))
    return added is not None


class _KafkaReader:
    """A consumer of aiokafka behind the port. Records of a partition pass only between a `seek` and the next `pause` or assignment."""

    def __init__(self, broker: KafkaBroker, options: Mapping[str, Any], topics: Collection[str], request_timeout_s: float) -> None:
        self._broker = broker
        self._options = options
        self._topics = list(topics)
        self._request_timeout_s = request_timeout_s
        self._consumer: AIOKafkaConsumer | None = None
        self._fetching: asyncio.Task[Any] | None = None
        self._assigned: frozenset[Partition] = frozenset()
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._positioned: set[Partition] = set()
        self._stale: set[Partition] = set()

    async def start(self) -> None:
        self._consumer = AIOKafkaConsumer(
            **self._options,
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=250,
            max_partition_fetch_bytes=_MAX_BATCH_BYTES + 100_000,
        )
        try:
            await _bounded(self._consumer.start(), self._request_timeout_s)
            if self._options["group_id"] is not None:
                # Subscribed after the start: with topics given before, `start` waits for an assignment that may take long.
                self._consumer.subscribe(self._topics, listener=_Assignments(self))
            else:
                counts = await self._broker.topics()
                missing = [topic for topic in self._topics if topic not in counts]
                if missing:
                    raise Unavailable(f"there is no topic {', '.join(missing)} yet")
                assigned = frozenset(Partition(topic, number) for topic in self._topics for number in range(counts[topic]))
                self._consumer.assign([TopicPartition(*partition) for partition in assigned])
                self.assigned(assigned)
        except Unavailable:
            await self.stop()
            raise
        except (kafka_errors.KafkaError, OSError, TimeoutError) as exc:
            await self.stop()
            raise Unavailable("Kafka does not answer", detail=repr(exc)) from exc

    def assigned(self, assigned: frozenset[Partition]) -> None:
        """Called with a new assignment: nothing of it passes until it is positioned."""
        consumer = self._started()
        for partition in assigned:
            # A partition without a position keeps aiokafka from fetching any other: it gets one at which nothing is read.
            consumer.seek(TopicPartition(*partition), 0)
            consumer.pause(TopicPartition(*partition))
        self._assigned = assigned
        self._positioned.clear()
        if not self._changed.done():
            self._changed.set_result(None)

    def revoke(self) -> None:
        self._positioned.clear()

    async def poll(self, max_records: int, timeout_s: float) -> Polled:
        consumer = self._started()
        if self._fetching is None and not self._changed.done():
            self._stale.clear()
            self._fetching = asyncio.create_task(consumer.getmany(timeout_ms=int(timeout_s * 1000), max_records=max_records))
        waiting: set[asyncio.Future[Any]] = {self._changed}
        if self._fetching is not None:
            waiting.add(self._fetching)
        # The margin lets getmany's own time-out come first; while a group rebalances getmany has none.
        await asyncio.wait(waiting, timeout=timeout_s + 0.05, return_when=asyncio.FIRST_COMPLETED)
        records = self._fetched()
        if self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
            return Polled(records, assigned=self._assigned)
        return Polled(records)

    def _fetched(self) -> list[Fetched]:
        if self._fetching is None or not self._fetching.done():
            return []
        fetching, self._fetching = self._fetching, None
        try:
            fetched = fetching.result()
        except kafka_errors.NoOffsetForPartitionError:
            return []  # a partition that has no position yet: `seek` gives it one
        except kafka_errors.OffsetOutOfRangeError as exc:
            ((partition, offset),) = exc.args[0].items()
            partition = Partition(*partition)
            if partition not in self._positioned:
                return []
            raise OffsetOutOfRange(partition, offset) from exc
        except _LOUD:
            raise
        except (kafka_errors.KafkaError, OSError) as exc:
            raise Unavailable("Kafka does not deliver", detail=repr(exc)) from exc
        records = []
        for tp, batch in fetched.items():
            partition = Partition(*tp)
            if partition in self._positioned and partition not in self._stale:
                records += [
                    Fetched(partition, record.offset, record.key, record.value, tuple(record.headers), record.timestamp) for record in batch
                ]
        return records

    async def position(self, partition: Partition) -> int:
        return int(await self._started().position(TopicPartition(*partition)))

    def seek(self, partition: Partition, offset: int) -> None:
        if partition not in self._assigned:
            return
        tp = TopicPartition(*partition)
        with contextlib.suppress(kafka_errors.IllegalStateError):  # revoked a moment ago
            self._started().seek(tp, offset)
            self._started().resume(tp)
            if self._fetching is not None and self._fetching.done():
                self._stale.add(partition)  # what it holds was read from the old position
            self._positioned.add(partition)

    def pause(self, partition: Partition) -> None:
        if partition in self._positioned:
            self._positioned.discard(partition)
            with contextlib.suppress(kafka_errors.IllegalStateError):
                self._started().pause(TopicPartition(*partition))

    def _started(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("the reader is not started, or stopped")
        return self._consumer

    async def stop(self, timeout_s: float = 1.5) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None and not await _quietly(consumer.stop(), timeout_s, "a consumer"):
            await _quietly(consumer._client.close(), timeout_s, "a consumer's client")
        fetching, self._fetching = self._fetching, None
        if fetching is not None:
            fetching.cancel()  # harmless now: nobody reads on from this consumer
            await asyncio.wait({fetching})
            if not fetching.cancelled():
                fetching.exception()


class _Assignments(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka publishes no types
    def __init__(self, reader: _KafkaReader) -> None:
        self._reader = reader

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._reader.revoke()

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._reader.assigned(frozenset(Partition(*tp) for tp in assigned))


async def _bounded(work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    async with asyncio.timeout(timeout_s):
        return await work


async def _quietly(work: Coroutine[Any, Any, Any], timeout_s: float, what: str) -> bool:
    """Runs a clean-up that may hang or fail, for `timeout_s` at most. True if it ended by itself."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
        _log.warning("%s did not close within %g s and was abandoned", what, timeout_s)
        return False
    if not task.cancelled() and (exc := task.exception()) is not None:
        _log.info("closing %s: %r", what, exc)
    return True
