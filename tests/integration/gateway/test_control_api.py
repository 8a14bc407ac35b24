"""/api/v1 over real gRPC to small fake services: who gets in, how errors are told, and what a journey looks like."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from contracts.deployer.v1 import service_pb2 as deployer_pb
from contracts.deployer.v1 import service_pb2_grpc as deployer_grpc
from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from contracts.evaluator.v1 import service_pb2_grpc as evaluator_grpc
from contracts.eventing.v1 import service_pb2 as eventing_pb
from contracts.eventing.v1 import service_pb2_grpc as eventing_grpc
from contracts.registry.v1 import service_pb2 as registry_pb
from contracts.registry.v1 import service_pb2_grpc as registry_grpc
from contracts.tracker.v1 import service_pb2 as tracker_pb
from contracts.tracker.v1 import service_pb2_grpc as tracker_grpc
from contracts.trainer.v1 import service_pb2 as trainer_pb
from contracts.trainer.v1 import service_pb2_grpc as trainer_grpc
from gateway.control.app import create_app
from gateway.control.peers import connect
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from pydantic import SecretStr
from servicekit import rpc, telemetry
from servicekit.access import Caller, Rule, current_caller, new_service_token
from servicekit.errors import AlreadyExists, NotFound, Unauthenticated, Unavailable
from servicekit.settings import ServiceSettings

TOKEN, TOKEN_HASH = new_service_token("gateway")
ALICE = Caller(service="gateway", subject="alice", roles=frozenset({"editor"}))


class Tracker(tracker_grpc.TrackerServiceServicer):
    """Knows one experiment, once it has been made, and remembers who asked."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.experiments: dict[str, int] = {}
        self.races = 0

    async def GetExperiment(self, request: tracker_pb.GetExperimentRequest, context: object) -> tracker_pb.GetExperimentResponse:
        if request.name not in self.experiments:
            raise NotFound(f"there is no experiment {request.name}")
        return tracker_pb.GetExperimentResponse(experiment=tracker_pb.Experiment(id=self.experiments[request.name], name=request.name))

    async def CreateExperiment(self, request: tracker_pb.CreateExperimentRequest, context: object) -> tracker_pb.CreateExperimentResponse:
        self.experiments[request.name] = 7
        if self.races:
            self.races -= 1
            raise AlreadyExists("somebody else was faster")
        return tracker_pb.CreateExperimentResponse(experiment=tracker_pb.Experiment(id=7, name=request.name))

    async def CreateRun(self, request: tracker_pb.CreateRunRequest, context: object) -> tracker_pb.CreateRunResponse:
        self.callers.append(current_caller())
        return tracker_pb.CreateRunResponse(run=tracker_pb.Run(run_id="a" * 32, experiment_id=request.experiment_id, user=request.user))

    async def GetRun(self, request: tracker_pb.GetRunRequest, context: object) -> tracker_pb.GetRunResponse:
        if request.run_id == "down":
            raise Unavailable("PostgreSQL does not answer")
        if request.run_id == "bug":
            raise ZeroDivisionError("a secret of the inside")
        return tracker_pb.GetRunResponse(run=tracker_pb.Run(run_id=request.run_id, status="RUNNING"))


class Trainer(trainer_grpc.TrainerServiceServicer):
    async def GetTraining(self, request: trainer_pb.GetTrainingRequest, context: object) -> trainer_pb.GetTrainingResponse:
        if request.training_id != "t1":
            raise NotFound(f"there is no training {request.training_id}")
        return trainer_pb.GetTrainingResponse(training=trainer_pb.Training(training_id="t1"))

    async def StreamLog(self, request: trainer_pb.StreamLogRequest, context: object) -> AsyncIterator[trainer_pb.StreamLogResponse]:
        for offset, data in ((0, b"first\n"), (6, b"second\n")):
            if offset >= request.offset:
                yield trainer_pb.StreamLogResponse(offset=offset, data=data)


class Evaluator(evaluator_grpc.EvaluatorServiceServicer):
    def __init__(self) -> None:
        self.evaluations: list[evaluator_pb.Evaluation] = []

    async def ListEvaluations(self, request: evaluator_pb.ListEvaluationsRequest, context: object) -> evaluator_pb.ListEvaluationsResponse:
        wanted = [e for e in self.evaluations if not request.run_id or e.judgement.journey.run_id == request.run_id]
        return evaluator_pb.ListEvaluationsResponse(evaluations=wanted)

    async def GetEvaluation(self, request: evaluator_pb.GetEvaluationRequest, context: object) -> evaluator_pb.GetEvaluationResponse:
        return evaluator_pb.GetEvaluationResponse(evaluation=next(e for e in self.evaluations if e.evaluation_id == request.evaluation_id))


PAGE = 2
"""The services' own limit, whatever is asked for."""


def page_of(entries: list[Any], token: str) -> tuple[list[Any], str]:
    """A page, and the token of the next one."""
    start = int(token or 0)
    return entries[start : start + PAGE], str(start + PAGE) if start + PAGE < len(entries) else ""


class Registry(registry_grpc.RegistryServiceServicer):
    def __init__(self) -> None:
        self.versions: list[registry_pb.ModelVersion] = []
        self.approvals: list[registry_pb.Approval] = []

    async def GetDelivery(self, request: registry_pb.GetDeliveryRequest, context: object) -> registry_pb.GetDeliveryResponse:
        return registry_pb.GetDeliveryResponse(delivery=registry_pb.Delivery(name=request.name, model="m", endpoint="e"))

    async def ListVersions(self, request: registry_pb.ListVersionsRequest, context: object) -> registry_pb.ListVersionsResponse:
        if not self.versions:
            raise NotFound("there is no model m")
        page, token = page_of(self.versions, request.page_token)
        return registry_pb.ListVersionsResponse(versions=page, next_page_token=token)

    async def GetVersion(self, request: registry_pb.GetVersionRequest, context: object) -> registry_pb.GetVersionResponse:
        return registry_pb.GetVersionResponse(version=next(v for v in self.versions if v.ref.version == request.version))

    async def ListApprovals(self, request: registry_pb.ListApprovalsRequest, context: object) -> registry_pb.ListApprovalsResponse:
        return registry_pb.ListApprovalsResponse(approvals=self.approvals)


class Deployer(deployer_grpc.DeployerServiceServicer):
    def __init__(self) -> None:
        self.rollouts: list[deployer_pb.Rollout] = []

    async def ListRollouts(self, request: deployer_pb.ListRolloutsRequest, context: object) -> deployer_pb.ListRolloutsResponse:
        page, token = page_of(self.rollouts, request.page_token)
        return deployer_pb.ListRolloutsResponse(rollouts=page, next_page_token=token)


class DeadLetters(eventing_grpc.DeadLetterServiceServicer):
    async def ListDeadLetters(self, request: eventing_pb.ListDeadLettersRequest, context: object) -> eventing_pb.ListDeadLettersResponse:
        return eventing_pb.ListDeadLettersResponse(
            dead_letters=[eventing_pb.DeadLetter(consumer="c", key="k", sequence=3, reason="broken")]
        )


class Services:
    """The fakes behind one API."""

    def __init__(self) -> None:
        # Each serves some methods of many.
        self.tracker, self.trainer, self.evaluator = Tracker(), Trainer(), Evaluator()  # type: ignore[abstract]
        self.registry, self.deployer = Registry(), Deployer()  # type: ignore[abstract]


def authenticate(token: str) -> Caller:
    if token != "hr_alice":
        raise Unauthenticated("this API key is not known")
    return ALICE


@asynccontextmanager
async def serving(adders: Mapping[str, tuple[Any, object]]) -> AsyncIterator[str]:
    settings = ServiceSettings(service_token_hashes=f"gateway={TOKEN_HASH}")
    methods = {
        f"/{name}/{method.name}": Rule(services={"gateway"}, roles={"viewer", "editor"})
        for name in adders
        for method in rpc._descriptors().FindServiceByName(name).methods
    }
    server = rpc.Server("127.0.0.1:0", settings, methods)
    for name, (adder, servicer) in adders.items():
        server.add(adder, servicer, name)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.fixture
async def services() -> Services:
    return Services()


@pytest.fixture
async def api(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API; the deployer's dead letters are out of reach."""
    letters = (eventing_grpc.add_DeadLetterServiceServicer_to_server, DeadLetters())  # type: ignore[abstract]
    adders: dict[str, tuple[Any, object]] = {
        "headrace.tracker.v1.TrackerService": (tracker_grpc.add_TrackerServiceServicer_to_server, services.tracker),
        "headrace.trainer.v1.TrainerService": (trainer_grpc.add_TrainerServiceServicer_to_server, services.trainer),
        "headrace.evaluator.v1.EvaluatorService": (evaluator_grpc.add_EvaluatorServiceServicer_to_server, services.evaluator),
        "headrace.registry.v1.RegistryService": (registry_grpc.add_RegistryServiceServicer_to_server, services.registry),
        "headrace.deployer.v1.DeployerService": (deployer_grpc.add_DeployerServiceServicer_to_server, services.deployer),
        "headrace.eventing.v1.DeadLetterService": letters,
    }
    settings = ServiceSettings(service_token=SecretStr(TOKEN))
    async with serving(adders) as address:
        channels = {name: rpc.channel(address, settings) for name in ("tracker", "trainer", "evaluator", "registry", "deployer")}
        peers = connect(channels)
        nowhere = rpc.channel("127.0.0.1:1", settings, deadline_s=0.5)
        peers.dead_letters["deployer"] = eventing_grpc.DeadLetterServiceStub(nowhere)  # type: ignore[index]  # a dict behind the Mapping
        transport = httpx.ASGITransport(create_app(peers, authenticate, None), raise_app_exceptions=False)
        headers = {"authorization": "Bearer hr_alice"}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            yield client
        for channel in (*channels.values(), nowhere):
            await channel.close()


@pytest.mark.parametrize("headers", [{"authorization": ""}, {"authorization": "Bearer hr_mallory"}, {"authorization": "Basic aGk6aG8="}])
async def test_nobody_gets_in_without_a_valid_key(api: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await api.get("/api/v1/runs/x", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "UNAUTHENTICATED"
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_path_that_does_not_exist_is_not_told_apart_without_a_key(api: httpx.AsyncClient) -> None:
    assert (await api.get("/api/v1/nothing", headers={"authorization": ""})).status_code == 401
    answer = await api.get("/api/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")


async def test_a_call_is_made_on_behalf_of_the_caller(api: httpx.AsyncClient, services: Services) -> None:
    answer = await api.post("/api/v1/runs", json={"experiment": "new"})
    assert answer.status_code == 200
    assert answer.json()["run"] | {"experiment_id": 7, "user": "alice"} == answer.json()["run"]
    assert services.tracker.callers == [ALICE]


async def test_an_experiment_that_two_make_at_once_is_made_once(api: httpx.AsyncClient, services: Services) -> None:
    services.tracker.races = 1
    assert (await api.post("/api/v1/runs", json={"experiment": "raced"})).json()["run"]["experiment_id"] == 7


@pytest.mark.parametrize(("run_id", "status", "code"), [("down", 503, "UNAVAILABLE"), ("bug", 500, "INTERNAL")])
async def test_errors_of_services_keep_their_kind(api: httpx.AsyncClient, run_id: str, status: int, code: str) -> None:
    answer = await api.get(f"/api/v1/runs/{run_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret of the inside" not in answer.text
    assert answer.json()["error"]["error_id"]


async def test_of_a_service_that_is_away_no_address_is_told(api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = await api.post("/api/v1/dead-letters/deployer/replay", json={"consumer": "c", "topic": "t", "key": "k"})
    error = answer.json()["error"]
    assert answer.status_code in (503, 504)
    assert error["message"].startswith("a server that is needed")
    assert "127.0.0.1" not in answer.text
    assert error["error_id"] in caplog.text


async def test_a_wrong_body_names_the_field(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/v1/runs", json={"lease_seconds": -1})
    assert answer.status_code == 400
    assert answer.json()["error"]["violations"][0]["field"] == "lease_seconds"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/runs", b'{"experiment": "a\\ud800"}'),
        ("/api/v1/runs/x/inputs", b'{"inputs": [{"name": "d", "version": 9223372036854775808}]}'),
        ("/api/v1/keys", b'{"subject": "s", "roles": ["viewer"], "expires_in_days": 999999999}'),
        ("/api/v1/runs", b"[" * 100_000),
        ("/api/v1/runs", b"{not json"),
    ],
)
async def test_what_json_can_say_and_a_service_cannot_hear_is_a_bad_request(api: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await api.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID"), answer.text


@pytest.mark.parametrize(
    "body", [{"metrics": [{}] * 50_000}, {"tags": {str(n): n for n in range(50_000)}}, {"metrics": [{"key": "k"}] * 300}]
)
async def test_a_wrong_body_of_any_size_is_told_shortly(api: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await api.post("/api/v1/runs/r/log-batch", json=body)
    assert answer.status_code == 400
    assert len(answer.content) < 2_000


async def test_another_method_is_refused_in_the_same_form(api: httpx.AsyncClient) -> None:
    answer = await api.delete("/api/v1/runs")
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["allow"]) == (405, "INVALID", "POST")


async def test_a_log_is_streamed_and_an_unknown_one_is_not_found(api: httpx.AsyncClient) -> None:
    assert (await api.get("/api/v1/trainings/t1/log")).text == "first\nsecond\n"
    assert (await api.get("/api/v1/trainings/t1/log", params={"offset": 6})).text == "second\n"
    assert (await api.get("/api/v1/trainings/t2/log")).status_code == 404


async def test_a_service_that_is_down_hides_no_dead_letters_of_others(api: httpx.AsyncClient) -> None:
    told = (await api.get("/api/v1/dead-letters")).json()
    assert {letter["service"] for letter in told["dead_letters"]} == {"trainer", "evaluator", "registry"}
    assert told["unreachable"] == ["deployer"]
    assert (await api.post("/api/v1/dead-letters/tracker/replay", json={"consumer": "c", "topic": "t", "key": "k"})).status_code == 404


async def test_a_journey_is_told_by_whoever_knows_it_best(api: httpx.AsyncClient, services: Services) -> None:
    run = "b" * 32

    async def state() -> str:
        return str((await api.get("/api/v1/deliveries/d/journeys", params={"run_id": run})).json()["journeys"][0]["state"])

    assert await state() == "training"
    evaluation = evaluator_pb.Evaluation(evaluation_id="e1", status="pending")
    evaluation.judgement.journey.run_id = run
    services.evaluator.evaluations.append(evaluation)
    assert await state() == "evaluating"
    evaluation.status = "failed"
    assert await state() == "failed"
    evaluation.status = "passed"
    assert await state() == "registering"
    version = registry_pb.ModelVersion(stage="Staging")
    version.ref.version = 3
    version.journey.run_id = run
    services.registry.versions.append(version)
    assert await state() == "promoted"
    approval = registry_pb.Approval(approval_id="a1", status="pending", needed=2)
    approval.version.version = 3
    services.registry.approvals.append(approval)
    assert await state() == "awaiting_approval"
    approval.status = "approved"
    assert await state() == "promoted"
    rollout = deployer_pb.Rollout(state="stepping", weight_bps=500)
    rollout.ref.version.version = 3
    services.deployer.rollouts.append(rollout)
    assert await state() == "stepping"
    assert (await api.get("/api/v1/deliveries/d/journeys")).json()["journeys"][0]["detail"] == "5 % of the traffic"
    # Its verdict was out of date: until it is evaluated again that is what it waits for, afterwards the old rollout says nothing.
    rollout.state, rollout.stale, rollout.evaluation_id = "superseded", True, "e1"
    assert await state() == "evaluating"
    again = evaluator_pb.Evaluation(evaluation_id="e2", status="running")
    again.judgement.journey.run_id = run
    evaluation.status = "superseded"
    services.evaluator.evaluations.insert(0, again)
    assert await state() == "evaluating"
    again.status = "passed"
    assert await state() == "promoted"
    another = deployer_pb.Rollout(state="waiting", evaluation_id="e2")
    another.ref.version.version = 3
    services.deployer.rollouts.insert(0, another)
    assert await state() == "waiting"


async def test_journeys_and_lineages_are_found_on_every_page(api: httpx.AsyncClient, services: Services) -> None:
    for number in range(7, 0, -1):  # newest first, two a page
        run = f"{number:032x}"
        evaluation = evaluator_pb.Evaluation(evaluation_id=f"e{number}", status="passed")
        evaluation.judgement.journey.run_id, evaluation.judgement.model = run, "m"
        services.evaluator.evaluations.append(evaluation)
        version = registry_pb.ModelVersion(stage="Archived", evaluation_id=f"e{number}")
        version.ref.version, version.journey.run_id = number, run
        services.registry.versions.append(version)
        rollout = deployer_pb.Rollout(state="completed", reason=f"rollout {number}")
        rollout.ref.version.version = number
        services.deployer.rollouts.append(rollout)
    told = (await api.get("/api/v1/deliveries/d/journeys")).json()["journeys"]
    assert [(one["version"], one["state"], one["detail"]) for one in told] == [(n, "completed", f"rollout {n}") for n in range(7, 0, -1)]
    (oldest,) = (await api.get("/api/v1/deliveries/d/journeys", params={"run_id": f"{1:032x}"})).json()["journeys"]
    assert (oldest["version"], oldest["detail"]) == (1, "rollout 1")
    traced = (await api.get(f"/api/v1/traces/{1:032x}")).json()
    assert (traced["lineage"]["version"]["version"], traced["lineage"]["evaluation"]["id"]) == (1, "e1")
    # A run that became no version is looked for to the end, and not found.
    del services.registry.versions[-1]
    assert (await api.get(f"/api/v1/traces/{1:032x}")).status_code == 404
    (oldest,) = (await api.get("/api/v1/deliveries/d/journeys", params={"run_id": f"{1:032x}"})).json()["journeys"]
    assert oldest["state"] == "registering"


class Spans:
    """A span source that knows one trace, of a run that became nothing."""

    async def find(self, name: str, value: str) -> dict[str, Any]:
        known = name == "run_id" and value == "c" * 32
        return {"spans": [{"attributes": {}}] if known else [], "tree": [{"service": "tracker"}] if known else []}


@pytest.mark.parametrize(("roles", "run_id", "status"), [({"viewer"}, None, 200), (set(), None, 403), (set(), "c" * 32, 403)])
async def test_spans_are_for_those_who_have_a_role(services: Services, roles: set[str], run_id: str | None, status: int) -> None:
    """Also those of a run that became no version; not for a key that is for inference alone, nor for a run's token."""
    settings = ServiceSettings(service_token=SecretStr(TOKEN))
    evaluator = (evaluator_grpc.add_EvaluatorServiceServicer_to_server, services.evaluator)
    async with serving({"headrace.evaluator.v1.EvaluatorService": evaluator}) as address:
        channels = {name: rpc.channel(address, settings) for name in ("tracker", "trainer", "evaluator", "registry", "deployer")}
        caller = Caller("gateway", "somebody", frozenset(roles), run_id)
        transport = httpx.ASGITransport(create_app(connect(channels), lambda _: caller, Spans()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"x-api-key": "any"}) as client:
            answer = await client.get(f"/api/v1/traces/{'c' * 32}")
        for channel in channels.values():
            await channel.close()
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["tree"] == [{"service": "tracker"}]


@pytest.mark.parametrize(("id", "status"), [("c" * 32, 200), ("d" * 32, 503)])
async def test_spans_are_told_while_the_evaluator_is_away(id: str, status: int) -> None:
    settings = ServiceSettings(service_token=SecretStr(TOKEN))
    async with serving({}) as address:  # the evaluator's address, where nobody serves it any more
        pass
    channels = {name: rpc.channel(address, settings) for name in ("tracker", "trainer", "evaluator", "registry", "deployer")}
    transport = httpx.ASGITransport(create_app(connect(channels), lambda _: ALICE, Spans()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"x-api-key": "any"}) as client:
        answer = await client.get(f"/api/v1/traces/{id}")
    for channel in channels.values():
        await channel.close()
    assert answer.status_code == status
    if status == 200:
        assert (answer.json()["tree"], answer.json()["lineage"]) == ([{"service": "tracker"}], None)
        assert "does not answer" in answer.json()["note"]


async def test_the_api_describes_itself_to_anybody(api: httpx.AsyncClient) -> None:
    described = (await api.get("/api/v1/openapi.json", headers={"authorization": ""})).json()
    answer = described["paths"]["/api/v1/rollouts/{rollout_id}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert "rollout" in answer["properties"]


@pytest.fixture(params=[1.0, 0.0], ids=["sampled", "not sampled"])
def exported(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[ReadableSpan]]]:
    """The spans that have ended, those of the API first."""
    exporter = InMemorySpanExporter()
    active = telemetry.setup("gateway", ServiceSettings(trace_sample_ratio=request.param), span_exporters=[exporter])
    yield lambda: sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    active.shutdown()


CALLER = "00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("method", "path", "name", "status", "error"),
    [
        ("GET", "/api/v1/runs/7f7f?x=7f7f", "GET /api/v1/runs/{run_id}", 200, None),
        ("GET", "/api/v1/trainings/t1/log", "GET /api/v1/trainings/{training_id}/log", 200, None),
        ("GET", "/api/v1/trainings/7f7f", "GET /api/v1/trainings/{training_id}", 404, "NotFound"),
        ("POST", "/api/v1/runs?x=7f7f", "POST /api/v1/runs", 400, None),
        ("DELETE", "/api/v1/runs", "DELETE /api/v1/runs", 405, None),
        ("GET", "/api/v1/7f7f", "GET", 404, None),
        ("7F7F", "/api/v1/runs", "HTTP", 405, None),
        ("GET", "/api/v1/runs/down", "GET /api/v1/runs/{run_id}", 503, "Unavailable"),
        ("GET", "/api/v1/runs/bug", "GET /api/v1/runs/{run_id}", 500, "Internal"),
    ],
)
async def test_a_request_is_a_span_above_the_calls_that_it_causes(
    exported: Callable[[], list[ReadableSpan]], api: httpx.AsyncClient, method: str, path: str, name: str, status: int, error: str | None
) -> None:
    answer = await api.request(method, path, headers={"traceparent": CALLER})
    assert answer.status_code == status
    top, *below = exported()
    attributes = dict(top.attributes or {})
    assert (top.name, top.kind, attributes["http.response.status_code"]) == (name, SpanKind.SERVER, status)
    assert attributes.get("error.type") == error
    assert attributes.get("http.route") == (name.partition(" ")[2] or None)
    assert top.parent is not None
    assert f"00-{top.parent.trace_id:032x}-{top.parent.span_id:016x}-01" == CALLER
    assert all(span.context.trace_id == top.context.trace_id for span in below if span.context and top.context)
    for call in [span for span in below if span.kind is SpanKind.CLIENT]:
        assert call.parent is not None
        assert call.parent.span_id == (top.context.span_id if top.context else 0)
    assert bool(below) == (status not in (400, 405) and path != "/api/v1/7f7f"), "what reached a service has a span below"
    assert "7f7f" not in "".join(span.to_json().lower() for span in exported())
    if status == 500:
        assert attributes["headrace.error_id"] == answer.json()["error"]["error_id"]


async def test_nobody_without_a_key_joins_a_call_and_an_error_leaves_a_span_in_any_case(
    exported: Callable[[], list[ReadableSpan]], api: httpx.AsyncClient, request: pytest.FixtureRequest
) -> None:
    sampled = "not sampled" not in request.node.name
    assert (await api.get("/api/v1/runs/x", headers={"authorization": ""})).status_code == 401
    assert [(span.name, (span.attributes or {})["error.type"]) for span in exported()] == [("GET", "Unauthenticated")] * sampled
    assert (await api.get("/api/v1/runs/down")).status_code == 503
    (failed,) = [span for span in exported() if span.name == "GET /api/v1/runs/{run_id}"]
    assert failed.parent is None
    assert dict(failed.attributes or {})["http.response.status_code"] == 503
