"""Deny by default: who is believed to be whom, and what the access table lets them do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicekit import access, runtoken
from servicekit.access import ANYONE, Caller, Rule
from servicekit.clock import SequentialIds, SystemIds
from servicekit.errors import Forbidden, Unauthenticated

METHOD = "/headrace.tracker.v1.TrackerService/CreateRun"
TABLE = {METHOD: Rule(services={"gateway", "trainer"}, roles={"editor", "admin"})}
GATEWAY_TOKEN, GATEWAY_HASH = access.new_service_token("gateway")
TRAINER_TOKEN, TRAINER_HASH = access.new_service_token("trainer")
HASHES = {"gateway": GATEWAY_HASH, "trainer": TRAINER_HASH}


def test_a_service_proves_itself_by_its_token() -> None:
    assert access.identify({"authorization": f"Bearer {TRAINER_TOKEN}"}, HASHES) == Caller(service="trainer")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer trainer.",
        f"Bearer {TRAINER_TOKEN}x",
        f"Basic {TRAINER_TOKEN}",
        f"Bearer gateway.{TRAINER_TOKEN.partition('.')[2]}",
        f"Bearer nobody.{TRAINER_TOKEN}",
    ],
)
def test_anything_else_is_nobody(authorization: str) -> None:
    with pytest.raises(Unauthenticated):
        access.identify({"authorization": authorization}, HASHES)


def test_without_hashes_nobody_may_call() -> None:
    with pytest.raises(Unauthenticated):
        access.identify({"authorization": f"Bearer {TRAINER_TOKEN}"}, {})


@given(
    subject=st.text("abcdefghij@.-", min_size=1),
    roles=st.frozensets(st.sampled_from(["viewer", "editor", "approver", "admin", "run"])),
    run=st.none() | st.tuples(st.text("0123456789abcdef", min_size=32, max_size=32), st.integers(0, 2**62)),
)
def test_the_gateway_passes_its_user_on(subject: str, roles: frozenset[str], run: tuple[str, int] | None) -> None:
    caller = Caller("gateway", subject, roles, *(run or (None, None)))
    metadata = dict(access.identity_metadata(caller)) | {"authorization": f"Bearer {GATEWAY_TOKEN}"}
    assert access.identify(metadata, HASHES) == caller


def test_only_the_gateway_is_believed_about_users() -> None:
    metadata = dict(access.identity_metadata(Caller("gateway", "eve", frozenset({"admin"}), "f" * 32, 7)))
    caller = access.identify(metadata | {"authorization": f"Bearer {TRAINER_TOKEN}"}, HASHES)
    assert caller == Caller(service="trainer")


@pytest.mark.parametrize(
    ("method", "caller", "allowed"),
    [
        (METHOD, Caller("trainer"), True),
        (METHOD, Caller("deployer"), False),
        (METHOD, Caller("gateway", "ann", frozenset({"editor"})), True),
        (METHOD, Caller("gateway", "ann", frozenset({"viewer"})), False),
        (METHOD, Caller("gateway", "ann", frozenset()), False),
        (METHOD, Caller("gateway", "", frozenset({"admin"})), False),
        ("/headrace.tracker.v1.TrackerService/Unlisted", Caller("trainer"), False),
    ],
)
def test_the_table_decides(method: str, caller: Caller, allowed: bool) -> None:
    if allowed:
        access.authorize(method, caller, TABLE)
    else:
        with pytest.raises(Forbidden):
            access.authorize(method, caller, TABLE)


VIA_GATEWAY = {"gateway", "trainer"}
PERSON, NOBODY_SPECIAL = Caller("gateway", "ann", frozenset({"viewer"})), Caller("gateway", "bob")
RUN = Caller("gateway", "run:r", run_id="r", fencing_token=1)


@pytest.mark.parametrize(
    ("rule", "admitted"),
    [
        (Rule(VIA_GATEWAY), []),  # says nothing of people, so none may
        (Rule(VIA_GATEWAY, {"viewer"}), [PERSON]),
        (Rule(VIA_GATEWAY, ANYONE), [PERSON, NOBODY_SPECIAL]),
        (Rule(VIA_GATEWAY, runs=True), [RUN]),
        (Rule(VIA_GATEWAY, ANYONE, runs=True), [PERSON, NOBODY_SPECIAL, RUN]),
    ],
)
def test_a_rule_lets_in_whom_it_names(rule: Rule, admitted: list[Caller]) -> None:
    assert [caller for caller in (PERSON, NOBODY_SPECIAL, RUN) if rule.admits(caller)] == admitted
    for caller in (PERSON, NOBODY_SPECIAL, RUN):
        if caller in admitted:
            access.authorize(METHOD, caller, {METHOD: rule})
        else:
            with pytest.raises(Forbidden):
                access.authorize(METHOD, caller, {METHOD: rule})
    assert rule.admits(Caller("trainer"))
    assert not rule.admits(Caller("gateway"))  # on nobody's behalf
    assert not rule.admits(Caller("gateway", "", frozenset({"viewer", "anyone"})))


@pytest.mark.parametrize(
    "wrong",
    [
        {"services": {"gateway"}, "roles": {"edtior"}},
        {"services": {"registry"}, "roles": {"viewer"}},
        {"services": {"registry"}, "runs": True},
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Rule(**wrong)


def test_require_role_lets_services_pass_and_checks_users() -> None:
    access.require_role(Caller("trainer"), "admin")
    access.require_role(Caller("gateway", "ann", frozenset({"admin"})), "approver", "admin")
    with pytest.raises(Forbidden, match="admin or approver"):
        access.require_role(Caller("gateway", "ann", frozenset({"viewer"})), "approver", "admin")


def test_there_is_a_caller_only_within_a_request() -> None:
    with pytest.raises(Unauthenticated):
        access.current_caller()
    with access.as_caller(Caller("trainer")):
        assert access.current_caller() == Caller("trainer")
    with pytest.raises(Unauthenticated):
        access.current_caller()


def test_api_keys() -> None:
    key_id, text, digest = access.new_api_key(SequentialIds())
    assert text.startswith(f"hr_{key_id}_")
    assert access.matches(text, digest)
    assert not access.matches(text + "x", digest)
    assert len({access.new_api_key(SystemIds())[1] for _ in range(100)}) == 100


NOW = datetime(2026, 3, 1, tzinfo=UTC)


def test_a_run_token_says_what_it_was_issued_for() -> None:
    token = runtoken.issue("secret", "a" * 32, 3, NOW + timedelta(hours=1))
    assert token.startswith("hrr_")
    assert runtoken.verify("secret", token, NOW) == runtoken.RunToken("a" * 32, 3, NOW + timedelta(hours=1))


def test_a_run_token_expires_and_needs_its_secret() -> None:
    token = runtoken.issue("secret", "a" * 32, 3, NOW)
    with pytest.raises(Unauthenticated, match="expired"):
        runtoken.verify("secret", token, NOW)
    with pytest.raises(Unauthenticated):
        runtoken.verify("other", token, NOW - timedelta(hours=1))
    with pytest.raises(ValueError, match="secret"):
        runtoken.issue("", "a" * 32, 3, NOW)


@given(st.data())
def test_a_changed_run_token_is_refused(data: st.DataObject) -> None:
    token = runtoken.issue("secret", "a" * 32, 3, NOW + timedelta(hours=1))
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from("abcXYZ019-_.é ").filter(lambda c: c != token[at]))
    changed = token[:at] + other + token[at + 1 :]
    try:
        read = runtoken.verify("secret", changed, NOW)
    except Unauthenticated:
        return
    # The last letter of base64 carries bits that mean nothing: another spelling of the same token, never another meaning.
    assert read == runtoken.verify("secret", token, NOW)


@given(st.text())
def test_no_text_breaks_the_verifier(text: str) -> None:
    for token in (text, "hrr_" + text):
        with pytest.raises(Unauthenticated):
            runtoken.verify("secret", token, NOW)
