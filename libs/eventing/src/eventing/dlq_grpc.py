"""The gRPC face of dead letters: headrace.eventing.v1.DeadLetterService, served by every service that consumes."""

from __future__ import annotations

import logging
from typing import Any

import grpc
from contracts.eventing.v1 import service_pb2, service_pb2_grpc
from servicekit.access import EVERY_ROLE, AccessTable, Rule, current_caller
from servicekit.errors import Invalid, Violation

from eventing.dlq import DeadLetter, DeadLetters

SERVICE = "headrace.eventing.v1.DeadLetterService"

_ADMIN = Rule({"gateway"}, {"admin"})

ACCESS: AccessTable = {
    f"/{SERVICE}/ListDeadLetters": Rule({"gateway"}, EVERY_ROLE),  # a list holds no payload
    f"/{SERVICE}/GetDeadLetter": _ADMIN,
    f"/{SERVICE}/ReplayDeadLetters": _ADMIN,
    f"/{SERVICE}/DropDeadLetter": _ADMIN,
}
"""Who may do what with dead letters, in every service that serves them."""

_log = logging.getLogger(__name__)


class DeadLetterServicer(service_pb2_grpc.DeadLetterServiceServicer):
    """Serves the dead letters of one service. Errors are the library's; the server's interceptor turns them into statuses."""

    def __init__(self, letters: DeadLetters) -> None:
        self._letters = letters

    async def ListDeadLetters(
        self, request: service_pb2.ListDeadLettersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> service_pb2.ListDeadLettersResponse:
        letters = await self._letters.list(request.consumer)
        return service_pb2.ListDeadLettersResponse(dead_letters=[_message(letter) for letter in letters])

    async def GetDeadLetter(
        self, request: service_pb2.GetDeadLetterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> service_pb2.GetDeadLetterResponse:
        letter = await self._letters.get(request.consumer, request.topic, request.key, request.sequence)
        message = _message(letter)
        message.payload = letter.payload
        return service_pb2.GetDeadLetterResponse(dead_letter=message)

    async def ReplayDeadLetters(
        self, request: service_pb2.ReplayDeadLettersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> service_pb2.ReplayDeadLettersResponse:
        done = await self._letters.replay(request.consumer, request.topic, request.key)
        _log.info(
            "%s replayed %s %s of consumer %s: %d applied, %d remain",
            current_caller().name,
            request.topic,
            request.key,
            request.consumer,
            done.applied,
            done.remaining,
        )
        return service_pb2.ReplayDeadLettersResponse(applied=done.applied, remaining=done.remaining, reason=done.reason)

    async def DropDeadLetter(
        self, request: service_pb2.DropDeadLetterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> service_pb2.DropDeadLetterResponse:
        if not request.reason.strip():
            raise Invalid("say why the event is dropped", [Violation("reason", "must not be empty")])
        letter = await self._letters.drop(request.consumer, request.topic, request.key, request.sequence)
        _log.warning(
            "%s dropped event %s (%s %s %d) of consumer %s, which was parked because of %r: %s",
            current_caller().name,
            letter.event_id,
            letter.topic,
            letter.key,
            letter.sequence,
            letter.consumer,
            letter.reason,
            request.reason,
        )
        return service_pb2.DropDeadLetterResponse()


def _message(letter: DeadLetter) -> service_pb2.DeadLetter:
    message = service_pb2.DeadLetter(
        consumer=letter.consumer,
        key=letter.key,
        sequence=letter.sequence,
        topic=letter.topic,
        partition=letter.partition,
        offset=letter.offset,
        event_id=letter.event_id,
        event_type=letter.type,
        reason=letter.reason,
    )
    message.parked_at.FromDatetime(letter.parked_at)
    return message
