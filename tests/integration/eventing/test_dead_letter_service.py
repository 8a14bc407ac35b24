"""Dead letters over gRPC, as `headrace dlq` sees them."""

from __future__ import annotations

import grpc
import pytest
from contracts.eventing.v1 import service_pb2, service_pb2_grpc
from eventing import dlq_grpc, topics
from eventing.dlq import DeadLetters
from servicekit.access import Rule, hash_secret
from servicekit.errors import Invalid, NotFound, from_rpc_error
from servicekit.rpc import Server, channel
from servicekit.settings import ServiceSettings

METHODS = ("ListDeadLetters", "GetDeadLetter", "ReplayDeadLetters", "DropDeadLetter")


@pytest.fixture
async def stub(local, until, cleanup):
    settings = ServiceSettings(
        database_url="postgresql+asyncpg://unused",
        kafka_bootstrap="unused",
        service_token="registry.secret",
        service_token_hashes=f"registry={hash_secret('registry.secret')}",
    )
    consumer = await local.consume()
    rules = {f"/{dlq_grpc.SERVICE}/{method}": Rule(services={"registry"}) for method in METHODS}
    server = Server("127.0.0.1:0", settings, rules)
    servicer = dlq_grpc.DeadLetterServicer(DeadLetters(local.engine, local.name, [consumer]))
    server.add(service_pb2_grpc.add_DeadLetterServiceServicer_to_server, servicer, dlq_grpc.SERVICE)
    port = await server.start()
    cleanup.push_async_callback(server.stop, 0)
    opened = channel(f"127.0.0.1:{port}", settings)
    cleanup.push_async_callback(opened.close)
    await local.relay()
    return service_pb2_grpc.DeadLetterServiceStub(opened)


async def test_parked_events_are_listed_shown_replayed_and_dropped(stub, local, until):
    await local.emit("run", payload=b"broken")
    await local.emit("run", payload=b"later")
    await until(lambda: local.scalar("SELECT count(*) FROM {s}.parked_event"), 2)

    listed = (await stub.ListDeadLetters(service_pb2.ListDeadLettersRequest())).dead_letters
    assert [(one.consumer, one.topic, one.key, one.sequence, one.event_type, one.payload) for one in listed] == [
        ("reader", topics.RUNS, "run", 1, "run.finished", b""),
        ("reader", topics.RUNS, "run", 2, "run.finished", b""),
    ]
    assert listed[0].reason == "Invalid: the payload is broken"
    assert listed[0].parked_at.seconds > 1_700_000_000
    named = service_pb2.ListDeadLettersRequest(consumer="other")
    assert len((await stub.ListDeadLetters(named)).dead_letters) == 0

    where = {"consumer": "reader", "topic": topics.RUNS, "key": "run"}
    shown = (await stub.GetDeadLetter(service_pb2.GetDeadLetterRequest(**where, sequence=1))).dead_letter
    assert (shown.payload, shown.event_id) == (b"broken", listed[0].event_id)

    replayed = await stub.ReplayDeadLetters(service_pb2.ReplayDeadLettersRequest(**where))
    assert (replayed.applied, replayed.remaining, replayed.reason) == (0, 2, "Invalid: the payload is broken")

    await stub.DropDeadLetter(service_pb2.DropDeadLetterRequest(**where, sequence=1, reason="sent by mistake"))
    replayed = await stub.ReplayDeadLetters(service_pb2.ReplayDeadLettersRequest(**where))
    assert (replayed.applied, replayed.remaining) == (1, 0)
    assert await local.effects("run") == [2]


async def test_what_is_not_there_is_not_found_and_a_drop_needs_a_reason(stub):
    where = {"consumer": "reader", "topic": topics.RUNS, "key": "run", "sequence": 1}
    for call, error in [
        (stub.GetDeadLetter(service_pb2.GetDeadLetterRequest(**where)), NotFound),
        (stub.DropDeadLetter(service_pb2.DropDeadLetterRequest(**where, reason="r")), NotFound),
        (stub.DropDeadLetter(service_pb2.DropDeadLetterRequest(**where, reason="  ")), Invalid),
        (stub.ReplayDeadLetters(service_pb2.ReplayDeadLettersRequest(consumer="x", topic="t", key="k")), NotFound),
    ]:
        with pytest.raises((grpc.aio.AioRpcError, Invalid)) as caught:
            await call
        raised = from_rpc_error(caught.value) if isinstance(caught.value, grpc.aio.AioRpcError) else caught.value
        assert type(raised) is error
