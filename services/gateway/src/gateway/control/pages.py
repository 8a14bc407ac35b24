"""Reading lists of the services to their end: each answers a page at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator

from contracts.deployer.v1 import service_pb2 as deployer_pb
from contracts.registry.v1 import service_pb2 as registry_pb

from gateway.control.peers import Peers

PAGE = 200
"""How many entries are asked for at once; a service may answer fewer."""


async def versions_of(peers: Peers, model: str) -> AsyncIterator[registry_pb.ModelVersion]:
    """All versions of a model, newest first, each page asked for when it is needed. Raises NotFound when there is no such model."""
    token = ""
    while True:
        request = registry_pb.ListVersionsRequest(model=model, page_size=PAGE, page_token=token)
        page = await peers.registry.ListVersions(request)
        for version in page.versions:
            yield version
        token = page.next_page_token
        if not token:
            return


async def rollouts_of(peers: Peers, endpoint: str) -> AsyncIterator[deployer_pb.Rollout]:
    """All rollouts of an endpoint, newest first, each page asked for when it is needed."""
    token = ""
    while True:
        request = deployer_pb.ListRolloutsRequest(endpoint=endpoint, page_size=PAGE, page_token=token)
        page = await peers.deployer.ListRollouts(request)
        for rollout in page.rollouts:
            yield rollout
        token = page.next_page_token
        if not token:
            return
