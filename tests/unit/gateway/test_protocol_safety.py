"""Raw bytes against the gateway: smuggling, floods, slow clients, pipelining, HTTP/1.0, 100-continue, closing, and stopping."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable

import pytest
from gateway.newcomers import origin
from gateway.plane import Limits
from gateway.server import DataProtocol

from tests.unit.gateway.conftest import KEY, Answer, Gateway, MakeGateway, Runtime, infer_body, outputs, request, until

AUTH = f"Authorization: Bearer {KEY}\r\n".encode()
LINE = b"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\n" + AUTH

SMUGGLED = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    b"Content-Length: +5\r\n\r\nhello",
    b"Content-Length: 5, 5\r\n\r\nhello",
    b"Content-Length: -1\r\n\r\n",
    b"Content-Length: 0x5\r\n\r\nhello",
    b"Content-Length : 5\r\n\r\nhello",
    b"Content-Length: 99999999999999999999999\r\n\r\n",
    b"Transfer-Encoding: gzip\r\n\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    b"X-Fold: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
    b"X-Null: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
    b"X-Cr: a\rb\r\nContent-Length: 2\r\n\r\n{}",
    b"X Space: a\r\nContent-Length: 2\r\n\r\n{}",
    b": empty\r\nContent-Length: 2\r\n\r\n{}",
    b"Host: other\r\nContent-Length: 2\r\n\r\n{}",
    b"X-API-Key: a\r\nX-API-Key: b\r\nContent-Length: 2\r\n\r\n{}",
    AUTH + b"Content-Length: 2\r\n\r\n{}",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}",
]


@pytest.mark.parametrize("rest", SMUGGLED)
async def test_what_two_readers_could_read_differently_is_refused_and_closed(gateway: Gateway, runtime: Runtime, rest: bytes) -> None:
    client = await gateway.connect()
    client.send(LINE + rest + b"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\n" + AUTH + b"Content-Length: 2\r\n\r\n{}")
    first, *others = split(await client.rest())
    assert 400 <= first < 600
    assert others == []
    assert runtime.seen == []


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v2/models/flights/infer HTTP/1.1\n" + AUTH.replace(b"\r\n", b"\n") + b"Host: g\nContent-Length: 2\n\n{}",
        b"POST /v2/models/flights/infer HTTP/2.0\r\nHost: g\r\n" + AUTH + b"Content-Length: 2\r\n\r\n{}",
        b"POST /v2/models/flights/infer HTTP/0.9\r\nHost: g\r\n" + AUTH + b"Content-Length: 2\r\n\r\n{}",
        b"POST /v2/models/flights/infer\r\n\r\n",
        b"POST /v2/models/flights/infer HTTP/1.1\r\n" + AUTH + b"Content-Length: 2\r\n\r\n{}",
        b"POST /v2/models/fl\tights/infer HTTP/1.1\r\nHost: g\r\n\r\n",
        b"CONNECT g:80 HTTP/1.1\r\nHost: g\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"POST /v2/models/flights/infer HTTP/1.0\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_1_is_refused_and_closed(gateway: Gateway, runtime: Runtime, head: bytes) -> None:
    client = await gateway.connect()
    client.send(head)
    first, *others = split(await client.rest())
    assert 400 <= first < 600
    assert others == []
    assert runtime.seen == []


def split(data: bytes) -> list[int]:
    """The statuses of the answers in these bytes; fails if they are anything else."""
    statuses = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        statuses.append(int(lines[0].split(" ")[1]))
        length = int(next(line for line in lines if line.startswith("content-length: ")).split(" ")[1])
        assert len(data) >= length
        data = data[length:]
    return statuses


async def test_a_body_in_single_bytes_is_a_body(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    for byte in request():
        client.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.reply()).status == 200
    assert runtime.seen[0].body == infer_body()


# Limits of the head


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_long_head_is_refused_however_it_comes(make_gateway: MakeGateway, at_once: bool) -> None:
    gateway = await make_gateway(Limits(max_head_bytes=4096))
    gateway.route()
    client = await gateway.connect()
    head = LINE + b"X-Long: " + b"x" * 40_000 + b"\r\nContent-Length: 2\r\n\r\n{}"
    for at in range(0, len(head), len(head) if at_once else 1000):
        client.send(head[at : at + (len(head) if at_once else 1000)])
        await asyncio.sleep(0)
    assert (await client.reply()).status == 431


async def test_a_long_head_behind_another_request_in_one_read_is_refused(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_head_bytes=4096))
    gateway.route()
    client = await gateway.connect()
    client.send(request() + LINE + b"X-Long: " + b"x" * 40_000 + b"\r\nContent-Length: 2\r\n\r\n{}")
    assert (await client.reply()).status == 200
    assert (await client.reply()).status == 431
    assert await client.rest() == b""


async def test_too_many_headers_are_refused(gateway: Gateway) -> None:
    client = await gateway.connect()
    client.send(LINE + b"".join(b"X-%d: 1\r\n" % number for number in range(200)) + b"Content-Length: 2\r\n\r\n{}")
    assert (await client.reply()).status == 431


async def test_a_head_within_the_limit_passes_with_a_long_body_in_the_same_read(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_head_bytes=4096))
    gateway.route()
    client = await gateway.connect()
    assert (await client.infer(infer_body() + b" " * 100_000)).status == 200


# Slow clients. Time is the sweep's argument: none passes here.


async def test_slow_heads_and_bodies_are_ended(gateway: Gateway) -> None:
    for piece in (b"POST /v2/mod", LINE + b"Content-Length: 100\r\n\r\nhalf"):
        client = await gateway.connect()
        client.send(piece)
        connection = await the_connection(gateway, lambda one: one._phase in (1, 2))
        now = time.monotonic()
        connection.sweep(now)
        connection.sweep(now + 9)
        assert not connection._stopped
        connection.sweep(now + 31)
        assert (await client.reply()).status == 408
        assert await client.rest() == b""
        client.close()
        await until(lambda: not gateway.plane.connections)


async def test_idle_connections_are_closed_and_busy_ones_are_not(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    assert (await client.infer()).status == 200
    connection = await the_connection(gateway, lambda one: True)
    now = time.monotonic()
    connection.sweep(now)
    connection.sweep(now + 76)
    assert await client.rest() == b""
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request())
    await until(lambda: len(runtime.seen) == 2)
    connection = await the_connection(gateway, lambda one: True)
    connection.sweep(now)
    connection.sweep(now + 1000)
    runtime.release.set()
    assert (await client.reply()).status == 200


async def test_a_connection_that_has_just_come_is_not_taken_for_an_idle_one(gateway: Gateway) -> None:
    gateway.route()
    client = await gateway.connect()
    connection = await the_connection(gateway, lambda one: True)
    connection.sweep(time.monotonic())  # before the client has sent its first byte
    assert not connection.transport.is_closing()
    assert (await client.infer()).status == 200


async def the_connection(gateway: Gateway, condition: Callable[[DataProtocol], bool]) -> DataProtocol:
    connections = gateway.plane.connections
    await until(lambda: len(connections) == 1 and condition(next(iter(connections))))
    return next(iter(connections))


async def test_more_connections_than_allowed_are_cut(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_connections=2))
    gateway.route()
    clients = []
    for _ in range(2):
        clients.append(await gateway.connect())
        assert (await clients[-1].infer()).status == 200
    third = await gateway.connect()
    assert await third.rest() == b""
    clients[0].close()
    await until(lambda: len(gateway.plane.connections) == 1)
    assert (await (await gateway.connect()).infer()).status == 200


async def test_half_open_connections_without_a_key_lock_nobody_out(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(max_connections=20))
    gateway.route()
    known = await gateway.connect()
    assert (await known.infer()).status == 200
    half = []
    for _ in range(60):
        half.append(await gateway.connect())
        half[-1].send(b"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\n")
    # One address holds a quarter, whatever it opens, and the oldest went: the newest are still there.
    await until(lambda: len(gateway.plane.newcomers) == 5 and len(gateway.plane.connections) == 6)
    for client in half[:-5]:
        assert await client.rest() == b""
    new = await gateway.connect()
    assert (await new.infer()).status == 200
    new.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: g\r\n\r\n")
    assert (await new.reply()).status == 200
    assert (await known.infer()).status == 200
    probe = await gateway.connect()
    probe.send(b"GET /v2/health/live HTTP/1.1\r\nHost: g\r\n\r\n")
    assert (await probe.reply()).status == 200


async def test_full_of_newcomers_the_oldest_makes_room_and_none_that_has_shown_its_key(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(max_connections=4, newcomers_share=1.0))
    gateway.route()
    known = await gateway.connect()
    assert (await known.infer()).status == 200
    refused = await gateway.connect()
    assert (await refused.infer(key="hr_0000000000000000_" + "x" * 32)).status == 401
    later = [await gateway.connect() for _ in range(2)]
    await until(lambda: len(gateway.plane.connections) == 4)
    new = await gateway.connect()
    assert (await new.infer()).status == 200
    assert await refused.rest() == b""
    for client in (*later, known, new):
        assert (await client.infer()).status == 200
    # All have shown a key now: there is nobody to make room.
    assert await (await gateway.connect()).rest() == b""


async def test_what_is_being_answered_is_not_shed(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_connections=4))
    client = await gateway.connect()
    client.send(b"GET /held HTTP/1.1\r\nHost: g\r\n\r\n")
    await until(lambda: gateway.held == 1)
    others = [await gateway.connect() for _ in range(10)]
    for other in others[:-1]:
        assert await other.rest() == b""
    gateway.let_go.set()
    assert (await client.reply()).status == 200
    # Answered, but without a key: it waits again, as the newest.
    assert await others[-1].rest() == b""
    assert list(gateway.plane.connections) == [await the_connection(gateway, lambda one: not one._proven)]


async def test_a_key_shown_to_the_control_plane_counts(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_connections=4))
    gateway.route()
    client = await gateway.connect()
    client.send(b"GET /api/v1/runs HTTP/1.1\r\nHost: g\r\n" + AUTH + b"\r\n")
    assert (await client.reply()).status == 200
    for _ in range(10):
        await gateway.connect()
    await until(lambda: len(gateway.plane.connections) == 2)
    assert (await client.infer()).status == 200


def test_one_client_is_an_address_or_a_network_of_version_6() -> None:
    assert origin("10.0.0.1") == origin("::ffff:10.0.0.1") != origin("10.0.0.2")
    assert origin("2001:db8::1") == origin("2001:db8::ffff:1:2") != origin("2001:db8:0:1::1")
    assert origin("fe80::1%eth0") == origin("fe80::2%eth1")


# Pipelining


async def test_pipelined_requests_are_answered_in_order(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(body=outputs(seen.model, [json.loads(seen.body)["inputs"][0]["data"][0]]))
    client = await gateway.connect()
    client.send(b"".join(request(infer_body(float(number))) for number in range(10)))
    for number in range(10):
        assert (await client.reply()).json["outputs"][0]["data"] == [number]


async def test_data_path_and_control_are_answered_in_order(gateway: Gateway) -> None:
    client = await gateway.connect()
    control = b"GET /api/v1/x HTTP/1.1\r\nHost: g\r\n\r\n"
    refused = request(key="")
    client.send(control + request() + control + refused + request() + control)
    kinds = []
    for _ in range(6):
        reply = await client.reply()
        kinds.append("control" if "path" in reply.json else reply.status)
    assert kinds == ["control", 200, "control", 401, 200, "control"]


async def test_a_client_that_sends_too_far_ahead_is_cut_off(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request())
    await until(lambda: runtime.seen)
    client.send(request() * 20)
    assert await client.rest() == b""
    await until(lambda: runtime.open == 0, "the end of the runtime's work")
    assert len(runtime.seen) == 1


async def test_pipelined_bodies_beyond_the_limit_are_cut_off(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(max_body_bytes=10_000))
    gateway.route()
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request(b"x" * 9_000) * 5)
    assert await client.rest() == b""


async def test_garbage_behind_a_request_does_not_take_its_answer(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(delay_s=0.02)
    client = await gateway.connect()
    client.send(request() + b"GARBAGE\r\n\r\n")
    assert (await client.reply()).status == 200
    assert (await client.reply()).status == 400
    assert await client.rest() == b""


async def test_nothing_is_answered_behind_connection_close(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    client.send(request(connection="close") + request())
    assert split(await client.rest()) == [200]
    assert len(runtime.seen) == 1


async def test_a_refused_request_leaves_the_connection_usable(gateway: Gateway) -> None:
    client = await gateway.connect()
    for _ in range(3):
        assert (await client.infer(key="", body=b"x" * 5000)).status == 401
        assert (await client.infer()).status == 200


# Closing


async def test_a_client_that_leaves_ends_the_runtimes_work(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request())
    await until(lambda: runtime.seen)
    client.close()
    await until(lambda: runtime.dropped == 1, "the end of the runtime's work")
    total = gateway.totals()["v1-g1"]
    assert total["errors"] == 0


async def test_a_client_that_only_closes_its_side_has_left(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request())
    await until(lambda: runtime.seen)
    client.writer.write_eof()
    assert await client.rest() == b""
    await until(lambda: runtime.dropped == 1)


async def test_a_client_that_leaves_while_it_waits_in_line_is_noticed(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(hang=True)
    client = await gateway.connect()
    client.send(request() * 3 + b"GET /api/v1/x HTTP/1.1\r\nHost: g\r\n\r\n")
    await until(lambda: runtime.seen)
    client.close()
    await until(lambda: runtime.dropped == 1)
    assert not gateway.plane.connections


# HTTP/1.0 and 100-continue


@pytest.mark.parametrize("keep", [False, True])
async def test_http_1_0_is_answered_as_it_asks(make_gateway: MakeGateway, runtime: Runtime, keep: bool) -> None:
    gateway = await make_gateway(Limits(stream_above=100))
    gateway.route()
    body = infer_body()
    head = (
        b"POST /v2/models/flights/infer HTTP/1.0\r\n"
        + AUTH
        + (b"Connection: keep-alive\r\n" if keep else b"")
        + b"Content-Length: %d\r\n\r\n" % len(body)
    )
    client = await gateway.connect()
    client.send(head + body)
    reply = await client.reply()
    assert reply.status == 200
    assert reply.headers["connection"] == ("keep-alive" if keep else "close")
    assert "transfer-encoding" not in reply.headers
    if keep:
        # A length that is not known beforehand ends with the connection: 1.0 knows no chunks.
        long = outputs("m-v1-g1", [0.5] * 100)
        runtime.behave = lambda seen: Answer(
            raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
            % (len(long), long)
        )
        client.send(head + body)
        head_, _, content = (await client.rest()).partition(b"\r\n\r\n")
        assert b"connection: close" in head_
        assert json.loads(content)["model_name"] == "flights"
    else:
        assert await client.rest() == b""


async def test_100_continue_is_given_when_the_request_may_come(gateway: Gateway) -> None:
    client = await gateway.connect()
    body = infer_body()
    client.send(LINE + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert (await client.reply()).status == 100
    client.send(body)
    assert (await client.reply()).status == 200


async def test_100_continue_is_refused_with_the_answer_and_a_close(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_body_bytes=1000))
    gateway.route()
    for head, status in (
        (
            b"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\nX-API-Key: wrong\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n",
            401,
        ),
        (LINE + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n", 413),
    ):
        client = await gateway.connect()
        client.send(head)
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert await client.rest() == b""


async def test_a_refusal_reaches_a_client_that_is_still_sending(make_gateway: MakeGateway) -> None:
    gateway = await make_gateway(Limits(max_body_bytes=1000))
    gateway.route()
    client = await gateway.connect()
    client.send(LINE + b"Content-Length: 3000000\r\n\r\n")
    for _ in range(30):
        client.send(b"x" * 100_000)
        await asyncio.sleep(0)
    assert (await client.reply()).status == 413


# The runtime's side


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"SSH-2.0-x\r\n",
    ],
)
async def test_an_answer_that_cannot_be_trusted_is_a_502(gateway: Gateway, runtime: Runtime, raw: bytes) -> None:
    client = await gateway.connect()
    runtime.behave = lambda seen: Answer(raw=raw)
    reply = await client.infer()
    assert reply.status == 502
    assert set(reply.json) == {"error"}
    runtime.behave = lambda seen: Answer()
    assert (await client.infer()).status == 200
    assert runtime.connections == 2


async def test_bytes_behind_an_answer_reach_nobody(gateway: Gateway, runtime: Runtime) -> None:
    good = outputs("m-v1-g1", [0.5])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(good)
    runtime.behave = lambda seen: Answer(raw=head + good + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
    client = await gateway.connect()
    for number in range(1, 4):
        reply = await client.infer()
        assert reply.json["outputs"][0]["data"] == [0.5]
        assert runtime.connections == number


async def test_interim_answers_are_passed_over(gateway: Gateway, runtime: Runtime) -> None:
    good = outputs("m-v1-g1", [0.5])
    runtime.behave = lambda seen: Answer(
        raw=b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(good), good)
    )
    client = await gateway.connect()
    for _ in range(2):
        assert (await client.infer()).json["outputs"][0]["data"] == [0.5]
    assert runtime.connections == 1


# Stopping


async def test_stopping_finishes_what_is_being_answered(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway()
    gateway.route()
    idle, busy, half = [await gateway.connect() for _ in range(3)]
    assert (await idle.infer()).status == 200
    runtime.behave = lambda seen: Answer(hang=True)
    busy.send(request())
    whole = request()
    half.send(whole[:60])
    await until(lambda: len(runtime.seen) == 2 and any(one._fed == 60 for one in gateway.plane.connections), "half a head has come")
    stopping = asyncio.create_task(gateway.server.stop())
    assert await idle.rest() == b""
    runtime.behave = lambda seen: Answer()
    half.send(whole[60:])
    reply = await half.reply()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert not stopping.done()
    runtime.release.set()
    reply = await busy.reply()
    assert reply.status == 200
    assert await busy.rest() == b""
    await stopping
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", gateway.server.port)


# Any order of bytes


async def test_however_the_bytes_are_cut_the_answers_are_the_same(gateway: Gateway, runtime: Runtime) -> None:
    chance = random.Random(5)
    chunked = LINE + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in infer_body()) + b"0\r\n\r\n"
    wire = request() + b"GET /api/v1/x HTTP/1.1\r\nHost: g\r\n\r\n" + request(key="") + chunked + request(b"x" * 3000)
    for _ in range(40):
        client = await gateway.connect()
        cuts = sorted(chance.sample(range(1, len(wire)), chance.randrange(1, 12)))
        for start, end in itertools.pairwise([0, *cuts, len(wire)]):
            client.send(wire[start:end])
            await asyncio.sleep(0)
        assert [(await client.reply()).status for _ in range(5)] == [200, 200, 401, 200, 200]
        client.close()
    assert {seen.body for seen in runtime.seen} == {infer_body(), b"x" * 3000}


async def test_broken_bytes_break_only_their_own_connection(gateway: Gateway, runtime: Runtime) -> None:
    chance = random.Random(6)
    steady = await gateway.connect()
    for _ in range(300):
        wire = bytearray(request() * 2)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(wire))
            match chance.randrange(3):
                case 0:
                    wire[at] = chance.randrange(256)
                case 1:
                    del wire[at : at + chance.randrange(1, 20)]
                case _:
                    wire[at:at] = chance.choice(
                        [b"\r\n", b"\x00", b" ", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"]
                    )
        client = await gateway.connect()
        client.send(bytes(wire))
        client.writer.write_eof()
        split(await client.rest())
        client.close()
        assert (await steady.infer()).status == 200
    await until(lambda: len(gateway.plane.connections) == 1)
    assert {seen.path for seen in runtime.seen} <= {"/v2/models/m-v1-g1/infer", "/v2/models/m-v1-g1", "/v2/models/m-v1-g1/ready"}


async def test_an_idle_connection_keeps_no_bytes(gateway: Gateway) -> None:
    client = await gateway.connect()
    await client.infer(b"x" * 100_000)
    (connection,) = gateway.plane.connections
    assert (connection.cycle.body, connection.cycle.wire) == (b"", b"")
