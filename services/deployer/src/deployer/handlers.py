"""The deployer's use cases on rollouts and endpoints: each takes a lock, lets the domain decide, and stores what follows, at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from servicekit import telemetry
from servicekit.clock import Ids
from servicekit.errors import Conflict, Invalid, NotFound, Transient, Violation

from deployer import metrics
from deployer.domain import endpoint as endpoints
from deployer.domain import events as ev
from deployer.domain import policy as policies
from deployer.domain import route as routes
from deployer.domain.decisions import decide
from deployer.domain.errors import CommandRefused, PolicyInvalid, SignatureInvalid
from deployer.domain.events import Event
from deployer.domain.inputs import Abort, Command, Deadline, Input, LoadFailed, Revert, Supersede
from deployer.domain.policy import Policy
from deployer.domain.rollout import Cause, Rollout, State
from deployer.domain.version import FORMATS, Arm, Version, arm_id
from deployer.ports import Announcement, Decision, Delivery, EndpointRecord, RolloutRecord, Store, UnitOfWork

WITHDRAWN_S = 60.0
"""A gateway that drops a route has nothing to acknowledge it by; after this time it is taken to have dropped it."""

ANNOUNCED = (ev.CanaryStarted, ev.Advanced, ev.Completed, ev.RolledBack, ev.Superseded, ev.Reverted, ev.Alarmed)
"""Events that others hear of."""

TOLD = (*ANNOUNCED, ev.RouteSet, ev.RouteWithdrawn)
"""Events that leave this service."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promotion:
    """The registry wants this version in production on an endpoint.

    `evaluation`: the one it passed. `champion`: the version that it was judged against there, 0 for none; None when no verdict binds
    it, as an admin passed the gates by.
    """

    endpoint: str
    version: Version
    evaluation: str
    champion: int | None


class Deployer:
    """Everything that changes an endpoint or a rollout goes through here. Safe to use from several processes at once."""

    def __init__(self, store: Store, ids: Ids, upstreams: Mapping[str, str], wake: Callable[[], None]) -> None:
        """`upstreams`: the address at which gateways reach each configured runtime. `wake` tells the leader that there is work."""
        self._store = store
        self._ids = ids
        self._upstreams = dict(upstreams)
        self._wake = wake

    # What happens.

    async def promoted(self, work: UnitOfWork, promotion: Promotion) -> None:
        """Let a promoted version wait for its turn. One that waited already is superseded. A version that cannot be served ends at once.

        Raises Transient while the delivery that it came by has not been heard of.
        """
        if not promotion.endpoint:
            _log.info("%s version %s is promoted, and served nowhere", promotion.version.model, promotion.version.version)
            return
        version = promotion.version
        delivery = await work.delivery(version.journey.delivery, version.journey.revision)
        if delivery is None:
            raise Transient(f"delivery {version.journey.delivery!r} revision {version.journey.revision} is not known yet")
        await work.add_endpoint(promotion.endpoint, version.journey.delivery)
        record = await self._locked(work, promotion.endpoint)
        policy, problem = self._policy(promotion.endpoint, delivery)
        generation = record.generation + 1
        arm = Arm(arm_id(version.version, generation), promotion.endpoint, version, policy.runtime)
        await work.save_arm(arm)
        rollout_id = str(self._ids.uuid7())
        rollout = Rollout(rollout_id, promotion.endpoint, arm.id, policy, evaluation=promotion.evaluation, champion=promotion.champion)
        added = RolloutRecord(rollout, version, traceparent=telemetry.current_traceparent())
        endpoint, displaced = endpoints.enqueue(record.endpoint, rollout.id)
        record = replace(record, endpoint=endpoint, generation=generation, delivery=version.journey.delivery)
        if displaced is not None:
            waiting = await self._found(work, displaced)
            record = await self._decide(work, record, waiting, Supersede(version.version))
        await work.add_rollout(added)
        await work.log(rollout.id, "", rollout.state, "promoted", {})
        problem = problem or _unservable(version)
        if problem:
            record = await self._decide(work, record, added, LoadFailed(Cause.ARTIFACT, problem))
        await work.save_endpoint(record)

    async def applied(self, delivery: Delivery) -> None:
        """Remember a delivery's revision. May be repeated."""
        async with self._store.transaction() as work:
            added = await work.save_delivery(delivery)
        if added:
            self._wake()

    async def tell(self, rollout_id: str, given: Input, epoch: int | None = None) -> RolloutRecord:
        """Tell a rollout something and store what it decides. `epoch`: only while this leader leads.

        Raises NotFound, CommandRefused, Deposed, Unavailable. May be repeated: what no longer fits changes nothing.
        """
        async with self._store.transaction() as work:
            if epoch is not None:
                await work.fence(epoch)
            return await self.tell_within(work, rollout_id, given)

    async def tell_within(self, work: UnitOfWork, rollout_id: str, given: Input) -> RolloutRecord:
        """As `tell`, in a transaction of the caller's."""
        # Its endpoint never changes; everything else is read again under the lock.
        endpoint = (await self._found(work, rollout_id)).rollout.endpoint
        record = await self._locked(work, endpoint)
        before = await self._found(work, rollout_id)
        if isinstance(given, Deadline):
            if not await work.deadline_is_over(rollout_id):
                return before
            await work.set_deadline(rollout_id, None)
        if isinstance(given, Revert):
            _check_revert(record, before.rollout)
            given = replace(given, revision=record.endpoint.revision)
        await work.save_endpoint(await self._decide(work, record, before, given))
        return await self._found(work, rollout_id)

    async def command(self, rollout_id: str, given: Command) -> RolloutRecord:
        """Do what an operator wants. Raises NotFound, Conflict when the state does not allow it."""
        try:
            record = await self.tell(rollout_id, given)
        except CommandRefused as refused:
            raise Conflict(str(refused)) from refused
        self._wake()
        return record

    # What the leader does.

    async def begin(self, endpoint: str, epoch: int) -> str | None:
        """Give the endpoint's waiting rollout its turn, if it is its turn; return its id.

        One that was judged against another version than the one that is live by now ends instead.
        """
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await self._locked(work, endpoint)
            rollout_id = record.endpoint.waiting
            if rollout_id is None:
                return None
            waiting = await self._found(work, rollout_id)
            serving = (await work.arms(endpoint, [record.endpoint.serving])).get(record.endpoint.serving or "")
            baseline = 0 if serving is None else serving.version.version
            # Another model's version on the same endpoint was never its champion.
            same = serving is not None and serving.version.model_id == waiting.version.model_id
            started = endpoints.begin(record.endpoint, baseline if same else 0)
            if started is None:
                return None
            waiting = replace(waiting, baseline_version=baseline)
            record = await self._decide(work, replace(record, endpoint=started[0]), waiting, started[1])
            if record.endpoint.live == rollout_id:
                await work.enqueue_load(rollout_id)
            await work.save_endpoint(record)
            return rollout_id

    async def readdress(self, epoch: int) -> None:
        """Publish the routes in which a runtime has another address than it has now: addresses change with a restart only."""
        for known in await self._store.endpoints():
            if known.route is None or routes.readdressed(known.route, self._upstreams) is None:
                continue
            async with self._store.transaction() as work:
                await work.fence(epoch)
                record = await self._locked(work, known.endpoint.name)
                route = None if record.route is None else routes.readdressed(record.route, self._upstreams)
                if route is None:
                    continue
                await self._named(work, route)
                await work.publish(route)
                # One may be watched while the next one is still being loaded.
                for rollout_id in filter(None, (record.endpoint.live, record.endpoint.watching)):
                    running = await self._found(work, rollout_id)
                    await work.save_rollout(replace(running, rollout=replace(running.rollout, revision=route.revision)))
                await work.save_endpoint(replace(record, route=route, endpoint=replace(record.endpoint, revision=route.revision)))

    async def publish_again(self, endpoint: str, epoch: int) -> None:
        """Tell gateways once more that somebody judges."""
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await self._locked(work, endpoint)
            if record.route is not None and record.watched:
                await work.publish(record.route)

    async def acknowledged(self, endpoint: str, revision: int, epoch: int) -> None:
        """All gateways serve by this revision: let arms that only earlier ones named go, and let the route rest when nothing runs."""
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await self._locked(work, endpoint)
            record = replace(record, acknowledged=max(record.acknowledged, revision))
            route = record.route
            resting = record.endpoint.live is None and record.endpoint.watching is None
            if resting and route is not None and route.watched and route.revision <= revision:
                calm = routes.quiet(route)
                await self._named(work, calm)
                await work.publish(calm)
                record = replace(record, route=calm, endpoint=replace(record.endpoint, revision=calm.revision))
            await work.save_endpoint(record)

    async def abandon(self, endpoint: str, epoch: int) -> None:
        """No delivery names this endpoint any more: end what runs and waits, then withdraw the route."""
        found = await self._store.endpoints(endpoint)
        for rollout_id in (r for record in found for r in (record.endpoint.waiting, record.endpoint.live) if r is not None):
            try:
                await self.tell(rollout_id, Abort("its delivery was deleted"), epoch)
            except CommandRefused:
                return  # it is being reverted: its end comes first
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await self._locked(work, endpoint)
            if record.endpoint.live is not None or record.endpoint.serving is None:
                return
            gone = routes.withdrawn(endpoint, record.endpoint.revision + 1)
            await work.publish(gone)
            free = replace(record.endpoint, revision=gone.revision, serving=None, previous=None, watching=None)
            await work.save_endpoint(replace(record, endpoint=free, route=gone))

    async def release(self, endpoint: str, epoch: int) -> list[str]:
        """Mark the models of arms that nothing needs any more to be unloaded; return their names."""
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await self._locked(work, endpoint)
            loaded = [model for model in await work.models() if model.endpoint == endpoint and model.wanted]
            arms = await work.arms(endpoint, [model.arm for model in loaded])
            needed = {record.endpoint.serving, record.endpoint.previous}
            for rollout_id in (record.endpoint.live, record.endpoint.waiting):
                if rollout_id is not None:
                    needed.add((await self._found(work, rollout_id)).rollout.canary)
            acknowledged = record.acknowledged
            if record.route is not None and record.route.deleted and await work.route_is_older(endpoint, WITHDRAWN_S):
                acknowledged = record.route.revision
            free = [
                model
                for model in loaded
                if model.arm not in needed and (arms[model.arm].last_revision == 0 or arms[model.arm].last_revision < acknowledged)
            ]
            for model in free:
                await work.save_model(replace(model, wanted=False))
            return [model.name for model in free]

    # What can be asked.

    async def rollout(self, rollout_id: str) -> RolloutRecord:
        """Raises NotFound."""
        found = await self._store.find_rollout(rollout_id)
        if found is None:
            raise NotFound(f"there is no rollout {rollout_id}")
        return found

    async def rollouts(self, endpoint: str, limit: int, before: str) -> list[RolloutRecord]:
        """Newest first."""
        return await self._store.rollouts(endpoint, limit, before)

    async def explain(self, rollout_id: str, after: int, limit: int) -> tuple[RolloutRecord, list[Decision]]:
        """A rollout, and its decision log as the store gives it. Raises NotFound."""
        return await self.rollout(rollout_id), await self._store.decisions(rollout_id, after, limit)

    async def endpoint(self, name: str) -> EndpointRecord:
        """Raises NotFound."""
        found = await self._store.endpoints(name)
        if not name or not found:
            raise NotFound(f"there is no endpoint {name!r}")
        return found[0]

    async def endpoints(self) -> list[EndpointRecord]:
        return await self._store.endpoints()

    def validate(self, section: object, previous: object) -> tuple[str, ...]:
        """Check a serve section; return the fields in which a guard is looser than in the one before (None: there was none).

        Raises Invalid with a violation per field that is wrong. Changes nothing.
        """
        try:
            policy = policies.parse(section, frozenset(self._upstreams))
        except PolicyInvalid as invalid:
            violations = [Violation(_from_top(p.field), p.message) for p in invalid.problems]
            raise Invalid("the serve section is not valid", violations) from invalid
        if previous is None:
            return ()
        try:
            before = policies.parse(previous, frozenset(self._upstreams))
        except PolicyInvalid:
            return ()  # nothing was guarded by what was no policy
        return tuple(_from_top(field) for field in policies.loosened(before, policy))

    # Within a transaction.

    async def _locked(self, work: UnitOfWork, endpoint: str) -> EndpointRecord:
        record = await work.lock(endpoint)
        if record is None:
            raise NotFound(f"there is no endpoint {endpoint!r}")
        return record

    async def _found(self, work: UnitOfWork, rollout_id: str) -> RolloutRecord:
        record = await work.rollout(rollout_id)
        if record is None:
            raise NotFound(f"there is no rollout {rollout_id}")
        return record

    async def _decide(self, work: UnitOfWork, endpoint: EndpointRecord, before: RolloutRecord, given: Input) -> EndpointRecord:
        """Let the rollout decide; store it, its log and its events; return the endpoint as it then is, not stored yet."""
        after, events = decide(before.rollout, given)
        if after == before.rollout and not events:
            return endpoint
        record = replace(before, rollout=after)
        await work.save_rollout(record)
        if any(isinstance(event, TOLD) for event in events):
            # The decision belongs to the trace of what promoted the version, whoever's turn it was to take it.
            parent = telemetry.context_from(before.traceparent)
            with telemetry.start_span(f"decide {after.state}", parent=parent, attributes={"headrace.rollout_id": after.id}):
                return await self._follow(work, endpoint, record, events)
        return await self._follow(work, endpoint, record, events)

    async def _follow(self, work: UnitOfWork, endpoint: EndpointRecord, record: RolloutRecord, events: tuple[Event, ...]) -> EndpointRecord:
        rollout = record.rollout
        told: list[Event] = []
        for event in events:
            match event:
                case ev.Moved():
                    metrics.moved(rollout)
                    _log.info("%s: %s -> %s: %s", rollout.endpoint, event.source, event.target, event.reason)
                    await work.log(rollout.id, event.source, event.target, event.reason, {})
                case ev.Judged():
                    metrics.judged(rollout)
                    if event.logged:
                        await work.log(rollout.id, rollout.state, rollout.state, "window", event.detail)
                case ev.Alarmed():
                    metrics.alarmed(rollout)
                    _log.error("%s: %s", rollout.endpoint, event.reason, extra={"rollout_id": rollout.id})
                    await work.log(rollout.id, rollout.state, rollout.state, f"alarm: {event.reason}", event.detail)
                    told.append(event)
                case ev.RouteSet():
                    arms = await work.arms(rollout.endpoint, [rollout.canary, rollout.baseline])
                    route = routes.of_rollout(event, rollout, arms, self._upstreams)
                    await self._named(work, route)
                    await work.publish(route)
                    endpoint = replace(endpoint, route=route)
                case ev.RouteWithdrawn():
                    route = routes.withdrawn(rollout.endpoint, event.revision)
                    await work.publish(route)
                    endpoint = replace(endpoint, route=route)
                case ev.DeadlineSet():
                    await work.set_deadline(rollout.id, event.seconds)
                case _ if isinstance(event, ANNOUNCED):
                    told.append(event)
        after = replace(endpoint, endpoint=endpoints.apply(endpoint.endpoint, rollout, events))
        arms = await work.arms(rollout.endpoint, [rollout.baseline]) if told else {}
        baseline = arms.get(rollout.baseline or "")
        for event in told:
            revision = after.endpoint.revision
            await work.announce(Announcement(event, record, revision, None if baseline is None else baseline.version))
        return after

    async def _named(self, work: UnitOfWork, route: routes.Route) -> None:
        """Remember of each arm that this revision names it: it stays loaded until all gateways have a later one that does not."""
        arms = await work.arms(route.endpoint, [routed.arm for routed in route.arms])
        for routed in route.arms:
            await work.save_arm(replace(arms[routed.arm], last_revision=route.revision))

    def _policy(self, endpoint: str, delivery: Delivery) -> tuple[Policy, str]:
        """The delivery's policy; with the default one, the reason why it cannot be used."""
        default = policies.parse({"endpoint": endpoint})
        if delivery.deleted or delivery.section is None:
            return default, f"delivery {delivery.name} {'was deleted' if delivery.deleted else 'serves nothing'}"
        try:
            return policies.parse(delivery.section, frozenset(self._upstreams)), ""
        except PolicyInvalid as invalid:
            return default, f"delivery {delivery.name} revision {delivery.revision} cannot be used here: {invalid}"


def _unservable(version: Version) -> str:
    """Why a version can be loaded by no runtime here; empty when it may be tried."""
    if version.format not in FORMATS:
        return f"format {version.format!r} is served by no runtime here; known: {', '.join(sorted(FORMATS))}"
    if not version.blob.sha256:
        return "the version has no artifact"
    try:
        version.signature.check()
    except SignatureInvalid as invalid:
        return str(invalid)
    return ""


def _check_revert(record: EndpointRecord, rollout: Rollout) -> None:
    if rollout.state is not State.COMPLETED or not rollout.revertible:
        return  # the rollout itself says what it thinks of that
    if record.endpoint.live is not None:
        raise CommandRefused(f"rollout {record.endpoint.live} runs on this endpoint: abort it first")
    if record.endpoint.serving != rollout.canary or record.endpoint.previous is None:
        raise CommandRefused("the version before it is not kept any more, or another one has taken over")


def _from_top(field: str) -> str:
    return f"serve.{field}" if field else "serve"
