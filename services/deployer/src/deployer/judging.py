"""What gateways report becomes evidence: members are told apart, windows merged, rollouts told. Only the leader judges; all listen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from servicekit.clock import Clock

from deployer.domain.inputs import Acknowledged
from deployer.domain.membership import Membership
from deployer.domain.rollout import ENDED, State
from deployer.domain.windows import Counts, Merger, ShadowCounts, Window
from deployer.handlers import Deployer
from deployer.ports import Deposed, RolloutRecord, Store

AWAITING = frozenset({State.COMPLETING, State.ABORTING, State.REVERTING})
"""States that wait for gateways to acknowledge a route."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArmReport:
    """What a gateway counted for one arm in one window."""

    served: Counts
    shadow: ShadowCounts


@dataclass(frozen=True)
class EndpointReport:
    """One endpoint in one window of one gateway. `unjudged`: the gateway had taken the canary's share back."""

    endpoint: str
    revision: int
    rollout_id: str
    arms: Mapping[str, ArmReport]
    unjudged: bool


@dataclass(frozen=True)
class Report:
    """One message of a gateway process. Several windows of an endpoint may be in it, the newest last."""

    instance: str
    boot: str
    sequence: int
    seconds: float
    endpoints: tuple[EndpointReport, ...]
    leaving: bool


class Judge:
    """Keeps what is only in memory: members, what is not merged yet, and which rollouts run."""

    def __init__(self, store: Store, deployer: Deployer, clock: Clock) -> None:
        self._store = store
        self._deployer = deployer
        self._clock = clock
        self.membership = Membership(clock.monotonic())
        self._epoch: int | None = None
        self._live: dict[str, RolloutRecord] = {}
        self._mergers: dict[str, Merger] = {}

    async def lead(self, epoch: int) -> None:
        """Begin to judge: with no evidence but what is stored."""
        self._mergers.clear()
        self._epoch = epoch
        await self.refresh()

    def follow(self) -> None:
        """Stop judging; go on listening."""
        self._epoch = None
        self._live.clear()
        self._mergers.clear()

    async def refresh(self) -> None:
        """Look which rollouts run. Raises Unavailable."""
        found = {record.rollout.id: record for record in await self._store.live()}
        # Something may have been decided while this was being read.
        self._live = {rollout_id: self._later(record) for rollout_id, record in found.items()}
        self._mergers = {rollout_id: merger for rollout_id, merger in self._mergers.items() if rollout_id in self._live}

    async def heard(self, report: Report) -> None:
        """Take a gateway's message in. Raises Unavailable when a decision could not be stored: its windows are lost, which is a gap."""
        revisions = {entry.endpoint: entry.revision for entry in report.endpoints}
        now = self._clock.monotonic()
        gap = self.membership.heard(report.instance, report.boot, report.sequence, revisions, report.leaving, now)
        if gap is None or self._epoch is None:
            return
        if gap:
            # What was lost may have been about any endpoint: which one, this message need not say.
            for merger in self._mergers.values():
                merger.interrupted()
        try:
            for entry in report.endpoints:
                await self._judge(report, entry)
            await self.acknowledgements()
        except Deposed:
            self.follow()
        except Exception:
            self._mergers.clear()
            raise

    async def acknowledgements(self) -> None:
        """Tell the rollouts that wait for it that all gateways serve by their route."""
        if self._epoch is None:
            return
        now = self._clock.monotonic()
        for rollout in [record.rollout for record in self._live.values() if record.rollout.state in AWAITING]:
            if self.membership.acknowledged(rollout.endpoint, rollout.revision, now, anyone=rollout.state is not State.ABORTING):
                self._keep(await self._deployer.tell(rollout.id, Acknowledged(rollout.revision), self._epoch))

    async def _judge(self, report: Report, entry: EndpointReport) -> None:
        record = self._live.get(entry.rollout_id)
        if record is None or not record.rollout.judged or record.rollout.endpoint != entry.endpoint:
            return
        rollout = record.rollout
        alone = rollout.state is State.COMPLETED
        merger = self._mergers.get(rollout.id)
        if merger is None or merger.alone is not alone:
            merger = self._mergers[rollout.id] = Merger(rollout.revision, alone)
        if entry.unjudged:
            merger.interrupted()
            return
        nothing = ArmReport(Counts(), ShadowCounts())
        canary = entry.arms.get(rollout.canary, nothing)
        baseline = entry.arms.get(rollout.baseline or "", nothing)
        if not entry.arms:
            return  # it says only which revision is being served
        shadowing = rollout.state is State.SHADOWING
        window = Window(
            report.instance,
            entry.revision,
            report.seconds,
            Counts() if shadowing else canary.served,
            baseline.served,
            canary.shadow if shadowing else ShadowCounts(),
        )
        members = self.membership.reporting(entry.endpoint, self._clock.monotonic())
        for merged in merger.add(window, members):
            self._keep(await self._deployer.tell(rollout.id, merged, self._epoch))

    def _later(self, record: RolloutRecord) -> RolloutRecord:
        """This record, or what is known of its rollout when that is of later."""
        known = self._live.get(record.rollout.id, record)
        return known if known.decisions > record.decisions else record

    def _keep(self, record: RolloutRecord) -> None:
        record = self._later(record)
        rollout = record.rollout
        if rollout.state in ENDED and not rollout.judged:
            self._live.pop(rollout.id, None)
            self._mergers.pop(rollout.id, None)
        else:
            self._live[rollout.id] = record
