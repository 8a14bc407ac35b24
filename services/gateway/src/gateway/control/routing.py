"""What every router of the control-plane API uses: the peers of a request and the description of an answer."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Request
from google.protobuf.message import Message

from gateway.control.peers import Peers
from gateway.control.wire import schema


def _peers(request: Request) -> Peers:
    return cast(Peers, request.app.state.peers)


PeersOf = Annotated[Peers, Depends(_peers)]


def answers(message_class: type[Message]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers such a message."""
    return {200: {"description": "OK", "content": {"application/json": {"schema": schema(message_class)}}}}
