"""API keys, who may call what, and that every error of the domain has its kind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from contracts.eventing.v1 import service_pb2 as dlq_pb
from contracts.registry.v1 import service_pb2 as registry_pb
from pydantic import ValidationError
from registry.domain import access, errors
from registry.domain.errors import DeliveryInvalid, DomainError, Malformed, Problem
from registry.entrypoints.grpc import ACCESS, RULES
from registry.handlers.telling import KINDS, told
from registry.settings import RegistrySettings
from servicekit.access import EVERY_ROLE, Caller, authorize
from servicekit.errors import Forbidden, HeadraceError, Invalid, Violation

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HASH = "a" * 64


def test_people_have_the_roles_that_services_know() -> None:
    assert set(access.PEOPLE) == EVERY_ROLE


def test_a_key_and_its_revocation() -> None:
    key = access.new_key("id", HASH, "ann@example.com", ["admin", "viewer", "admin"], ["b", "a", "b"], NOW, NOW + timedelta(days=1))
    assert (key.revision, key.roles, key.inference_endpoints) == (1, ("viewer", "admin"), ("a", "b"))
    assert key.good_at(NOW)
    assert not key.good_at(NOW + timedelta(days=1))
    gone = key.revoke()
    assert (gone.revision, gone.revoked, gone.good_at(NOW)) == (2, True, False)
    assert gone.revoke() is gone


@pytest.mark.parametrize(
    ("subject", "roles", "endpoints", "expires", "says"),
    [
        ("", ["viewer"], [], None, "subject"),
        ("a b", ["viewer"], [], None, "subject"),
        ("service:x", ["viewer"], [], None, "subject"),  # a person must not look like a service in the audit log
        ("ann", ["owner"], [], None, "roles: owner"),
        ("ann", [], [], None, "opens nothing"),
        ("ann", [], ["a/b"], None, "inference_endpoints"),
        ("ann", [], [f"e{n}" for n in range(101)], None, "inference_endpoints"),
        ("ann", ["viewer"], [], NOW, "expires_at"),
    ],
)
def test_keys_that_cannot_be(subject: str, roles: list[str], endpoints: list[str], expires: datetime | None, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        access.new_key("id", HASH, subject, roles, endpoints, NOW, expires)


def test_a_key_names_callers_only_when_asked_to() -> None:
    assert access.new_key("abc", HASH, "shop", ["frontend"], ["flights"], NOW, None).roles == ("frontend",)
    assert "frontend" not in access.bootstrap_key(f"abc:{HASH}", NOW).roles


def test_the_bootstrap_key() -> None:
    key = access.bootstrap_key(f"abc:{HASH}", NOW)
    assert (key.key_id, key.hash, key.inference_endpoints) == ("abc", HASH, ("*",))
    assert "admin" in key.roles
    for wrong in ("", "abc", f"abc:{HASH[:-1]}", f":{HASH}", f"a b:{HASH}", f"abc:{HASH.upper()}"):
        with pytest.raises(Malformed):
            access.bootstrap_key(wrong, NOW)


def test_every_method_has_a_rule_with_roles() -> None:
    descriptors = {**registry_pb.DESCRIPTOR.services_by_name, **dlq_pb.DESCRIPTOR.services_by_name}
    served = {d.full_name: {method.name for method in d.methods} for d in descriptors.values() if d.full_name in RULES}
    assert {service: set(methods) for service, methods in RULES.items()} == served
    assert all(rule.roles for rule in ACCESS.values())


@pytest.mark.parametrize(
    ("method", "role", "allowed"),
    [
        ("RegistryService/ListModels", "viewer", True),
        ("RegistryService/ApplyDelivery", "viewer", False),
        ("RegistryService/ApplyDelivery", "editor", True),
        ("RegistryService/DecideApproval", "editor", False),
        ("RegistryService/DecideApproval", "admin", False),
        ("RegistryService/DecideApproval", "approver", True),
        ("AccessService/CreateApiKey", "approver", False),
        ("AccessService/CreateApiKey", "admin", True),
    ],
)
def test_roles(method: str, role: str, allowed: bool) -> None:
    caller = Caller("gateway", "ann", frozenset({role}))
    full = f"/headrace.registry.v1.{method}"
    if allowed:
        authorize(full, caller, ACCESS)
    else:
        with pytest.raises(Forbidden):
            authorize(full, caller, ACCESS)


def test_a_run_token_and_another_service_have_no_business_here() -> None:
    for caller in (Caller("gateway", "run", frozenset(), run_id="r"), Caller("evaluator")):
        with pytest.raises(Forbidden):
            authorize("/headrace.registry.v1.RegistryService/PromoteModel", caller, ACCESS)
        with pytest.raises(Forbidden):
            authorize("/headrace.registry.v1.RegistryService/GetVersion", caller, ACCESS)


def test_every_error_of_the_domain_has_its_kind() -> None:
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, DomainError) and c is not DomainError}
    assert set(KINDS) == classes
    for cls in classes - {DeliveryInvalid}:
        with pytest.raises(HeadraceError, match="why") as caught, told():
            raise cls("why")
        assert type(caught.value) is KINDS[cls]


def test_an_invalid_file_keeps_its_lines() -> None:
    with pytest.raises(Invalid) as caught, told():
        raise DeliveryInvalid([Problem("serve.b", "second", 9), Problem("serve.a", "first", 3)])
    assert caught.value.violations == (Violation("serve.a", "first", 3), Violation("serve.b", "second", 9))
    assert "line 3, serve.a: first" in str(caught.value)


def test_webhooks_need_a_secret() -> None:
    def given(url: str, secret: str) -> RegistrySettings:
        return RegistrySettings(webhook_url=url, webhook_secret=secret)  # type: ignore[arg-type]  # pydantic makes it secret

    assert given("https://example.com/hook", "0123456789abcdef").webhook_url
    for url, secret in (("https://example.com", "short"), ("ftp://example.com", "0123456789abcdef")):
        with pytest.raises(ValidationError):
            given(url, secret)
