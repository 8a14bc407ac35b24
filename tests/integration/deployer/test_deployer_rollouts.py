"""Versions on their way onto an endpoint: what gateways are told, what is told about it, and what stays loaded."""

from __future__ import annotations

from typing import Any

import pytest
from contracts.deployer.v1 import events_pb2 as deploys
from eventing import topics
from eventing.envelope import decode_headers
from servicekit.errors import Conflict


def json_of(content: bytes) -> str:
    return content.decode()


async def test_the_first_version_goes_live_at_once(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    completed = stand.event("deploy.completed", 1)
    assert completed.first
    assert completed.rollout.journey.journey_id == "journey-1"
    assert stand.story(1) == ["deploy.completed"]
    assert gateway.weights() == {1: 10_000}
    assert len(stand.runtime.loaded) == 1
    assert gateway.route().in_rollout


async def test_an_endpoint_comes_to_rest_when_its_watch_is_over(stand: Any) -> None:
    await stand.start()
    await stand.apply(stand.serve(rollback_window="1s"))
    gateway = await stand.gateway()
    await stand.promote(1)
    completed = await stand.ended(1, "deploy.completed")
    # Nobody need watch it any more, and the route says so.
    await stand.eventually(lambda: not gateway.route().in_rollout, "a route at rest")
    record = await stand.deployer().rollout(completed.rollout.rollout_id)
    assert record.rollout.watch.windows > 0
    assert stand.story(1) == ["deploy.completed"]


@pytest.mark.parametrize("first", [True, False])
async def test_a_version_that_turns_bad_after_it_completed_raises_one_alarm_and_stays(stand: Any, first: bool) -> None:
    await stand.start()
    gateway = await stand.live()
    version = 1
    if not first:
        version = 2
        await stand.promote(2)
        await stand.ended(2, "deploy.completed")
    gateway.bad[version] = 0.95
    alarm = await stand.ended(version, "deploy.alarmed")
    assert alarm.reason.startswith("error: bad are ")
    assert alarm.revertible is not first
    await stand.windows(40)
    assert stand.story(version)[-2:] == ["deploy.completed", "deploy.alarmed"]
    assert gateway.weights() == {version: 10_000}
    record, log = await stand.deployer().explain(alarm.rollout.rollout_id, 0, 10_000)
    assert record.rollout.state == "completed"
    assert (log[-1].target, log[-1].reason) == ("completed", f"alarm: {alarm.reason}")
    assert log[-1].evidence["guards"]["error"]["breach"] >= 20
    # The next version is judged, and watched, for itself.
    gateway.bad.clear()
    await stand.promote(version + 1)
    await stand.ended(version + 1, "deploy.completed")


async def test_a_verdict_about_a_champion_that_was_replaced_meanwhile_is_not_acted_on(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0  # version 2 gets no traffic and stays
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    await stand.promote(3)  # judged against version 1, too
    gateway.per_window = 40
    await stand.ended(2, "deploy.completed")
    superseded = await stand.ended(3, "deploy.superseded")
    # By the live version: for the registry that means to have it evaluated again.
    assert (superseded.by_version, superseded.rollout.baseline_version) == (2, 2)
    record, log = await stand.deployer().explain(superseded.rollout.rollout_id, 0, 10_000)
    assert record.rollout.stale
    assert [(row.source, row.target) for row in log] == [("", "waiting"), ("waiting", "superseded")]
    assert log[-1].reason == "judged against version 1, but version 2 is live now: to be evaluated again"
    assert not any("-v3-" in name for _, name in stand.runtime.calls)
    # Promoted again, it was judged against version 2, and nothing is in its way.
    await stand.promote(3, champion=2)
    await stand.ended(3, "deploy.completed")
    assert stand.story(3) == ["deploy.superseded", "deploy.canary", "deploy.advanced", "deploy.completed"]


async def test_when_the_first_rolls_back_the_one_behind_it_proceeds_as_it_is(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    gateway.bad[2] = 0.9
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    await stand.promote(3)
    gateway.per_window = 40
    await stand.ended(2, "deploy.rolled_back")
    completed = await stand.ended(3, "deploy.completed")
    assert completed.rollout.baseline_version == 1
    assert stand.story(3) == ["deploy.canary", "deploy.advanced", "deploy.completed"]


async def test_of_two_first_versions_the_second_waits_for_its_verdict_unless_the_first_fails(stand: Any) -> None:
    await stand.start()
    await stand.apply()
    await stand.gateway()
    stand.runtime.away = True
    stand.runtime.refuses = lambda content: "unsupported opset 99" if "v1" in json_of(content) else None
    await stand.promote(1)
    await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "preparing"), "version 1 to be prepared")
    await stand.promote(2)
    await stand.eventually(lambda: stand.some_rollout(lambda rollout: rollout.state == "waiting"), "version 2 to wait")
    stand.runtime.away = False
    assert (await stand.ended(1, "deploy.rolled_back")).cause == deploys.END_CAUSE_RUNTIME
    assert (await stand.ended(2, "deploy.completed")).first
    await stand.promote(3, champion=0)  # judged at the same time
    assert (await stand.ended(3, "deploy.superseded")).by_version == 2


async def test_an_admin_who_passed_the_gates_by_is_not_asked_again(stand: Any) -> None:
    await stand.start()
    await stand.live()
    await stand.promote(2, champion=0, override=True)
    await stand.ended(2, "deploy.completed")


async def test_a_good_version_walks_through_shadow_and_steps_and_keeps_the_one_before(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    completed = await stand.ended(2, "deploy.completed")
    assert stand.story(2) == ["deploy.canary", "deploy.advanced", "deploy.completed"]
    assert not completed.first
    assert completed.rollout.baseline_version == 1
    assert completed.blob.sha256
    assert gateway.weights() == {2: 10_000}
    weights = [{arm.version: arm.weight_bps for arm in route.arms} for _, route in stand.events(topics.ROUTES)]
    distinct = [w for index, w in enumerate(weights) if index == 0 or weights[index - 1] != w]
    assert distinct == [{1: 10_000}, {1: 10_000, 2: 0}, {1: 9_000, 2: 1_000}, {1: 5_000, 2: 5_000}, {2: 10_000}]
    assert gateway.served[2] >= 140
    # Kept for the rollback window.
    assert len(stand.runtime.loaded) == 2
    # Of an endpoint's arms, of which there are more with every version, only those are read that somebody asks for.
    serving = (await stand.deployer().endpoint(stand.endpoint)).endpoint.serving
    async with stand.deployer()._store.transaction() as work:
        assert set(await work.arms(stand.endpoint, [serving, None])) == {serving}

    record, log = await stand.deployer().explain(completed.rollout.rollout_id, 0, 10_000)
    states = [row.target for row in log if row.reason != "window"]
    assert states[:4] == ["waiting", "preparing", "warming", "shadowing"]
    assert states[-3:] == ["stepping(1)", "completing", "completed"]
    windows = [row for row in log if row.reason == "window"]
    assert windows
    assert windows[-1].evidence["guards"]["error"]["proven"]
    assert record.rollout.evidence.windows == len(windows)
    check_publications(stand)


def check_publications(stand: Any) -> None:
    """One trace from the promotion on; sequences without gaps; revisions and publications that grow."""
    for topic in (topics.DEPLOYS, topics.ROUTES):
        for record in stand.records(topic):
            head = decode_headers(record.headers)
            # A publication that only repeats, or lets the route rest, is nobody's consequence.
            resting = head.type == "route.changed" and not deploys.RouteChanged.FromString(record.value).in_rollout
            assert resting or head.traceparent.split("-")[1] == "0af7651916cd43dd8448eb211c80319c", head
        sequences = stand.sequences_of(topic)
        assert sequences == list(range(1, len(sequences) + 1))
    routes = [route for _, route in stand.events(topics.ROUTES)]
    assert [route.revision for route in routes] == sorted(route.revision for route in routes)
    assert [route.publication for route in routes] == list(range(1, len(routes) + 1))


async def test_a_harmful_version_is_rolled_back_and_unloaded(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.bad[2] = 0.8
    await stand.promote(2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert stand.story(2) == ["deploy.canary", "deploy.rolled_back"]
    assert ended.cause == deploys.END_CAUSE_HARM
    assert "error: the canary is worse" in ended.reason
    assert gateway.weights() == {1: 10_000}
    await stand.eventually(lambda: len(stand.runtime.loaded) == 1, "the canary to be unloaded")


async def test_copies_that_differ_end_the_rollout_before_any_caller_met_it(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.differing[2] = 0.9
    await stand.apply(stand.serve(shadow={"share": 1.0, "requests": 4000}), revision=2)
    await stand.promote(2, revision=2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert stand.story(2) == ["deploy.rolled_back"]
    assert "shadow answers differ" in ended.reason
    assert gateway.served.get(2, 0) == 0


async def test_a_model_that_the_runtime_refuses_leaves_the_traffic_alone(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    before = gateway.route().revision
    stand.runtime.refuses = lambda content: "unsupported opset 99" if "v2" in json_of(content) else None
    await stand.promote(2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert (ended.cause, ended.reason) == (deploys.END_CAUSE_RUNTIME, "unsupported opset 99")
    assert stand.story(2) == ["deploy.rolled_back"]
    assert {route.revision for _, route in stand.events(topics.ROUTES)} <= set(range(before + 2))
    assert gateway.weights() == {1: 10_000}
    # And the next one goes its way.
    await stand.promote(3)
    await stand.ended(3, "deploy.completed")


async def test_a_model_that_takes_too_long_to_load_is_tried_again_a_few_times(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    stand.runtime.slow = 1000
    await stand.promote(2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert ended.cause == deploys.END_CAUSE_RUNTIME
    assert ended.reason.startswith("the runtime has not loaded ")
    assert ended.reason.endswith(", tried 3 times")
    names = [name for kind, name in stand.runtime.calls if kind == "load" and "-v2-" in name]
    assert names == names[:1] * 3
    assert gateway.weights() == {1: 10_000}
    # What it had loaded when nobody waited any more is what the next attempt finds.
    stand.runtime.slow = 2
    await stand.promote(3)
    await stand.ended(3, "deploy.completed")
    assert [kind for kind, name in stand.runtime.calls if "-v3-" in name] == ["load"] * 3


async def test_a_model_that_answers_otherwise_than_where_it_was_trained_is_not_served(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    stand.samples = {"inputs": {"x": [[1.0]]}, "outputs": {"y": [[7.0]]}}
    await stand.promote(2)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert ended.cause == deploys.END_CAUSE_RUNTIME
    assert "otherwise than where it was trained" in ended.reason
    assert gateway.weights() == {1: 10_000}


@pytest.mark.parametrize(("stored", "says"), [(b"", "no"), (b"other bytes", "SHA-256")], ids=["missing", "wrong hash"])
async def test_an_artifact_that_is_missing_or_not_the_one_is_never_deployed(stand: Any, stored: bytes, says: str) -> None:
    await stand.start()
    await stand.live()
    await stand.promote(2, stored=stored)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert ended.cause == deploys.END_CAUSE_ARTIFACT
    assert says in ended.reason
    assert [name for kind, name in stand.runtime.calls if "-v2-" in name] == []


async def test_a_version_in_an_unknown_format_ends_at_once(stand: Any) -> None:
    await stand.start()
    await stand.live()
    await stand.promote(2, model_format="pickle")
    ended = await stand.ended(2, "deploy.rolled_back")
    assert "format 'pickle'" in ended.reason


async def test_the_newest_promoted_version_waits_and_the_ones_between_are_superseded(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0  # version 2 gets no traffic and stays
    await stand.promote(2)
    await stand.eventually(lambda: 2 in gateway.weights(), "version 2 to be shadowed")
    await stand.promote(3)
    await stand.promote(4)
    superseded = await stand.ended(3, "deploy.superseded")
    assert superseded.by_version == 4
    gateway.per_window = 40
    await stand.ended(2, "deploy.completed")
    assert (await stand.ended(4, "deploy.superseded")).by_version == 2
    await stand.promote(4)  # judged again, against version 2
    completed = await stand.ended(4, "deploy.completed")
    assert completed.rollout.baseline_version == 2
    # Version 1 is kept no longer: version 2 is what one would go back to.
    await stand.eventually(lambda: len(stand.runtime.loaded) == 2, "version 1 to be unloaded")


async def test_no_traffic_is_never_success(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    gateway.per_window = 0
    await stand.apply(stand.serve(deadline="1s", shadow=None, guards=[{"bad": "error", "margin": "40%"}]), revision=2)
    await stand.promote(2, revision=2)
    rollout = await stand.held()
    assert "0 of 40 canary requests seen at 10 %" in rollout.reason
    assert gateway.weights() == {1: 9_000, 2: 1_000}
    assert stand.story(2) == ["deploy.canary"]


async def test_operators_pause_resume_abort_and_revert(stand: Any) -> None:
    from deployer.domain.inputs import Abort, Pause, Resume, Revert

    await stand.start()
    gateway = await stand.live()
    deployer = stand.deployer()
    await stand.promote(2)
    canary = await stand.ended(2, "deploy.canary")
    rollout_id = canary.rollout.rollout_id
    paused = await deployer.command(rollout_id, Pause("paused by ann"))
    assert paused.rollout.hold == "paused"
    step = paused.rollout.step
    _, before = await deployer.explain(rollout_id, 0, 10_000)
    judged = paused.rollout.evidence.windows

    async def seen() -> bool:
        return bool((await deployer.rollout(rollout_id)).rollout.evidence.windows >= judged + 20)

    await stand.eventually(seen, "windows while paused")
    held, after = await deployer.explain(rollout_id, 0, 10_000)
    assert held.rollout.step == step
    # Its one guard may be shown to be met meanwhile; nothing else is worth a row.
    assert len(after) <= len(before) + 1
    await deployer.command(rollout_id, Resume("ann"))
    await stand.ended(2, "deploy.completed")
    with pytest.raises(Conflict, match="reverted, not aborted"):
        await deployer.command(rollout_id, Abort("no"))

    await deployer.command(rollout_id, Revert("reverted by ann: worse than thought", 0))
    reverted = await stand.ended(2, "deploy.reverted")
    assert (reverted.to_version, reverted.reason) == (1, "reverted by ann: worse than thought")
    assert reverted.to_blob.sha256
    assert gateway.weights() == {1: 10_000}
    await stand.eventually(lambda: len(stand.runtime.loaded) == 1, "version 2 to be unloaded")

    await stand.promote(3)
    canary = await stand.ended(3, "deploy.canary")
    await deployer.command(canary.rollout.rollout_id, Abort("aborted by ann"))
    ended = await stand.ended(3, "deploy.rolled_back")
    assert (ended.cause, ended.reason) == (deploys.END_CAUSE_OPERATOR, "aborted by ann")
    assert gateway.weights() == {1: 10_000}


async def test_when_the_rollback_window_closes_the_earlier_version_goes(stand: Any) -> None:
    from deployer.domain.inputs import Revert

    await stand.start()
    await stand.live()
    await stand.apply(stand.serve(rollback_window="1s"), revision=2)
    await stand.promote(2, revision=2)
    completed = await stand.ended(2, "deploy.completed")
    await stand.eventually(lambda: len(stand.runtime.loaded) == 1, "version 1 to be unloaded")
    assert "-v2-" in next(iter(stand.runtime.loaded))
    with pytest.raises(Conflict, match="its rollback window is over"):
        await stand.deployer().command(completed.rollout.rollout_id, Revert("too late", 0))


async def test_completed_means_acknowledged_by_every_gateway(stand: Any) -> None:
    await stand.start()
    await stand.live()
    second = await stand.gateway("gateway-2")
    await stand.promote(2)
    await stand.ended(2, "deploy.canary")
    second.deaf = True
    await stand.eventually(lambda: stand.weights_published() == {2: 10_000}, "the completing route")
    for _ in range(20):
        assert stand.event("deploy.completed", 2) is None
        await stand.windows(3)
    assert len(stand.runtime.loaded) == 2
    second.deaf = False
    second.routes.update(stand.gateways[0].routes)
    await stand.ended(2, "deploy.completed")


async def test_a_delivery_that_is_deleted_takes_its_endpoint_along(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    await stand.ended(2, "deploy.canary")
    await stand.apply(revision=2, deleted=True)
    ended = await stand.ended(2, "deploy.rolled_back")
    assert "deleted" in ended.reason
    await stand.eventually(lambda: gateway.route().deleted, "the route to be withdrawn")
    await stand.promote(3, revision=2)
    ended = await stand.ended(3, "deploy.rolled_back")
    assert "was deleted" in ended.reason


async def test_a_lost_window_restarts_the_minimum_of_the_step(stand: Any) -> None:
    await stand.start()
    gateway = await stand.live()
    await stand.promote(2)
    canary = await stand.ended(2, "deploy.canary")
    gateway.skip_windows()
    await stand.ended(2, "deploy.completed")
    _, log = await stand.deployer().explain(canary.rollout.rollout_id, 0, 10_000)
    gaps = [row.evidence for row in log if row.reason == "window" and row.evidence["window"]["gap"]]
    assert any(row["window"]["canary"]["units"] == row["step"]["units"] for row in gaps)


async def test_a_promotion_waits_for_the_delivery_that_it_came_by(stand: Any) -> None:
    await stand.start()
    await stand.gateway()
    await stand.promote(1)
    await stand.eventually(lambda: stand.records(topics.MODELS), "the promotion to be published")
    assert await stand.deployer().endpoints() == []
    await stand.apply()
    await stand.ended(1, "deploy.completed")


async def test_a_version_without_an_endpoint_is_served_nowhere(stand: Any) -> None:
    await stand.start()
    await stand.promote(1, endpoint="")
    gateway = await stand.live(2)
    assert gateway.weights() == {2: 10_000}
    assert stand.story(1) == []
