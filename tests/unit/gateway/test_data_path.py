"""What a caller of the data path gets: answers, names, versions, errors in V2's form, and nothing that is not public."""

from __future__ import annotations

import json
import re
import time

import pytest
from gateway.plane import Limits

from tests.unit.gateway.conftest import ADMIN, KEY, Answer, Gateway, MakeGateway, Runtime, infer_body, outputs, request, until


async def test_answers_with_the_runtimes_answer_under_the_endpoints_name(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    reply = await client.infer(infer_body(3.0))
    assert reply.status == 200
    assert reply.json == {"model_name": "flights", "model_version": "1", "outputs": json.loads(outputs("m", [0.25]))["outputs"]}
    assert runtime.seen[0].path == "/v2/models/m-v1-g1/infer"
    assert runtime.seen[0].body == infer_body(3.0)
    assert reply.headers["x-headrace-model-version"] == "1"
    assert reply.headers["x-headrace-arm"] == "v1-g1"
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", reply.headers["x-request-id"])
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", reply.headers["traceparent"])
    assert reply.headers["date"].endswith(" GMT")
    assert runtime.seen[0].headers["traceparent"] == reply.headers["traceparent"]


async def test_request_ids_are_unique_and_the_callers_own_is_given_back_beside(gateway: Gateway) -> None:
    client = await gateway.connect()
    replies = [await client.infer(x_request_id="order-42") for _ in range(50)]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 50
    assert {reply.headers["x-client-request-id"] for reply in replies} == {"order-42"}
    unsafe = await client.infer(x_request_id='a"b')
    assert "x-client-request-id" not in unsafe.headers


async def test_joins_the_callers_trace(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    reply = await client.infer(traceparent="00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-00")
    assert reply.headers["traceparent"].split("-")[1] == "0123456789abcdef0123456789abcdef"
    assert reply.headers["traceparent"].split("-")[2] != "00f067aa0ba902b7"
    broken = await client.infer(traceparent="00-00000000000000000000000000000000-00f067aa0ba902b7-01")
    assert broken.headers["traceparent"].split("-")[1] != "0" * 32


async def test_upstream_connections_are_reused(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    for _ in range(20):
        assert (await client.infer()).status == 200
    assert runtime.connections == 1
    assert len(runtime.seen) == 20


async def test_idle_upstream_connections_are_kept_for_a_while_and_then_closed(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    assert (await client.infer()).status == 200
    (pool, _) = gateway.plane.arms.pools()
    pool.sweep(time.monotonic() + 25)
    assert pool.connections == 1
    pool.sweep(time.monotonic() + 60)
    await until(lambda: runtime.open == 0)
    assert (await client.infer()).status == 200
    assert runtime.connections == 2


async def test_a_connection_that_the_runtime_closed_is_replaced_without_an_error(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    runtime.behave = lambda seen: Answer(close=True)
    for _ in range(5):
        assert (await client.infer()).status == 200
    assert gateway.totals()["v1-g1"]["errors"] == 0


async def test_an_answer_in_many_reads_is_put_together(gateway: Gateway, runtime: Runtime) -> None:
    values = [index / 7 for index in range(30_000)]
    runtime.behave = lambda seen: Answer(body=outputs(seen.model, values))
    reply = await (await gateway.connect()).infer()
    assert reply.json["model_name"] == "flights"
    assert reply.json["outputs"][0]["data"] == values


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_long_answer_is_streamed_and_whole(make_gateway: MakeGateway, runtime: Runtime, chunked: bool) -> None:
    gateway = await make_gateway(Limits(stream_above=10_000))
    gateway.route()
    values = [index / 7 for index in range(30_000)]

    def behave(seen: object) -> Answer:
        body = outputs("m-v1-g1", values)
        if not chunked:
            return Answer(body=body)
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[at : at + 7000] for at in range(0, len(body), 7000)))
        return Answer(
            raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
        )

    runtime.behave = behave
    client = await gateway.connect()
    for _ in range(2):
        reply = await client.infer()
        assert reply.json["model_name"] == "flights"
        assert reply.json["outputs"][0]["data"] == values
        assert ("content-length" in reply.headers) is not chunked
    assert runtime.connections == 1
    assert gateway.totals()["v1-g1"]["requests"] == 2


async def test_a_streamed_answer_that_breaks_off_closes_the_client(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(stream_above=1000))
    gateway.route()
    body = outputs("m-v1-g1", [0.5] * 5000)
    runtime.behave = lambda seen: Answer(
        raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:4000], close=True
    )
    client = await gateway.connect()
    client.send(request())
    whole = await client.rest()
    assert len(whole) < len(body)
    assert gateway.totals()["v1-g1"]["bad"]["error"] == 1


async def test_a_client_that_does_not_read_stops_the_stream_and_not_the_gateway(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(stream_above=1000))
    gateway.route()
    values = [0.5] * 2_000_000
    runtime.behave = lambda seen: Answer(body=outputs(seen.model, values))
    slow = await gateway.connect()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport reads too
    slow.send(request())
    connections = gateway.plane.connections
    await until(lambda: any(one._writing_paused_at for one in connections), "back-pressure")
    runtime.behave = lambda seen: Answer()
    assert (await (await gateway.connect()).infer()).status == 200
    slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await slow.reply()).json["outputs"][0]["data"] == values


async def test_models_and_readiness_are_asked_of_the_baseline(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=5_000)
    client = await gateway.connect()
    client.send(b"GET /v2/models/flights HTTP/1.1\r\nHost: g\r\nX-API-Key: %b\r\n\r\n" % KEY.encode())
    reply = await client.reply()
    assert reply.status == 200
    assert reply.json["name"] == "flights"
    client.send(b"GET /v2/models/flights/ready HTTP/1.1\r\nHost: g\r\nX-API-Key: %b\r\n\r\n" % KEY.encode())
    assert (await client.reply()).status == 200
    assert [seen.path for seen in runtime.seen] == ["/v2/models/m-v1-g1", "/v2/models/m-v1-g1/ready"]
    assert all(total["requests"] == 0 for total in gateway.totals().values())


async def test_health_and_server_metadata(gateway: Gateway) -> None:
    client = await gateway.connect()
    for path, status in (("/v2/health/live", 200), ("/v2/health/ready", 200)):
        client.send(f"GET {path} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        assert (await client.reply()).status == status
    gateway.plane.not_ready = lambda: "the tables are not read"
    client.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: g\r\n\r\n")
    reply = await client.reply()
    assert (reply.status, reply.json) == (503, {"error": "the tables are not read"})
    client.send(b"GET /v2 HTTP/1.1\r\nHost: g\r\nX-API-Key: %b\r\n\r\n" % KEY.encode())
    assert (await client.reply()).json["name"] == "headrace"
    client.send(b"GET /v2 HTTP/1.1\r\nHost: g\r\n\r\n")
    assert (await client.reply()).status == 401


DENIED = [
    "POST /v2/repository/index", "POST /v2/repository/models/m-v1-g1/load", "POST /v2/repository/models/m-v1-g1/unload",
    "GET /v2/systemsharedmemory/status", "POST /v2/systemsharedmemory/region/a/register", "POST /v2/cudasharedmemory/region/a/register",
    "GET /v2/logging", "POST /v2/logging", "GET /v2/trace/setting", "POST /v2/trace/setting", "POST /v2/models/flights/trace/setting",
    "GET /v2/models/stats", "GET /v2/models/flights/stats", "GET /v2/models/flights/config", "POST /v2/models/flights/versions/1/infer",
    "GET /v2/models/flights/versions/1", "GET /v2/models/flights/versions/1/ready", "POST /v2/models/flights/generate",
    "POST /v2/models/flights/generate_stream", "POST /v2/models/flights/infer/", "POST /v2/models/flights//infer",
    "POST /v2/models/./flights/infer", "POST /v2/models/x/../flights/infer", "POST /v2/models/%66lights/infer",
    "POST /v2/models/m-v1-g1/infer", "GET /v2/models/m-v1-g1", "GET /v2/", "POST /v2//models/flights/infer", "GET /v2?x=/v2/logging/",
    "GET /v2/health", "GET /v2/health/started",
]  # fmt: skip


@pytest.mark.parametrize("line", DENIED)
async def test_everything_not_on_the_list_is_denied(gateway: Gateway, runtime: Runtime, line: str) -> None:
    client = await gateway.connect()
    client.send(f"{line} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {ADMIN}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    reply = await client.reply()
    if line.startswith("GET /v2?"):
        assert reply.json == {"name": "headrace", "version": "0.1.0", "extensions": []}
    else:
        assert reply.status == 404
        assert set(reply.json) == {"error"}
    assert runtime.seen == []
    assert (await client.infer()).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v2/models/flights/infer", "POST"), ("POST", "/v2/models/flights", "GET"), ("DELETE", "/v2/health/live", "GET")],
)
async def test_other_methods_are_refused(gateway: Gateway, method: str, path: str, allowed: str) -> None:
    client = await gateway.connect()
    client.send(f"{method} {path} HTTP/1.1\r\nHost: g\r\nX-API-Key: {KEY}\r\n\r\n".encode())
    reply = await client.reply()
    assert (reply.status, reply.headers["allow"]) == (405, allowed)


async def test_a_query_and_the_absolute_form_name_the_same_path(gateway: Gateway) -> None:
    client = await gateway.connect()
    for target in ("/v2/models/flights/infer?a=b", "http://gateway/v2/models/flights/infer"):
        client.send(request().replace(b"/v2/models/flights/infer", target.encode()))
        assert (await client.reply()).status == 200


@pytest.mark.parametrize(
    "lines",
    [
        "", "Authorization: Bearer hr_0123456789abcdef_wrong", f"Authorization: Basic {KEY}", "Authorization: Bearer",
        "Authorization: Bearer sk-other", "X-API-Key: ", "X-API-Key: nonsense",
    ],
)  # fmt: skip
async def test_without_a_valid_key_nothing_is_answered(gateway: Gateway, runtime: Runtime, lines: str) -> None:
    client = await gateway.connect()
    body = infer_body()
    head = f"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\nContent-Length: {len(body)}\r\n"
    client.send((head + (lines + "\r\n" if lines else "") + "\r\n").encode() + body)
    reply = await client.reply()
    assert reply.status == 401
    assert set(reply.json) == {"error"}
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert runtime.seen == []
    # An endpoint that does not exist looks the same.
    client.send(request(endpoint="nothing", key=""))
    assert (await client.reply()).status == 401


async def test_both_ways_to_carry_a_key(gateway: Gateway) -> None:
    client = await gateway.connect()
    assert (await client.infer(key="", x_api_key=KEY)).status == 200
    assert (await client.infer(key="", authorization=f"bearer {KEY}")).status == 200
    assert (await client.infer(key="", authorization="Basic eDp5", x_api_key=KEY)).status == 200
    assert (await client.infer(key=KEY)).status == 200


async def test_a_key_without_the_right_is_forbidden_and_an_unknown_endpoint_not_found(gateway: Gateway) -> None:
    gateway.route(endpoint="secret")
    client = await gateway.connect()
    assert (await client.infer(endpoint="secret")).status == 403
    assert (await client.infer(endpoint="nothing")).status == 404


async def test_a_request_that_the_runtime_refuses_is_the_callers_fault(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    runtime.behave = lambda seen: Answer(400, b'{"error":"unexpected shape for input x for model m-v1-g1"}')
    reply = await client.infer()
    assert (reply.status, reply.json) == (400, {"error": "unexpected shape for input x for model flights"})
    total = gateway.totals()["v1-g1"]
    assert (total["requests"], total["errors"]) == (0, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{not json", "not JSON"), (b"[1]", "not a JSON object"), (b"{}", "inputs"), (b"", "not JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[null]}]}', "not FP32"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1]}]}', "1 elements"),
        (b'{"inputs":[{"name":"x","datatype":"FLOAT","shape":[1],"data":[1]}]}', "datatype"),
        (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":[1]}]}', "BYTES"),
        (infer_body(parameters={"priority": -1}), "priority"),
    ],
)  # fmt: skip
async def test_a_500_for_a_malformed_request_becomes_a_400(gateway: Gateway, runtime: Runtime, body: bytes, says: str) -> None:
    runtime.behave = lambda seen: Answer(500, b'{"error":"failed to parse the request JSON buffer"}')
    client = await gateway.connect()
    reply = await client.infer(body)
    assert reply.status == 400
    assert says in reply.json["error"]
    total = gateway.totals()["v1-g1"]
    assert (total["requests"], total["errors"]) == (0, 0)


async def test_shared_memory_that_the_runtime_does_not_find_is_the_callers_fault(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(404, b'{"error":"Unable to find shared memory region: \'r\'"}')
    output = {"name": "p", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}
    reply = await (await gateway.connect()).infer(infer_body(outputs=[output]))
    assert (reply.status, reply.json) == (400, {"error": "shared memory is not spoken here"})
    assert (gateway.totals()["v1-g1"]["requests"], len(runtime.seen)) == (0, 1)


async def test_a_500_for_a_good_request_is_the_arms(gateway: Gateway, runtime: Runtime) -> None:
    runtime.behave = lambda seen: Answer(500, b'{"error":"m-v1-g1 is broken"}')
    reply = await (await gateway.connect()).infer()
    assert (reply.status, reply.json) == (500, {"error": "flights is broken"})
    total = gateway.totals()["v1-g1"]
    assert (total["requests"], total["errors"], total["bad"]["error"]) == (1, 1, 1)


async def test_bodies_beyond_the_limit_are_refused_by_their_length_and_by_their_bytes(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(max_body_bytes=1000))
    gateway.route()
    client = await gateway.connect()
    client.send(request(b"x" * 1001))
    reply = await client.reply()
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert set(reply.json) == {"error"}
    assert await client.rest() == b""
    client = await gateway.connect()
    head = f"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(head.encode() + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n")
    assert (await client.reply()).status == 413
    assert await client.rest() == b""
    assert runtime.seen == []
    client = await gateway.connect()
    assert (await client.infer(b"[" + b" " * 998 + b"]")).status == 200


async def test_json_that_could_overflow_a_runtimes_stack_does_not_reach_it(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    reply = await client.infer(b"[" * 100_000)
    assert (reply.status, reply.json) == (400, {"error": "the body is nested more than 64 deep"})
    assert (runtime.seen, gateway.totals()["v1-g1"]["requests"]) == ([], 0)
    binary = infer_body(1.0)
    assert (await client.infer(binary + b"[" * 100_000, inference_header_content_length=str(len(binary)))).status == 200
    flat = infer_body(1.0)[:-1] + b',"parameters":{"rows":[' + b",".join([b"[[1]]"] * 5000) + b"]}}"
    assert (await client.infer(flat)).status == 200


async def test_chunked_bodies_reach_the_runtime_whole(gateway: Gateway, runtime: Runtime) -> None:
    client = await gateway.connect()
    body = infer_body(7.0)
    head = (
        f"POST /v2/models/flights/infer HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:10], body[10:11], body[11:]))
    client.send(head + pieces + b"0\r\nX-Trailer: 1\r\n\r\n")
    assert (await client.reply()).status == 200
    assert runtime.seen[0].body == body


async def test_compressed_bodies_are_refused(gateway: Gateway) -> None:
    assert (await (await gateway.connect()).infer(content_encoding="gzip")).status == 415


async def test_binary_tensors_pass_with_their_length_adjusted(gateway: Gateway, runtime: Runtime) -> None:
    head = json.dumps(
        {"model_name": "m-v1-g1", "outputs": [{"name": "p", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}]}
    )
    runtime.behave = lambda seen: Answer(
        body=head.encode() + b"\x00\x00\x80?",
        content_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    client = await gateway.connect()
    reply = await client.infer(b'{"inputs":[]}\x01\x02', inference_header_content_length="13")
    length = int(reply.headers["inference-header-content-length"])
    assert json.loads(reply.body[:length])["model_name"] == "flights"
    assert reply.body[length:] == b"\x00\x00\x80?"
    assert reply.headers["content-type"] == "application/octet-stream"
    assert runtime.seen[0].headers["inference-header-content-length"] == "13"
    assert runtime.seen[0].body == b'{"inputs":[]}\x01\x02'
    assert (await client.infer(inference_header_content_length="-1")).status == 400


async def test_what_is_not_v2_goes_to_the_control_application(gateway: Gateway) -> None:
    client = await gateway.connect()
    client.send(b"POST /api/v1/runs?page=2 HTTP/1.1\r\nHost: g\r\nX-Thing: 1\r\nContent-Length: 5\r\n\r\nhello")
    reply = await client.reply()
    assert reply.json == {"path": "/api/v1/runs", "query": "page=2", "headers": ["host", "x-thing", "content-length"], "size": 5}
    assert (await client.infer()).status == 200
    client.send(b"GET /v2x HTTP/1.1\r\nHost: g\r\n\r\n")
    assert (await client.reply()).json["path"] == "/v2x"


async def test_a_deleted_endpoint_is_gone_and_comes_back(gateway: Gateway) -> None:
    from dataclasses import replace

    client = await gateway.connect()
    spec = gateway.route()
    gateway.revision += 1
    assert gateway.plane.routes.apply(replace(spec, revision=gateway.revision, deleted=True, arms=()), time.monotonic())
    assert (await client.infer()).status == 404
    gateway.route()
    assert (await client.infer()).status == 200
