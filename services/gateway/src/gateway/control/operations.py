"""/api/v1 for operators: API keys, the audit log, dead letters."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from contracts.eventing.v1 import service_pb2 as eventing_pb
from contracts.eventing.v1 import service_pb2_grpc as eventing_grpc
from contracts.registry.v1 import service_pb2 as pb
from fastapi import APIRouter
from pydantic import BaseModel, Field
from servicekit.errors import NotFound, Transient
from servicekit.moments import moment

from gateway.control.bounds import Listed
from gateway.control.peers import Peers
from gateway.control.routing import PeersOf, answers
from gateway.control.wire import Json, to_json

router = APIRouter(tags=["operations"])


class NewKey(BaseModel):
    subject: str
    roles: Listed[str] = []
    inference_endpoints: Listed[str] = []
    expires_in_days: int | None = Field(default=None, gt=0, le=36_500)


class Letters(BaseModel):
    consumer: str
    topic: str
    key: str


class OneLetter(Letters):
    sequence: int
    reason: str = ""


@router.get("/keys", responses=answers(pb.ListApiKeysResponse))
async def list_keys(peers: PeersOf) -> Json:
    return to_json(await peers.access.ListApiKeys(pb.ListApiKeysRequest()))


@router.post("/keys", responses=answers(pb.CreateApiKeyResponse))
async def create_key(body: NewKey, peers: PeersOf) -> Json:
    request = pb.CreateApiKeyRequest(subject=body.subject, roles=body.roles, inference_endpoints=body.inference_endpoints)
    if body.expires_in_days is not None:
        request.expires_at.CopyFrom(moment(datetime.now(UTC) + timedelta(days=body.expires_in_days)))
    return to_json(await peers.access.CreateApiKey(request))


@router.delete("/keys/{key_id}", responses=answers(pb.RevokeApiKeyResponse))
async def revoke_key(key_id: str, peers: PeersOf) -> Json:
    return to_json(await peers.access.RevokeApiKey(pb.RevokeApiKeyRequest(key_id=key_id)))


@router.get("/audit", responses=answers(pb.ListAuditResponse))
async def list_audit(peers: PeersOf, target: str = "", page_size: int = 100, page_token: str = "") -> Json:
    return to_json(await peers.registry.ListAudit(pb.ListAuditRequest(target=target, page_size=page_size, page_token=page_token)))


@router.get("/dead-letters")
async def list_dead_letters(peers: PeersOf) -> Json:
    """Every service's parked events. A service that does not answer is named, and hides nothing of the others."""

    async def of(service: str, stub: eventing_grpc.DeadLetterServiceAsyncStub) -> list[Json] | str:
        try:
            found = await stub.ListDeadLetters(eventing_pb.ListDeadLettersRequest())
        except Transient:
            return service
        return [{"service": service, **to_json(letter)} for letter in found.dead_letters]

    results = await asyncio.gather(*(of(service, stub) for service, stub in peers.dead_letters.items()))
    return {
        "dead_letters": [letter for result in results if isinstance(result, list) for letter in result],
        "unreachable": [result for result in results if isinstance(result, str)],
    }


@router.get("/dead-letters/{service}/one", responses=answers(eventing_pb.GetDeadLetterResponse))
async def get_dead_letter(service: str, consumer: str, topic: str, key: str, sequence: int, peers: PeersOf) -> Json:
    request = eventing_pb.GetDeadLetterRequest(consumer=consumer, topic=topic, key=key, sequence=sequence)
    return to_json(await _letters(peers, service).GetDeadLetter(request))


@router.post("/dead-letters/{service}/replay", responses=answers(eventing_pb.ReplayDeadLettersResponse))
async def replay_dead_letters(service: str, body: Letters, peers: PeersOf) -> Json:
    request = eventing_pb.ReplayDeadLettersRequest(consumer=body.consumer, topic=body.topic, key=body.key)
    return to_json(await _letters(peers, service).ReplayDeadLetters(request))


@router.post("/dead-letters/{service}/drop", responses=answers(eventing_pb.DropDeadLetterResponse))
async def drop_dead_letter(service: str, body: OneLetter, peers: PeersOf) -> Json:
    request = eventing_pb.DropDeadLetterRequest(
        consumer=body.consumer, topic=body.topic, key=body.key, sequence=body.sequence, reason=body.reason
    )
    return to_json(await _letters(peers, service).DropDeadLetter(request))


def _letters(peers: Peers, service: str) -> eventing_grpc.DeadLetterServiceAsyncStub:
    stub = peers.dead_letters.get(service)
    if stub is None:
        raise NotFound(f"{service} consumes no events; {', '.join(sorted(peers.dead_letters))} do")
    return stub
