"""Every method of every service, called as everybody over a real socket: what is answered is what docs/access.md says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from contracts.deployer.v1 import service_pb2 as _deployer  # noqa: F401 - importing them makes their services known to the pool
from contracts.evaluator.v1 import service_pb2 as _evaluator  # noqa: F401
from google.protobuf import descriptor_pool
from servicekit import access, rpc
from servicekit.access import Caller
from servicekit.settings import ServiceSettings

from scripts import gen_access

PAGE = Path(__file__).resolve().parents[3] / "docs" / "access.md"
PACKAGES = {"DeliverySectionService": "registry", "DeadLetterService": "eventing", "AccessService": "registry"}
"""Where a service is declared that is not of its server's own package."""

PEOPLE = ("no role", "viewer", "editor", "approver", "admin")
ALLOWED, DENIED, UNKNOWN = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED

TOKENS = {name: access.new_service_token(name) for name in (*gen_access.SERVICES, access.GATEWAY)}
HASHES = ",".join(f"{name}={digest}" for name, (_, digest) in TOKENS.items())


class Settings(ServiceSettings):
    service_name: ClassVar[str] = "tracker"


def written() -> dict[str, dict[str, tuple[set[str], set[str]]]]:
    """docs/access.md as a reader takes it: by server and full method, the columns that say yes, and the services."""
    page: dict[str, dict[str, tuple[set[str], set[str]]]] = {}
    columns: list[str] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            server = line.removeprefix("## ")
            page[server] = {}
        elif line.startswith("| method "):
            columns = [cell.strip() for cell in line.strip("|").split("|")]
        elif line.startswith("| "):
            cells = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            service, _, method = cells["method"].partition(".")
            name = f"/headrace.{PACKAGES.get(service, server)}.v1.{service}/{method}"
            page[server][name] = ({who for who in columns if cells[who] == "yes"}, set(filter(None, cells["services"].split(", "))))
    return page


def adder_of(service: str) -> Any:
    """Serves every method that the contract declares, with a servicer that only says that the call came through."""

    async def reached(request: bytes, context: Any) -> bytes:
        return b""

    async def reached_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b""

    def add(_: object, server: Any) -> None:
        methods = descriptor_pool.Default().FindServiceByName(service).methods  # type: ignore[no-untyped-call]
        handlers: dict[str, Any] = {
            method.name: grpc.unary_stream_rpc_method_handler(reached_stream)
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler(reached)
            for method in methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    return add


def callers() -> dict[str, list[tuple[str, str]]]:
    """The metadata by which each caller shows who it is."""
    gateway = (access.AUTHORIZATION, f"Bearer {TOKENS[access.GATEWAY][0]}")

    def person(*roles: str, run_id: str | None = None) -> list[tuple[str, str]]:
        return [gateway, *access.identity_metadata(Caller(access.GATEWAY, "ada", frozenset(roles), run_id, 1 if run_id else None))]

    return {
        "nobody": [],
        "a stranger": [(access.AUTHORIZATION, "Bearer admin.let-me-in"), (access.SUBJECT, "eve"), (access.ROLES, "admin")],
        "the gateway for nobody": [gateway],
        "no role": person(),
        **{role: person(role) for role in gen_access.ROLES},
        "run token": person(run_id="a" * 32),
        "run token with roles": person(*gen_access.ROLES, run_id="a" * 32),
        # What a service says of an end user does not count.
        **{
            name: [(access.AUTHORIZATION, f"Bearer {TOKENS[name][0]}"), (access.SUBJECT, "eve"), (access.ROLES, "admin")]
            for name in gen_access.SERVICES
        },
    }


def expected(who: str, people: set[str], services: set[str]) -> grpc.StatusCode:
    if who in ("nobody", "a stranger"):
        return UNKNOWN
    if who in PEOPLE:
        return ALLOWED if who in people else DENIED
    if who.startswith("run token"):
        return ALLOWED if "run token" in people else DENIED
    return ALLOWED if who in services else DENIED


async def answer(channel: Any, method: str, streams: bool, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    try:
        if streams:
            async for _ in channel.unary_stream(method)(b"", timeout=30, metadata=metadata):
                pass
        else:
            await channel.unary_unary(method)(b"", timeout=30, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return ALLOWED


@pytest.mark.parametrize("server_name", gen_access.SERVICES)
async def test_everybody_is_answered_as_the_page_says(server_name: str) -> None:
    rules = written()[server_name]
    services = sorted({method.split("/")[1] for method in gen_access.access_table(server_name)})
    server = rpc.Server("127.0.0.1:0", Settings(service_token_hashes=HASHES, shutdown_grace_s=1), gen_access.access_table(server_name))
    for service in services:
        server.add(adder_of(service), object(), service)
    port = await server.start()
    methods = {
        f"/{service}/{method.name}": method.server_streaming
        for service in services
        for method in descriptor_pool.Default().FindServiceByName(service).methods  # type: ignore[no-untyped-call]
    }
    assert rules.keys() == methods.keys(), "the page names every method that is served, and no other"
    wrong = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method, streams in methods.items():
                for who, metadata in callers().items():
                    found = await answer(channel, method, streams, metadata)
                    if found is not expected(who, *rules[method]):
                        wrong.append(f"{method} as {who}: {found.name}")
    finally:
        await server.stop(0)
    assert wrong == []


def test_the_page_grants_what_it_is_known_to_grant() -> None:
    """Some lines by heart, so that a page and tables that are wrong alike are noticed."""
    page = written()
    tracker = page["tracker"]
    assert tracker["/headrace.tracker.v1.TrackerService/LogBatch"] == ({"editor", "admin", "run token"}, set())
    assert tracker["/headrace.tracker.v1.TrackerService/RegisterDataset"] == ({"editor", "admin"}, set())
    assert page["registry"]["/headrace.registry.v1.RegistryService/DecideApproval"] == ({"approver"}, set())
    assert page["registry"]["/headrace.registry.v1.AccessService/CreateApiKey"] == ({"admin"}, set())
    assert page["deployer"]["/headrace.eventing.v1.DeadLetterService/GetDeadLetter"] == ({"admin"}, set())
    with_runs = {server for server, rules in page.items() for people, _ in rules.values() if "run token" in people}
    assert with_runs == {"tracker"}, "run tokens have business with the tracker alone"
    sections = [rules["/headrace.registry.v1.DeliverySectionService/ValidateSection"] for name, rules in page.items() if name in SECTIONS]
    assert sections == [(set(), {"registry"})] * len(SECTIONS)


SECTIONS = ("trainer", "evaluator", "deployer")
