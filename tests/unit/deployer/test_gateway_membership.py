"""Which gateways count as members, what they have acknowledged, and which messages show that others were lost."""

from __future__ import annotations

from deployer.domain.membership import ALIVE_S, SETTLE_S, VANISHED_S, Membership


def heard(
    membership: Membership, name: str, sequence: int, now: float, revision: int = 1, boot: str = "b1", leaving: bool = False
) -> bool | None:
    return membership.heard(name, boot, sequence, {"e": revision}, leaving, now)


def test_a_message_lost_repeated_or_after_a_restart() -> None:
    membership = Membership(0.0)
    assert heard(membership, "a", 5, 1.0) is False
    assert heard(membership, "a", 6, 2.0) is False
    assert heard(membership, "a", 6, 2.1) is None
    assert heard(membership, "a", 4, 2.2) is None
    assert heard(membership, "a", 8, 3.0) is True
    assert heard(membership, "a", 1, 4.0, boot="b2") is True
    assert heard(membership, "a", 2, 5.0, boot="b2") is False


def test_nothing_is_acknowledged_before_all_members_can_be_known() -> None:
    membership = Membership(100.0)
    heard(membership, "a", 1, 100.5)
    assert not membership.acknowledged("e", 1, 100.5)
    assert membership.acknowledged("e", 1, 100.0 + SETTLE_S)


def test_every_member_must_serve_the_revision_or_a_later_one() -> None:
    membership = Membership(0.0)
    heard(membership, "a", 1, 5.0, revision=3)
    heard(membership, "b", 1, 5.0, revision=2)
    assert membership.acknowledged("e", 2, 5.0)
    assert not membership.acknowledged("e", 3, 5.0)
    heard(membership, "b", 2, 6.0, revision=4)
    assert membership.acknowledged("e", 3, 6.0)
    assert not membership.acknowledged("other", 1, 6.0)


def test_a_gateway_that_left_is_not_waited_for() -> None:
    membership = Membership(0.0)
    heard(membership, "a", 1, 5.0, revision=3)
    heard(membership, "b", 1, 5.0, revision=2)
    heard(membership, "b", 2, 6.0, leaving=True)
    assert membership.acknowledged("e", 3, 6.0)
    assert membership.vanished(6.0 + ALIVE_S + 1) == {"a"}


def test_nobody_is_not_everybody() -> None:
    membership = Membership(0.0)
    assert not membership.acknowledged("e", 1, 60.0)
    # Taking traffic away may rest on nobody being there, unless somebody was and fell silent.
    assert membership.acknowledged("e", 1, 60.0, anyone=False)
    heard(membership, "a", 1, 61.0)
    assert membership.vanished(61.0) == frozenset()
    silent = 61.0 + ALIVE_S + 0.1
    assert membership.alive(silent) == frozenset()
    assert membership.vanished(silent) == {"a"}
    assert not membership.acknowledged("e", 1, silent, anyone=False)
    assert membership.acknowledged("e", 1, 61.0 + VANISHED_S + 1, anyone=False)


def test_only_members_that_know_an_endpoint_report_it() -> None:
    membership = Membership(0.0)
    heard(membership, "a", 1, 5.0)
    membership.heard("b", "b1", 1, {"other": 1}, False, 5.0)
    assert membership.alive(5.0) == {"a", "b"}
    assert membership.reporting("e", 5.0) == {"a"}
