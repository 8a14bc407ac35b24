"""/api/v1/traces: from a request's or a run's id to the spans that belong to it, and to everything that led to it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import httpx
from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from fastapi import APIRouter, Request
from servicekit.access import EVERY_ROLE, current_caller, require_role
from servicekit.errors import Invalid, NotFound, Transient, Unavailable

from gateway.control.lineage import lineage_of
from gateway.control.pages import versions_of
from gateway.control.peers import Peers
from gateway.control.routing import PeersOf
from gateway.control.wire import Json

router = APIRouter(tags=["traces"])

# Attributes of the data path's spans, as gateway.exchange writes them.
REQUEST_ID = "headrace.request_id"
ENDPOINT = "headrace.endpoint"
ARM = "headrace.arm"
MODEL = "headrace.model"
VERSION = "headrace.model_version"
READERS = EVERY_ROLE
"""Spans are asked of no service that would check it: a key that is for inference alone, or a run's token, sees none."""

NOT_KEPT = (
    "no span of this is kept: the id is unknown, it was not sampled (HEADRACE_TRACE_SAMPLE_RATIO; errors always are), it is too old, "
    "or it is too new and still on its way"
)
NO_LINEAGE = "a service that knows what led to this does not answer: ask again for the lineage"
NO_SOURCE = "this gateway is not told where spans are kept (HEADRACE_TRACES_URL): look in your tracing system"


class SpanSource(Protocol):
    """Where spans can be asked for."""

    async def find(self, name: str, value: str) -> Json:
        """{"spans": [...], "tree": [...]} of the traces with this trace_id, request_id or run_id, and of those they link to."""
        ...


class HttpSpanSource:
    """The span receiver of the local stack, by HTTP."""

    def __init__(self, url: str, secret: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=10.0, trust_env=False)

    async def find(self, name: str, value: str) -> Json:
        """Raises Unavailable when the receiver does not answer."""
        try:
            answer = await self._http.get("/spans", params={name: value})
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable("the span receiver does not answer", detail=str(error)) from error
        return dict(answer.json())

    async def close(self) -> None:
        await self._http.aclose()


@router.get("/traces/{id}")
async def get_trace(id: str, request: Request, peers: PeersOf) -> Json:
    """By a request's id (X-Request-Id), a run's id, or a trace id: `tree` of spans, and `lineage` back to data and commit."""
    if not id.isascii() or len(id) > 128:
        raise Invalid("an id has at most 128 characters")
    require_role(current_caller(), *READERS)
    source = cast("SpanSource | None", request.app.state.spans)
    lineage, away = None, None
    try:
        lineage = await _lineage_of_run(peers, id)
    except Transient as error:  # what spans there are can be told all the same
        away = error
    if source is None:
        if lineage is None:
            raise away or NotFound(NO_SOURCE)
        return {"id": id, "lineage": lineage, "tree": [], "note": NO_SOURCE}
    found: Json = {"spans": [], "tree": []}
    for name in ("run_id", "request_id", "trace_id"):
        found = await source.find(name, id)
        if found["spans"]:
            break
    if lineage is None:
        if not found["spans"]:
            raise away or NotFound(NOT_KEPT)
        try:
            lineage = await _lineage_of_request(peers, id, found["spans"])
        except Transient as error:
            away = error
    note = NOT_KEPT if not found["spans"] else NO_LINEAGE if away and lineage is None else ""
    return {"id": id, "lineage": lineage, "tree": found["tree"], "note": note}


async def _lineage_of_request(peers: Peers, request_id: str, spans: list[dict[str, Any]]) -> Json | None:
    """What led to the version that answered this request; None when the spans are not of a request."""
    for span in spans:
        attributes = span["attributes"]
        if attributes.get(REQUEST_ID) == request_id and attributes.get(MODEL):
            prediction = {"request": request_id, "endpoint": attributes.get(ENDPOINT), "arm": attributes.get(ARM)}
            return {"prediction": prediction, **await lineage_of(peers, attributes[MODEL], int(attributes[VERSION]))}
    return None


async def _lineage_of_run(peers: Peers, run_id: str) -> Json | None:
    """What became of a run; None when there is no such run or it became no version."""
    if len(run_id) != 32 or set(run_id) - set("0123456789abcdef"):
        return None
    evaluations = (await peers.evaluator.ListEvaluations(evaluator_pb.ListEvaluationsRequest(run_id=run_id, page_size=1))).evaluations
    if not evaluations:
        return None
    model = evaluations[0].judgement.model
    try:
        async for version in versions_of(peers, model):
            if version.journey.run_id == run_id:
                return await lineage_of(peers, model, version.ref.version)
    except NotFound:
        return None
    return None
