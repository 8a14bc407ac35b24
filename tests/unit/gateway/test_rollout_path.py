"""A route in rollout, seen from the data path: who is given which arm, what happens when it fails, what is copied and what is counted."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from gateway.arms import ArmLimits
from gateway.plane import Limits
from gateway.routes import UNJUDGED_AFTER_S, WHOLE, Assign, GuardKind, GuardSpec, ShadowSpec
from gateway.shadow import ShadowLimits
from gateway.tracing import Spans
from gateway.windows import WindowBook
from opentelemetry.sdk.trace import ReadableSpan

from tests.unit.gateway.conftest import ADMIN, Answer, Gateway, MakeGateway, Runtime, infer_body, outputs, request, until

FRONTEND = "hr_00112233445566aa_" + "f" * 32
SHADOW = ShadowSpec("v3-g1", WHOLE, 0.2, 5.0)


def canary_only(answer: Answer) -> Any:
    return lambda seen: answer if seen.model == "m-v2-g1" else Answer()


# Assignment


async def test_weights_are_shares_of_requests(gateway: Gateway) -> None:
    random.seed(7)
    gateway.route(canary=2_500)
    client = await gateway.connect()
    arms = Counter([(await client.infer()).headers["x-headrace-arm"] for _ in range(2_000)])
    assert arms.total() == 2_000
    assert 400 < arms["v2-g1"] < 600
    versions = {(await client.infer()).headers["x-headrace-model-version"] for _ in range(100)}
    assert versions == {"1", "2"}


async def test_a_caller_keeps_its_arm_and_a_key_refines_it(gateway: Gateway) -> None:
    gateway.route(canary=5_000, assign=Assign.CALLER)
    client = await gateway.connect()
    assert len({(await client.infer()).headers["x-headrace-arm"] for _ in range(30)}) == 1
    by_key = {}
    for user in range(60):
        arms = {(await client.infer(x_headrace_key=f"user-{user}")).headers["x-headrace-arm"] for _ in range(3)}
        assert len(arms) == 1
        by_key[user] = arms.pop()
    assert set(by_key.values()) == {"v1-g1", "v2-g1"}
    # The names are honoured for the arm only: what counts is the one caller that the key itself is.
    assert sum(total["requests"] for total in gateway.totals().values()) == 1


async def test_names_of_callers_count_when_the_key_was_granted_that(gateway: Gateway) -> None:
    gateway.grant(FRONTEND, "shop", frozenset({"frontend"}))
    gateway.route(canary=5_000, assign=Assign.CALLER)
    client = await gateway.connect()
    for user in range(60):
        assert (await client.infer(key=FRONTEND, x_headrace_key=f"user-{user % 30}")).status == 200
    assert (await client.infer(key=FRONTEND, x_headrace_arm="v2-g1")).status == 403
    assert sum(total["requests"] for total in gateway.totals().values()) == 30


async def test_an_operator_may_choose_the_arm_and_is_not_counted(gateway: Gateway) -> None:
    gateway.route(canary=1)
    client = await gateway.connect()
    for choice, arm in (("v2-g1", "v2-g1"), ("canary", "v2-g1"), ("baseline", "v1-g1")):
        reply = await client.infer(key=ADMIN, x_headrace_arm=choice)
        assert (reply.status, reply.headers["x-headrace-arm"]) == (200, arm)
    assert (await client.infer(key=ADMIN, x_headrace_arm="v9")).status == 400
    assert (await client.infer(x_headrace_arm="canary")).status == 403
    assert all(total["requests"] == 0 for total in gateway.totals().values())


# Fallback


FAILURES = {
    "500": Answer(500, b'{"error":"broken"}'),
    "503": Answer(503, b'{"error":"busy"}'),
    "reset": Answer(raw=b"", close=True),
    "half an answer": Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", close=True),
    "not http": Answer(raw=b"nonsense\r\n\r\n", close=True),
    "time-out": Answer(hang=True),
    "unknown model": Answer(400, b'{"error":"Request for unknown model: \'m-v2-g1\' is not found"}'),
    "not found": Answer(404, b'{"error":"no"}'),
    "misconfigured": Answer(403, b"{}"),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_the_baseline_answers_for_a_canary_that_fails(gateway: Gateway, runtime: Runtime, failure: str) -> None:
    gateway.route(canary=WHOLE - 1, timeout_s=0.3)
    runtime.behave = canary_only(FAILURES[failure])
    client = await gateway.connect()
    for number in range(1, 3):
        reply = await client.infer(infer_body(float(number)))
        assert reply.status == 200
        assert reply.headers["x-headrace-fallback"] == "v2-g1"
        assert (reply.headers["x-headrace-arm"], reply.headers["x-headrace-model-version"]) == ("v1-g1", "1")
        assert runtime.requests("m-v1-g1")[-1].body == infer_body(float(number))
    totals = gateway.totals()
    assert (totals["v2-g1"]["requests"], totals["v2-g1"]["bad"]["error"], totals["v2-g1"]["fallbacks"]) == (2, 2, 2)
    assert totals["v1-g1"]["requests"] == 0


async def test_the_bytes_of_tensors_do_not_hide_a_failing_canary(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=WHOLE - 1)
    runtime.behave = canary_only(Answer(500, b'{"error":"broken"}'))
    client = await gateway.connect()
    for head in (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}', b""):
        reply = await client.infer(head + b"\x00\x00\x80?", inference_header_content_length=str(len(head)))
        assert (reply.status, reply.headers["x-headrace-fallback"]) == (200, "v2-g1")
    assert gateway.totals()["v2-g1"]["bad"]["error"] == 2


async def test_a_canary_that_cannot_be_reached_is_answered_by_the_baseline(gateway: Gateway, runtime: Runtime) -> None:
    nowhere = Runtime()
    await nowhere.start()
    await nowhere.stop()
    spec = gateway.route(canary=WHOLE - 1)
    gateway.plane.routes._upstreams |= {nowhere.address}
    arms = (spec.arms[0], replace(spec.arms[1], upstream=nowhere.address))
    assert gateway.plane.routes.apply(replace(spec, revision=100, arms=arms), time.monotonic())
    reply = await (await gateway.connect()).infer()
    assert (reply.status, reply.headers["x-headrace-fallback"]) == (200, "v2-g1")


async def test_when_both_fail_the_caller_gets_the_failure_and_the_canary_is_counted(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=WHOLE - 1)
    runtime.behave = lambda seen: Answer(500, b'{"error":"broken"}')
    reply = await (await gateway.connect()).infer()
    assert (reply.status, reply.json) == (500, {"error": "broken"})
    totals = gateway.totals()
    assert (totals["v2-g1"]["bad"]["error"], totals["v2-g1"]["fallbacks"], totals["v1-g1"]["requests"]) == (1, 0, 0)


async def test_a_baseline_that_fails_is_not_answered_by_the_canary_unless_its_model_is_gone(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=1)
    runtime.behave = lambda seen: Answer(500, b'{"error":"broken"}') if seen.model == "m-v1-g1" else Answer()
    client = await gateway.connect()
    assert (await client.infer()).status == 500
    runtime.behave = lambda seen: FAILURES["unknown model"] if seen.model == "m-v1-g1" else Answer()
    reply = await client.infer()
    assert (reply.status, reply.headers["x-headrace-arm"], reply.headers["x-headrace-fallback"]) == (200, "v2-g1", "v1-g1")


async def test_a_request_that_is_itself_at_fault_is_not_held_against_the_canary(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=WHOLE - 1)
    client = await gateway.connect()
    runtime.behave = lambda seen: Answer(400, b'{"error":"wrong shape"}')
    reply = await client.infer()
    assert (reply.status, "x-headrace-fallback" in reply.headers) == (400, False)
    runtime.behave = canary_only(Answer(500, b'{"error":"parse"}'))
    assert (await client.infer(b"{broken")).status == 400
    total = gateway.totals()["v2-g1"]
    assert (total["requests"], total["errors"], total["fallbacks"], total["bad"]["error"]) == (0, 0, 0, 0)


async def test_a_canary_that_refuses_what_the_baseline_accepts_is_itself_at_fault(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=WHOLE - 1)
    client = await gateway.connect()
    runtime.behave = canary_only(Answer(400, b'{"error":"expected 3 inputs but got 2"}'))
    reply = await client.infer()
    assert (reply.status, reply.headers["x-headrace-fallback"], reply.headers["x-headrace-arm"]) == (200, "v2-g1", "v1-g1")
    # When both blame it, it is the request, and the baseline's word is what the caller gets.
    runtime.behave = lambda seen: Answer(400, b'{"error":"no such input at ' + seen.model.encode() + b'"}')
    reply = await client.infer()
    assert (reply.status, reply.json, "x-headrace-fallback" in reply.headers) == (400, {"error": "no such input at flights"}, False)
    # When the baseline cannot say, nobody knows.
    runtime.behave = lambda seen: Answer(400, b"{}") if seen.model == "m-v2-g1" else Answer(500, b"{}")
    assert (await client.infer()).status == 500
    total = gateway.totals()["v2-g1"]
    assert (total["requests"], total["bad"]["error"], total["fallbacks"]) == (1, 1, 1)


async def test_the_breaker_spares_an_arm_that_never_answers_and_lets_it_come_back(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(arm=ArmLimits(breaker_failures=3, breaker_open_s=0.2)))
    gateway.route(canary=WHOLE - 1)
    runtime.behave = canary_only(Answer(raw=b"", close=True))
    client = await gateway.connect()
    for _ in range(10):
        assert (await client.infer()).status == 200
    attempts = len(runtime.requests("m-v2-g1"))
    assert attempts < 10
    runtime.behave = lambda seen: Answer()

    async def recovered() -> bool:
        return (await client.infer()).headers["x-headrace-arm"] == "v2-g1"

    end = time.monotonic() + 5
    while not await recovered():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    totals = gateway.totals()
    assert totals["v2-g1"]["bad"]["error"] == totals["v2-g1"]["fallbacks"] >= 10


async def test_a_500_does_not_open_the_breaker(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(arm=ArmLimits(breaker_failures=3)))
    gateway.route(canary=WHOLE - 1)
    runtime.behave = canary_only(Answer(500, b"{}"))
    client = await gateway.connect()
    for _ in range(10):
        await client.infer()
    assert len(runtime.requests("m-v2-g1")) == 10


async def test_more_in_flight_than_allowed_is_refused_and_answered_elsewhere(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(arm=ArmLimits(in_flight=2)))
    gateway.route(canary=WHOLE - 1)
    runtime.behave = canary_only(Answer(hang=True))
    clients = [await gateway.connect() for _ in range(3)]
    for client in clients[:2]:
        client.send(request())
    await until(lambda: len(runtime.seen) == 2)
    assert (await clients[2].infer()).headers["x-headrace-fallback"] == "v2-g1"
    gateway.route()
    runtime.behave = lambda seen: Answer(hang=True)
    others = [await gateway.connect() for _ in range(3)]
    for client in others[:2]:
        client.send(request())
    await until(lambda: len(runtime.seen) == 5)
    reply = await others[2].infer()
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    runtime.release.set()
    for client in (*clients[:2], *others[:2]):
        assert (await client.reply()).status == 200


# Counting


async def test_the_windows_sum_to_what_the_clients_sent(gateway: Gateway, runtime: Runtime) -> None:
    random.seed(11)
    gateway.route(canary=3_000)
    # Every seventh row fails on the canary, every eleventh is malformed.
    runtime.behave = lambda seen: (
        Answer(500, b"{}") if seen.model == "m-v2-g1" and json.loads(seen.body)["inputs"][0]["data"][0] % 7 == 0 else Answer()
    )
    book = gateway.plane.windows
    reports = []
    stop = asyncio.Event()

    async def collect() -> None:
        while not stop.is_set():
            reports.extend(book.tick(time.monotonic()))
            await asyncio.sleep(0.005)

    told: Counter[str] = Counter()

    async def call(first: int) -> None:
        client = await gateway.connect()
        for number in range(first, first + 100):
            reply = await client.infer(infer_body(float(number)) if number % 11 else b"{}")
            if reply.status == 200:
                fallback = reply.headers.get("x-headrace-fallback")
                told[fallback or reply.headers["x-headrace-arm"]] += 1
                told["bad"] += fallback is not None
        client.close()

    runtime_behave = runtime.behave
    runtime.behave = lambda seen: Answer(400, b'{"error":"no"}') if seen.body == b"{}" else runtime_behave(seen)
    collector = asyncio.create_task(collect())
    await asyncio.gather(*(call(1_000 * worker) for worker in range(8)))
    stop.set()
    await collector
    reports.extend(book.finish(time.monotonic()))
    arms = [arm for report in reports for endpoint in report.endpoints for arm in endpoint.arms]
    assert {name: sum(arm.requests for arm in arms if arm.arm == name) for name in ("v1-g1", "v2-g1")} == {
        "v1-g1": told["v1-g1"],
        "v2-g1": told["v2-g1"],
    }
    assert sum(arm.bad["error"] for arm in arms) == sum(arm.fallbacks for arm in arms) == told["bad"] > 0
    assert sum(sum(arm.buckets) for arm in arms) == told["v1-g1"] + told["v2-g1"]
    assert all(0 <= count <= arm.requests for arm in arms for count in arm.bad.values())


async def test_a_hanging_arm_is_seen_when_the_limit_passes_and_not_when_it_times_out(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(canary=WHOLE - 1, timeout_s=30)
    gateway.plane.windows = WindowBook()
    gateway.route(canary=WHOLE - 1, timeout_s=30)
    runtime.behave = canary_only(Answer(hang=True))
    clients = [await gateway.connect() for _ in range(3)]
    for client in clients:
        client.send(request())
    await until(lambda: len(runtime.seen) == 3)
    now = time.monotonic()
    book = gateway.plane.windows
    early = [arm for report in book.tick(now + 0.25) for entry in report.endpoints for arm in entry.arms]
    assert sum(arm.requests for arm in early) == 0
    late = [arm for report in book.tick(now + 0.31) for entry in report.endpoints for arm in entry.arms if arm.arm == "v2-g1"]
    assert (sum(arm.requests for arm in late), sum(arm.bad["latency_ms>50"] for arm in late)) == (3, 3)
    runtime.release.set()
    for client in clients:
        assert (await client.reply()).status == 200


async def test_a_client_that_leaves_is_neutral_before_the_limit_and_bad_after(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(guards=(GuardSpec("slow", GuardKind.LATENCY, 0.05), GuardSpec("slower", GuardKind.LATENCY, 3600.0)))
    runtime.behave = lambda seen: Answer(hang=True)
    quick, patient = await gateway.connect(), await gateway.connect()
    patient.send(request())
    await until(lambda: len(runtime.seen) == 1)
    arrived = time.monotonic()
    await until(lambda: time.monotonic() > arrived + 0.06)
    quick.send(request())
    await until(lambda: len(runtime.seen) == 2)
    quick.close()
    patient.close()
    await until(lambda: runtime.dropped == 2)
    await until(lambda: not gateway.plane.connections)
    total = gateway.totals()["v1-g1"]
    assert total["bad"]["slow"] >= 1
    assert total["bad"]["slower"] == 0
    assert total["requests"] == total["bad"]["slow"]


# Nobody judges


async def test_the_canarys_share_is_taken_back_when_nobody_publishes_and_given_again_when_somebody_does(gateway: Gateway) -> None:
    spec = gateway.route(canary=WHOLE - 1)
    routes = gateway.plane.routes
    client = await gateway.connect()
    now = time.monotonic()
    routes.expire(now + UNJUDGED_AFTER_S - 1)
    assert (await client.infer()).headers["x-headrace-arm"] == "v2-g1"
    assert not routes.apply(replace(spec, publication=spec.publication + 1), now + 20)
    routes.expire(now + 20 + UNJUDGED_AFTER_S - 1)
    assert (await client.infer()).headers["x-headrace-arm"] == "v2-g1"
    # The same publication heard again is no sign of life.
    routes.apply(replace(spec, publication=spec.publication + 1), now + 45)
    routes.expire(now + 20 + UNJUDGED_AFTER_S + 1)
    assert {(await client.infer()).headers["x-headrace-arm"] for _ in range(20)} == {"v1-g1"}
    flags = [entry.unjudged for report in gateway.plane.windows.tick(time.monotonic(), membership=True) for entry in report.endpoints]
    assert flags[-1] is True
    assert not routes.apply(replace(spec, publication=spec.publication + 2), now + 60)
    assert (await client.infer()).headers["x-headrace-arm"] == "v2-g1"
    flags = [entry.unjudged for report in gateway.plane.windows.tick(time.monotonic(), membership=True) for entry in report.endpoints]
    assert flags[-1] is False


async def test_a_route_outside_a_rollout_needs_nobody(gateway: Gateway) -> None:
    gateway.route(canary=WHOLE - 1, in_rollout=False)
    gateway.plane.routes.expire(time.monotonic() + 10 * UNJUDGED_AFTER_S)
    assert (await (await gateway.connect()).infer()).headers["x-headrace-arm"] == "v2-g1"


# Shadow


async def test_copies_are_compared_by_their_tensors(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(shadow=SHADOW)
    runtime.behave = lambda seen: Answer(
        body=outputs(seen.model, [0.5 if seen.model == "m-v1-g1" else json.loads(seen.body)["inputs"][0]["data"][0]])
    )
    client = await gateway.connect()
    for value in (0.5, 0.65, 0.69, 0.8, 0.1):
        reply = await client.infer(infer_body(value))
        assert reply.json["outputs"][0]["data"] == [0.5]
    counts = gateway.plane.routes.endpoints["flights"].route.arms["v3-g1"].counts  # type: ignore[union-attr]
    await until(lambda: counts.shadow_compared == 5)
    assert [seen.body for seen in runtime.requests("m-v3-g1")] == [seen.body for seen in runtime.requests("m-v1-g1")]
    totals = gateway.totals()
    assert (totals["v3-g1"]["shadow_sent"], totals["v3-g1"]["shadow_different"]) == (5, 2)
    assert (totals["v3-g1"]["requests"], totals["v3-g1"]["bad"]) == (0, {})
    assert totals["v1-g1"]["requests"] == 5


async def test_a_copy_that_hangs_or_fails_touches_no_caller(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(shadow=ShadowLimits(in_flight=2, waiting=3)))
    gateway.route(shadow=replace(SHADOW, deadline_s=600))
    runtime.behave = lambda seen: (
        Answer(hang=True) if seen.model == "m-v3-g1" else Answer(body=outputs(seen.model, [float(len(runtime.seen))]))
    )
    client = await gateway.connect()
    answers = [(await client.infer()).json["outputs"][0]["data"][0] for _ in range(30)]
    assert answers == sorted(answers)
    assert len(answers) == 30
    # Two hang, at most three wait (fewer on a machine so busy that the gateway drops copies), the rest was dropped: nobody waited
    # for any of them.
    await until(lambda: len(runtime.requests("m-v3-g1")) == 2)
    totals = gateway.totals()["v3-g1"]
    assert totals["shadow_sent"] == 2
    assert 25 <= totals["shadow_shed"] <= 28
    runtime.release.set()


async def test_copies_have_a_deadline_of_their_own(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(shadow=replace(SHADOW, deadline_s=0.05))
    runtime.behave = lambda seen: Answer(hang=True) if seen.model == "m-v3-g1" else Answer()
    client = await gateway.connect()
    assert (await client.infer()).status == 200
    counts = gateway.plane.routes.endpoints["flights"].route.arms["v3-g1"].counts  # type: ignore[union-attr]
    await until(lambda: counts.shadow_errors == 1)
    assert (await client.infer()).status == 200


async def test_a_shadow_that_answers_with_an_error_is_counted(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(shadow=SHADOW)
    runtime.behave = lambda seen: Answer(500, b"{}") if seen.model == "m-v3-g1" else Answer()
    await (await gateway.connect()).infer()
    counts = gateway.plane.routes.endpoints["flights"].route.arms["v3-g1"].counts  # type: ignore[union-attr]
    await until(lambda: counts.shadow_errors == 1)
    assert counts.shadow_compared == 0


async def test_a_rule_says_which_requests_are_copied(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(shadow=replace(SHADOW, only_input="carrier", only_values=frozenset({"UA", "AA"})))
    client = await gateway.connect()

    def body(*carriers: str) -> bytes:
        return json.dumps(
            {"inputs": [{"name": "carrier", "datatype": "BYTES", "shape": [len(carriers), 1], "data": [[one] for one in carriers]}]}
        ).encode()

    for carriers in (["UA"], ["B6"], ["AA", "B6"], ["B6", "AA"]):
        await client.infer(body(*carriers))
    await client.infer(infer_body())
    counts = gateway.plane.routes.endpoints["flights"].route.arms["v3-g1"].counts  # type: ignore[union-attr]
    await until(lambda: counts.shadow_compared == 2)
    assert [seen.body for seen in runtime.requests("m-v3-g1")] == [body("UA"), body("AA", "B6")]
    assert counts.shadow_shed == 0


async def test_failed_and_refused_requests_are_not_copied(gateway: Gateway, runtime: Runtime) -> None:
    gateway.route(shadow=SHADOW)
    client = await gateway.connect()
    runtime.behave = lambda seen: Answer(400, b"{}")
    await client.infer()
    runtime.behave = lambda seen: Answer(500, b"{}")
    await client.infer()
    await client.infer(key="")
    runtime.behave = lambda seen: Answer()
    await client.infer(key=ADMIN, x_headrace_arm="baseline")
    await client.infer()
    await until(lambda: runtime.requests("m-v3-g1"))
    assert len(runtime.requests("m-v3-g1")) == 1


async def test_copies_are_dropped_first_when_the_gateway_is_busy(make_gateway: MakeGateway, runtime: Runtime) -> None:
    gateway = await make_gateway(Limits(shadow=ShadowLimits(busy_above=2)))
    gateway.route(shadow=SHADOW)
    runtime.behave = lambda seen: Answer(hang=seen.body != infer_body(9.0))
    waiting = [await gateway.connect() for _ in range(3)]
    for client in waiting:
        client.send(request())
    await until(lambda: len(runtime.seen) == 3)
    assert (await (await gateway.connect()).infer(infer_body(9.0))).status == 200
    assert gateway.totals()["v3-g1"]["shadow_shed"] == 1
    runtime.release.set()


# Spans


@pytest.fixture
def spans() -> list[ReadableSpan]:
    return []


async def test_a_sampled_request_leaves_a_span_and_its_copy_one_below(
    make_gateway: MakeGateway, runtime: Runtime, spans: list[ReadableSpan]
) -> None:
    gateway = await make_gateway(spans=Spans(spans.append), sample_ratio=1.0)
    gateway.route(shadow=SHADOW)
    reply = await (await gateway.connect()).infer(infer_body(123.456))
    await until(lambda: len(spans) == 2)
    server, copy = spans
    assert server.name == "POST /v2/models/{endpoint}/infer"
    attributes = dict(server.attributes or {})
    assert attributes["headrace.request_id"] == reply.headers["x-request-id"]
    assert (attributes["headrace.endpoint"], attributes["headrace.arm"], attributes["headrace.model_version"]) == ("flights", "v1-g1", 1)
    assert attributes["http.response.status_code"] == 200
    assert reply.headers["traceparent"].endswith("-01")
    assert f"{server.context.trace_id:032x}" == reply.headers["traceparent"].split("-")[1] == reply.headers["x-request-id"].replace("-", "")
    assert f"{server.context.span_id:016x}" == runtime.seen[0].headers["traceparent"].split("-")[2]
    assert copy.parent is not None
    assert copy.parent.span_id == server.context.span_id
    assert f"{copy.context.span_id:016x}" == runtime.requests("m-v3-g1")[0].headers["traceparent"].split("-")[2]
    assert server.end_time is not None
    assert server.start_time is not None
    assert server.end_time >= server.start_time
    assert "123.456" not in json.dumps([dict(span.attributes or {}) for span in spans], default=str)


async def test_unsampled_requests_leave_none_but_errors_always_do(
    make_gateway: MakeGateway, runtime: Runtime, spans: list[ReadableSpan]
) -> None:
    gateway = await make_gateway(spans=Spans(spans.append), sample_ratio=0.0)
    gateway.route(canary=WHOLE - 1)
    client = await gateway.connect()
    await client.infer()
    await client.infer(key="")
    assert spans == []
    runtime.behave = canary_only(Answer(500, b"{}"))
    reply = await client.infer()
    (span,) = spans
    assert span.context.trace_flags.sampled
    assert dict(span.attributes or {})["headrace.fallback"] is True
    assert f"{span.context.span_id:016x}" == reply.headers["traceparent"].split("-")[2]
    sampled = await client.infer(traceparent="00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01")
    assert sampled.headers["traceparent"].endswith("-01")
    assert len(spans) == 2
    assert spans[1].parent is not None
    assert f"{spans[1].parent.span_id:016x}" == "00f067aa0ba902b7"
