"""The life of a version: examples of each way it can go, and what holds whichever way it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from registry.domain.approvals import Approval, ApprovalStatus, Vote
from registry.domain.catalogued import Registration
from registry.domain.errors import DomainError, Malformed, Missing, NotAllowed, Refused, TooLarge
from registry.domain.events import ModelApprovalRequested, ModelArchived, ModelPromoted, ModelReevaluationRequested, ModelRegistered
from registry.domain.models import CHAMPION, By, Model, Policy
from registry.domain.versions import Deliverable, Evidence, Journey, Judgement, Origin, Stage, Version
from servicekit.clock import SequentialIds

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = UUID(int=7)
OPEN = Policy("flights", needed=0)
ASK_ONE = Policy("flights", needed=1)
ASK_TWO = Policy("flights", needed=2)
EVENT = By("event:eval.passed:1", NOW)
ANN = By("ann", NOW, "because", person=True)
TRACE = "00-00000000000000000000000000000001-0000000000000001-01"

new_id = SequentialIds().uuid7


def judged(run: str, champion: int = 0, evaluation: str = "", sha: str = "", champion_sha: str = "", author: str = "author") -> Judgement:
    sha = sha or f"sha-{run}"
    return Judgement(
        model="flights",
        journey=Journey(f"journey-{run}", "flights", 1, run),
        candidate=Deliverable("model", "onnx", sha, 10, f"blobs/{sha}", b"encoded"),
        evidence=Evidence(evaluation or f"eval-{run}-{champion}", champion, champion_sha, "report"),
        author=author,
        provenance={"run": run, "champion": champion},
    )


def new_model() -> Model:
    return Model(MODEL, "flights", NOW)


def with_champion() -> Model:
    """v1 in production."""
    model = new_model()
    model.passed(judged("r1"), OPEN, EVENT, new_id, TRACE)
    model.completed(1, "done", EVENT)
    return forget(model)


def forget(model: Model) -> Model:
    """As if it had been stored and loaded again."""
    model.events.clear()
    model.audits.clear()
    model.requested.clear()
    return model


def kinds(model: Model) -> list[type]:
    return [type(event) for _, event, _ in model.events]


def pending(model: Model) -> list[Approval]:
    return [approval for approval in model.approvals.values() if approval.status is ApprovalStatus.PENDING]


def test_a_first_pass_is_registered_and_promoted_at_once() -> None:
    model = new_model()
    version = model.passed(judged("r1"), OPEN, EVENT, new_id, TRACE)
    assert (version.number, version.stage, version.rolling_out, version.reason) == (1, Stage.STAGING, True, "rolling out")
    assert kinds(model) == [ModelRegistered, ModelPromoted]
    assert [sequence for sequence, _, _ in model.events] == [1, 2]
    promoted = model.events[1][1]
    assert isinstance(promoted, ModelPromoted)
    assert (promoted.endpoint, promoted.champion_version, promoted.evaluation_id) == ("flights", 0, "eval-r1-0")
    assert promoted.deliverable.encoded == b"encoded"
    assert [audit.action for audit in model.audits] == ["version.register", "version.promote"]


def test_completion_crowns_and_archives_the_one_before() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.completed(2, "in production", EVENT)
    assert model.champion == 2
    assert model.versions[2].stage is Stage.PRODUCTION
    assert not model.versions[2].rolling_out
    assert model.versions[1].stage is Stage.ARCHIVED
    assert model.versions[1].reason == "replaced by version 2"
    assert kinds(model) == [ModelRegistered, ModelPromoted, ModelArchived]
    assert model.aliases_of(2) == (CHAMPION,)
    assert model.aliases_of(1) == ()
    forget(model).completed(2, "again", EVENT)
    assert not model.events
    assert not model.audits


@pytest.mark.parametrize(("harm", "stage", "archived"), [(True, Stage.ARCHIVED, True), (False, Stage.STAGING, False)])
def test_harm_archives_and_any_other_end_goes_back_to_staging(harm: bool, stage: Stage, archived: bool) -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.progressed(2, "canary with 5 % of the traffic", EVENT)
    assert model.versions[2].reason == "rolling out: canary with 5 % of the traffic"
    assert model.versions[2].stage is Stage.STAGING
    model.rolled_back(2, harm, "why", EVENT)
    assert (model.versions[2].stage, model.versions[2].reason, model.versions[2].rolling_out) == (stage, "why", False)
    assert (ModelArchived in kinds(model)) is archived
    assert model.champion == 1
    assert model.versions[1].stage is Stage.PRODUCTION


def test_reverting_gives_stage_and_alias_back() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.completed(2, "done", EVENT)
    model.reverted(2, 1, "pager", EVENT)
    assert model.champion == 1
    assert model.versions[1].stage is Stage.PRODUCTION
    assert model.versions[1].reason == "back in production: the rollout of version 2 was reverted"
    assert model.versions[2].stage is Stage.ARCHIVED
    assert model.versions[2].reason == "reverted to version 1: pager"
    forget(model).reverted(2, 1, "pager", EVENT)
    assert not model.audits


def test_contradictions_are_refused() -> None:
    model = with_champion()
    with pytest.raises(Refused, match="reverted, not rolled back"):
        model.rolled_back(1, True, "x", EVENT)
    with pytest.raises(Refused):
        model.superseded(1, 2, EVENT)
    with pytest.raises(Missing):
        model.completed(9, "x", EVENT)
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    with pytest.raises(Refused, match="not the champion"):
        model.reverted(2, 2, "x", EVENT)


def test_the_same_run_and_file_is_never_a_second_version() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    forget(model).passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    assert (model.latest, model.events, model.audits) == (1, [], [])
    model.passed(judged("r1", sha="another file"), ASK_ONE, EVENT, new_id, TRACE)
    assert model.latest == 2


def test_a_changed_champion_asks_for_reevaluation_which_renews_the_evidence_and_proceeds() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.completed(2, "done", EVENT)
    forget(model)
    version = model.passed(judged("r3", champion=1), OPEN, EVENT, new_id, TRACE)
    assert kinds(model) == [ModelRegistered, ModelReevaluationRequested]
    asked = model.events[1][1]
    assert isinstance(asked, ModelReevaluationRequested)
    assert (asked.champion_version, asked.evaluation_id, asked.journey.run_id) == (2, "eval-r3-1", "r3")
    assert version.stage is Stage.STAGING
    assert "judged against version 1, but the champion is version 2" in version.reason
    again = forget(model).passed(judged("r3", champion=2), OPEN, EVENT, new_id, TRACE)
    assert again.number == version.number == 3
    assert again.evidence.champion_version == 2
    assert again.provenance["champion"] == 2
    assert kinds(model) == [ModelPromoted]


def test_a_champion_of_the_same_number_and_another_file_is_another_champion() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1, champion_sha="not what v1 is"), OPEN, EVENT, new_id, TRACE)
    assert kinds(model) == [ModelRegistered, ModelReevaluationRequested]
    model.passed(judged("r4", champion=1, champion_sha="sha-r1"), OPEN, EVENT, new_id, TRACE)
    assert kinds(model)[-1] is ModelPromoted


def test_a_failed_reevaluation_leaves_the_version_with_the_reason() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    model.failed("r1", judged("r1").candidate, "eval-2", "evaluated again and failed: worse", EVENT)
    assert model.versions[1].reason == "evaluated again and failed: worse"
    assert pending(model) == []
    forget(model).failed("unknown run", None, "e", "x", EVENT)
    assert not model.audits


def asked(model: Model) -> list[tuple[str, int]]:
    """Evaluation and champion of every request to judge again."""
    events = [event for _, event, _ in model.events]
    return [(one.evaluation_id, one.champion_version) for one in events if isinstance(one, ModelReevaluationRequested)]


def failed_against_version_2() -> Model:
    """v3 passed against v1 and, after v2 had become champion, failed against that."""
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.completed(2, "done", EVENT)
    model.passed(judged("r3", champion=1), OPEN, EVENT, new_id, TRACE)
    model.failed("r3", judged("r3").candidate, "eval-again", "evaluated again and failed: worse", EVENT)
    return forget(model)


def test_each_request_to_judge_again_names_the_newest_evaluation() -> None:
    model = failed_against_version_2()
    model.promote(3, OPEN, ANN, new_id)
    assert asked(model) == [("eval-again", 2)]
    model.failed("r3", judged("r3").candidate, "eval-third", "evaluated again and failed: worse", EVENT)
    forget(model).promote(3, OPEN, ANN, new_id)
    assert asked(model) == [("eval-third", 2)]
    forget(model).passed(judged("r3", champion=2, evaluation="eval-fourth"), OPEN, EVENT, new_id, TRACE)
    assert kinds(model) == [ModelPromoted]


def test_what_failed_is_not_promoted_on_an_older_pass_when_that_champion_is_back() -> None:
    model = failed_against_version_2()
    model.reverted(2, 1, "pager", EVENT)
    forget(model)
    version = model.promote(3, OPEN, ANN, new_id)
    assert kinds(model) == [ModelReevaluationRequested]
    assert not version.rolling_out
    assert version.reason == "its last evaluation did not pass: evaluated again"


@pytest.mark.parametrize("evaluation", ["eval-again", ""])
def test_what_failed_while_it_rolled_out_is_judged_again_before_it_may_go_on(evaluation: str) -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.failed("r2", None, evaluation, "not evaluated again: no model", EVENT)
    assert model.versions[2].rolling_out
    model.rolled_back(2, False, "deadline", EVENT)
    forget(model).promote(2, OPEN, ANN, new_id)
    assert asked(model) == [(evaluation or "eval-r2-1", 1)]


def test_what_passed_while_it_rolled_out_is_replaced_by_the_next_evaluation() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=0), OPEN, EVENT, new_id, TRACE)
    model.promote(2, OPEN, ANN, new_id, override=True)
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.rolled_back(2, False, "deadline", EVENT)
    forget(model).promote(2, OPEN, ANN, new_id)
    assert asked(model) == [("eval-r2-1", 1)]


def test_a_pass_for_a_version_that_is_out_is_only_recorded() -> None:
    model = with_champion()
    model.passed(judged("r1", champion=1, evaluation="later"), OPEN, EVENT, new_id, TRACE)
    assert kinds(model) == []
    assert [audit.reason for audit in model.audits] == ["passed again, but stands in Production"]
    assert model.versions[1].evidence.evaluation_id == "eval-r1-0"


def vote(model: Model, who: str, approve: bool = True, comment: str = "", policy: Policy = ASK_TWO) -> Approval:
    approval = pending(model)[0]
    return model.vote(approval.approval_id, Vote(who, approve, comment, NOW), policy, By(who, NOW, person=True), new_id)


def test_approvals_are_waited_for_and_then_promote() -> None:
    model = new_model()
    version = model.passed(judged("r1"), ASK_TWO, EVENT, new_id, TRACE)
    assert version.reason == "waits for 2 approvals"
    assert kinds(model) == [ModelRegistered, ModelApprovalRequested]
    assert [request.needed for request in model.requested] == [2]
    vote(model, "bob")
    assert model.versions[1].reason == "waits for 1 approval"
    assert vote(model, "bob").votes[0].subject == "bob"  # the same vote again
    with pytest.raises(Refused, match="voted already"):
        vote(model, "bob", approve=False)
    with pytest.raises(NotAllowed):
        vote(model, "author")
    approval = vote(model, "cid")
    assert approval.status is ApprovalStatus.APPROVED
    assert model.versions[1].rolling_out
    sequence, promoted, traceparent = model.events[-1]
    assert isinstance(promoted, ModelPromoted)
    assert (sequence, promoted.promoted_by, traceparent) == (3, "cid", TRACE)


def test_a_rejection_stays_until_evaluated_again() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_TWO, EVENT, new_id, TRACE)
    vote(model, "bob", approve=False, comment="smells")
    assert model.versions[1].reason == "rejected by bob: smells"
    with pytest.raises(Refused, match="rejected by bob"):
        model.promote(1, ASK_TWO, ANN, new_id)
    model.passed(judged("r1", evaluation="another"), ASK_TWO, EVENT, new_id, TRACE)
    assert len(pending(model)) == 1


def test_a_newer_pass_withdraws_older_requests_and_an_older_one_waits() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    model.passed(judged("r2"), ASK_ONE, EVENT, new_id, TRACE)
    assert [request.version for request in pending(model)] == [2]
    assert model.versions[1].reason == "version 2 is newer"
    version = model.promote(1, ASK_ONE, ANN, new_id)
    assert version.reason == "version 2 is newer and waits for approval"
    assert [request.version for request in pending(model)] == [2]


def test_a_new_champion_withdraws_requests_that_were_judged_by_the_old_one() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.passed(judged("r3", champion=1), ASK_ONE, EVENT, new_id, TRACE)
    forget(model).completed(2, "done", EVENT)
    assert pending(model) == []
    assert kinds(model) == [ModelArchived, ModelReevaluationRequested]
    assert model.versions[3].stage is Stage.STAGING


def test_approval_of_a_stale_judgement_asks_for_reevaluation() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), ASK_ONE, EVENT, new_id, TRACE)
    model.champion = 0  # as if a revert had come between
    forget(model)
    vote(model, "bob", policy=ASK_ONE)
    assert kinds(model) == [ModelReevaluationRequested]


def test_superseded_goes_back_to_staging_and_is_judged_again_when_the_champion_changed() -> None:
    model = with_champion()
    for run in ("r2", "r3", "r4"):
        model.passed(judged(run, champion=1), OPEN, EVENT, new_id, TRACE)
    forget(model).superseded(2, 4, EVENT)
    assert (model.versions[2].stage, model.versions[2].reason, model.versions[2].rolling_out) == (
        Stage.STAGING,
        "superseded by version 4",
        False,
    )
    assert kinds(model) == []
    model.completed(4, "done", EVENT)
    forget(model).superseded(3, 4, EVENT)
    assert kinds(model) == [ModelReevaluationRequested]


def test_an_alarm_about_the_champion_is_noted_and_moves_nothing() -> None:
    model = with_champion()
    forget(model).alarmed(1, "error: bad are 9.0 % of 400", EVENT)
    assert (model.versions[1].stage, model.versions[1].reason) == (
        Stage.PRODUCTION,
        "in production, with an alarm: error: bad are 9.0 % of 400",
    )
    assert [audit.action for audit in model.audits] == ["version.alarm"]
    assert kinds(model) == []
    # One that is champion no longer has another end to tell of.
    model.passed(judged("r2", champion=1), OPEN, EVENT, new_id, TRACE)
    model.completed(2, "done", EVENT)
    forget(model).alarmed(1, "late", EVENT)
    assert not model.audits


@pytest.mark.parametrize("policy", [Policy("flights", 0, "the delivery flights was deleted"), Policy("", 0)])
def test_an_obstacle_keeps_a_version_in_staging(policy: Policy) -> None:
    model = new_model()
    version = model.passed(judged("r1"), policy, EVENT, new_id, TRACE)
    assert kinds(model) == [ModelRegistered]
    assert version.reason in ("the delivery flights was deleted", "the delivery serves no endpoint")
    with pytest.raises(Refused):
        model.promote(1, policy, ANN, new_id, override=True)


def test_promotion_by_hand_passes_the_same_gates_and_override_does_not() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=0), ASK_ONE, EVENT, new_id, TRACE)
    assert "evaluated again" in model.promote(2, ASK_ONE, ANN, new_id).reason
    forget(model)
    version = model.promote(2, ASK_ONE, ANN, new_id, override=True)
    assert version.rolling_out
    ((_, event, _),) = model.events
    assert isinstance(event, ModelPromoted)
    # No verdict binds it, so the deployer must not take one for out of date.
    assert event.override
    assert model.audits[-1].after["override"] is True
    assert model.audits[-1].reason == "because"
    assert forget(model).promote(2, ASK_ONE, ANN, new_id) == version  # on its way already
    assert not model.audits
    with pytest.raises(Refused, match="champion already"):
        model.promote(1, OPEN, ANN, new_id)


def test_only_staging_is_promoted_unless_overridden() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    model.set_stage(1, Stage.ARCHIVED, ANN)
    assert pending(model) == []
    with pytest.raises(Refused, match="only a version in Staging"):
        model.promote(1, OPEN, ANN, new_id)
    assert model.promote(1, ASK_ONE, ANN, new_id, override=True).stage is Stage.STAGING


def test_stages_by_hand() -> None:
    model = with_champion()
    model.passed(judged("r2", champion=1), ASK_ONE, EVENT, new_id, TRACE)
    forget(model)
    assert model.set_stage(2, Stage.DEVELOPMENT, ANN).reason == "because"
    assert model.set_stage(2, Stage.ARCHIVED, ANN).stage is Stage.ARCHIVED
    assert kinds(model) == [ModelArchived]
    rows = len(model.audits)
    model.set_stage(2, Stage.ARCHIVED, ANN)
    assert len(model.audits) == rows
    with pytest.raises(Refused, match="promotion"):
        model.set_stage(2, Stage.PRODUCTION, ANN)
    with pytest.raises(Refused, match="is the champion"):
        model.set_stage(1, Stage.ARCHIVED, ANN)
    model.passed(judged("r3", champion=1), OPEN, EVENT, new_id, TRACE)
    with pytest.raises(Refused, match="abort the rollout"):
        model.set_stage(3, Stage.ARCHIVED, ANN)


def test_aliases() -> None:
    model = with_champion()
    model.set_alias("blue", 1, ANN)
    model.set_alias("blue", 1, ANN)
    assert len(model.audits) == 1
    assert model.aliases_of(1) == (CHAMPION, "blue")
    for wrong in ("latest", "Latest", "v3", "V3", "", "a/b", "a" * 256, "a b", "a\x00", "Champion", "\ud800"):
        with pytest.raises((Malformed, TooLarge)):
            model.set_alias(wrong, 1, ANN)
    with pytest.raises(Refused):
        model.set_alias(CHAMPION, 1, ANN)
    with pytest.raises(Refused):
        model.delete_alias(CHAMPION, ANN)
    model.delete_alias("blue", ANN)
    model.delete_alias("blue", ANN)
    assert [audit.action for audit in model.audits] == ["alias.set", "alias.delete"]
    for right in ("1a", "a" * 255, "Blue", "grün"):
        assert model.set_alias(right, 1, ANN).number == 1
    with pytest.raises(Missing):
        model.set_alias("blue", 9, ANN)


def test_a_deleted_delivery_withdraws_its_requests() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    model.delivery_changed("another", "x", ANN)
    assert len(pending(model)) == 1
    model.delivery_changed("flights", "the delivery flights was deleted", ANN)
    assert pending(model) == []
    assert model.versions[1].reason == "the delivery flights was deleted"


def test_an_unknown_approval_and_a_long_comment() -> None:
    model = new_model()
    model.passed(judged("r1"), ASK_ONE, EVENT, new_id, TRACE)
    with pytest.raises(Missing):
        model.vote(UUID(int=99), Vote("bob", True, "", NOW), ASK_ONE, ANN, new_id)
    with pytest.raises(Malformed):
        vote(model, "bob", comment="x" * 3000)


class Life(RuleBasedStateMachine):
    """Everything that can happen to a model, in any order; refusals are fine, broken promises are not."""

    def __init__(self) -> None:
        super().__init__()
        self.model = new_model()
        self.runs = 0
        self.at = NOW
        self.ids = SequentialIds()
        self.born: dict[int, Version] = {}
        self.decided: dict[UUID, ApprovalStatus] = {}
        self.by_event = True

    def attempt(self, act: Callable[[By], Any]) -> None:
        """Does it as the handlers would: a refusal leaves nothing behind."""
        before = (dict(self.model.versions), dict(self.model.approvals), self.model.champion, self.model.latest, self.model.sequence)
        others = (self.model.previous, dict(self.model.aliases))
        rows = (len(self.model.audits), len(self.model.events))
        self.at += timedelta(seconds=1)
        try:
            act(By("event:x:1" if self.by_event else "ann", self.at, person=not self.by_event))
        except DomainError:
            self.model.versions, self.model.approvals = before[0], before[1]
            self.model.champion, self.model.latest, self.model.sequence = before[2:]
            self.model.previous, self.model.aliases = others
            del self.model.audits[rows[0] :]
            del self.model.events[rows[1] :]
            return
        stages_changed = sum(
            before[0].get(n, replace(v, stage=Stage.DEVELOPMENT)).stage is not v.stage for n, v in self.model.versions.items()
        )
        assert len(self.model.audits) - rows[0] >= stages_changed, "a stage changed without a row in the audit log"
        if (dict(self.model.versions), dict(self.model.approvals), self.model.champion) != before[:3]:
            assert len(self.model.audits) > rows[0], "something changed without a row in the audit log"

    def some(self, pick: int) -> int:
        return pick % self.model.latest + 1

    @rule(fresh=st.booleans(), stale=st.booleans(), needed=st.integers(0, 2), blocked=st.booleans())
    def passes(self, fresh: bool, stale: bool, needed: int, blocked: bool) -> None:
        if fresh or not self.runs:
            self.runs += 1
        champion = max(self.model.champion - 1, 0) if stale else self.model.champion
        judgement = judged(f"r{self.runs}", champion, evaluation=f"e{self.at}")
        policy = Policy("flights", needed, "deleted" if blocked else "")
        self.attempt(lambda by: self.model.passed(judgement, policy, by, self.ids.uuid7, TRACE))

    @rule(later=st.booleans(), path=st.sampled_from(["model", "other"]))
    def registers(self, later: bool, path: str) -> None:
        run_id = f"r{self.runs + later}"
        asked = Registration(run_id, Origin(source=f"runs:/{run_id}/{path}", path=path, registered_by="zoe"), "", {})
        self.attempt(lambda by: self.model.register(asked, by))

    @precondition(lambda self: self.model.latest)
    @rule(pick=st.integers(0, 99))
    def deletes(self, pick: int) -> None:
        self.attempt(lambda by: self.model.delete_version(self.some(pick), by))

    @precondition(lambda self: self.model.latest)
    @rule(pick=st.integers(0, 99))
    def names(self, pick: int) -> None:
        self.attempt(lambda by: self.model.set_alias("blue", self.some(pick), by))

    @precondition(lambda self: self.model.latest)
    @rule(pick=st.integers(0, 99))
    def fails(self, pick: int) -> None:
        self.attempt(lambda by: self.model.failed(self.model.version(self.some(pick)).journey.run_id, None, "e", "failed", by))

    @precondition(lambda self: self.model.latest)
    @rule(pick=st.integers(0, 99), override=st.booleans(), needed=st.integers(0, 1))
    def promotes(self, pick: int, override: bool, needed: int) -> None:
        self.attempt(lambda by: self.model.promote(self.some(pick), Policy("flights", needed), by, self.ids.uuid7, override))

    @precondition(lambda self: self.model.approvals)
    @rule(pick=st.integers(0, 99), who=st.sampled_from(["author", "bob", "cid"]), approve=st.booleans(), needed=st.integers(1, 2))
    def votes(self, pick: int, who: str, approve: bool, needed: int) -> None:
        approval_id = sorted(self.model.approvals)[pick % len(self.model.approvals)]
        self.attempt(
            lambda by: self.model.vote(approval_id, Vote(who, approve, "", self.at), Policy("flights", needed), by, self.ids.uuid7)
        )

    @precondition(lambda self: self.model.latest)
    @rule(pick=st.integers(0, 99), stage=st.sampled_from(list(Stage)))
    def moves(self, pick: int, stage: Stage) -> None:
        self.attempt(lambda by: self.model.set_stage(self.some(pick), stage, by))

    @precondition(lambda self: any(version.rolling_out for version in self.model.versions.values()))
    @rule(pick=st.integers(0, 99), end=st.sampled_from(["progress", "complete", "harm", "deadline", "superseded"]))
    def ends(self, pick: int, end: str) -> None:
        rolling = [number for number, version in self.model.versions.items() if version.rolling_out]
        number = rolling[pick % len(rolling)]
        what: dict[str, Callable[[By], None]] = {
            "progress": lambda by: self.model.progressed(number, "5 %", by),
            "complete": lambda by: self.model.completed(number, "done", by),
            "harm": lambda by: self.model.rolled_back(number, True, "harm", by),
            "deadline": lambda by: self.model.rolled_back(number, False, "deadline", by),
            "superseded": lambda by: self.model.superseded(number, self.model.latest, by),
        }
        self.attempt(what[end])

    @precondition(lambda self: self.model.champion)
    @rule(pick=st.integers(0, 99))
    def reverts(self, pick: int) -> None:
        self.attempt(lambda by: self.model.reverted(self.model.champion, self.some(pick), "pager", by))

    @invariant()
    def exactly_the_champion_is_in_production(self) -> None:
        in_production = [number for number, version in self.model.versions.items() if version.stage is Stage.PRODUCTION]
        assert in_production == ([self.model.champion] if self.model.champion else [])

    @invariant()
    def only_staging_rolls_out(self) -> None:
        assert all(version.stage is Stage.STAGING for version in self.model.versions.values() if version.rolling_out)

    @invariant()
    def what_a_version_is_never_changes(self) -> None:
        for number, version in self.model.versions.items():
            if not self.born.get(number, version).evaluated:
                self.born[number] = version  # its file and author come with its evaluation
            first = self.born.setdefault(number, version)
            assert (first.number, first.deliverable, first.journey.run_id, first.author, first.created_at) == (
                version.number,
                version.deliverable,
                version.journey.run_id,
                version.author,
                version.created_at,
            )
        assert sorted(self.model.versions) == list(range(1, self.model.latest + 1))

    @invariant()
    def no_two_versions_are_the_same_file_of_the_same_run(self) -> None:
        made_of = [(version.journey.run_id, version.deliverable.sha256) for version in self.model.versions.values() if version.evaluated]
        assert len(set(made_of)) == len(made_of)

    @invariant()
    def only_what_has_passed_an_evaluation_goes_anywhere(self) -> None:
        for version in self.model.versions.values():
            assert version.evaluated or not (version.rolling_out or version.stage is Stage.PRODUCTION)

    @invariant()
    def what_is_served_or_may_be_again_is_not_deleted(self) -> None:
        for number, version in self.model.versions.items():
            if version.deleted:
                assert not version.rolling_out
                assert number not in (self.model.champion, self.model.previous)
                assert number not in self.model.aliases.values()

    @invariant()
    def events_count_without_gaps(self) -> None:
        assert [sequence for sequence, _, _ in self.model.events] == list(range(1, self.model.sequence + 1))

    @invariant()
    def one_request_is_pending_at_most_and_of_a_version_in_staging(self) -> None:
        waiting = pending(self.model)
        assert len(waiting) <= 1
        for request in waiting:
            version = self.model.versions[request.version]
            assert version.stage is Stage.STAGING
            assert not version.rolling_out
            assert request.evaluation_id == version.evidence.evaluation_id

    @invariant()
    def what_was_decided_stays_decided(self) -> None:
        for approval_id, approval in self.model.approvals.items():
            earlier = self.decided.setdefault(approval_id, approval.status)
            assert earlier in (ApprovalStatus.PENDING, approval.status)
            self.decided[approval_id] = approval.status
            assert "author" not in [given.subject for given in approval.votes]

    @invariant()
    def nothing_is_promoted_but_from_staging_through_a_gate(self) -> None:
        for _, event, _ in self.model.events:
            if isinstance(event, ModelPromoted):
                assert event.endpoint == "flights"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
