"""Bringing versions up and taking them down: the job that loads and warms up, and the reconciler of what is loaded and what should be.

What is wanted is written down before a runtime is called, every load has a name of its own, and every call may be repeated: so whoever
dies in between, the next one goes on from the database.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from artifacts import ArtifactStore
from artifacts.blobs import blob_key
from servicekit.clock import Clock
from servicekit.errors import Invalid, NotFound, Transient, Unavailable

from deployer import metrics
from deployer.domain.errors import SignatureInvalid
from deployer.domain.inputs import Loaded, LoadFailed, RuntimeRestarted, Warmed
from deployer.domain.rollout import Cause, State
from deployer.domain.signature import Samples, differences, read_samples, zeros
from deployer.domain.version import Arm, Version, runtime_model
from deployer.handlers import Deployer
from deployer.ports import LoadedModel, LoadTooSlow, Refused, RolloutRecord, Runtime, RuntimeLost, Store

LOADING = frozenset({State.PREPARING, State.WARMING})
LOADS = 3
"""How often a runtime is asked to load a version for which it takes too long."""

_MAX_SAMPLES_BYTES = 16 * 1024 * 1024
BASELINE_WAITS = 20
"""So often, some 40 s in all, a load waits for the baseline's model: a version must be able to replace one that can no longer be loaded."""

_LEAST_WAIT_S = 0.2
_MOST_WAIT_S = 2.0
_log = logging.getLogger(__name__)


class _Failed(Exception):
    """The version cannot be brought up."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message


class _BaselineLost(Unavailable):
    """The runtime answers, and has lost what callers are served by."""


class Loader:
    """Loads, warms up, unloads. `load` is run by jobs, on any replica; `reconcile` by the leader."""

    def __init__(
        self,
        store: Store,
        deployer: Deployer,
        artifacts: ArtifactStore,
        runtimes: Mapping[str, Runtime],
        clock: Clock,
        max_model_bytes: int = 1024**3,
    ) -> None:
        self._store = store
        self._deployer = deployer
        self._artifacts = artifacts
        self._runtimes = dict(runtimes)
        self._clock = clock
        self._max_model_bytes = max_model_bytes

    async def load(self, rollout_id: str) -> None:
        """Bring a rollout's version up, as long as its rollout wants that: until it answers, is refused, or the rollout ended.

        Waits for servers that are away. May be repeated and cancelled at any point.
        """
        wait = _LEAST_WAIT_S
        baseline_waits = 0
        while True:
            try:
                await self._bring_up(rollout_id, alone=baseline_waits >= BASELINE_WAITS)
                return
            except RuntimeLost as lost:
                await self._deployer.tell(rollout_id, LoadFailed(Cause.RUNTIME, lost.message))
                return
            except _Failed as failed:
                await self._deployer.tell(rollout_id, LoadFailed(failed.cause, failed.message))
                return
            except Transient as passing:
                baseline_waits += isinstance(passing, _BaselineLost)
                _log.warning("rollout %s waits: %s", rollout_id, passing)
            except NotFound:
                return  # nothing refers to it any more
            except Exception as bug:
                # A rollout must not wait for its deadline because of a bug of ours.
                await self._deployer.tell(rollout_id, LoadFailed(Cause.RUNTIME, f"internal error ({type(bug).__name__})"))
                raise
            await self._clock.sleep(wait)
            wait = min(wait * 2, _MOST_WAIT_S)

    async def _bring_up(self, rollout_id: str, *, alone: bool) -> None:
        record = await self._deployer.rollout(rollout_id)
        if record.rollout.state not in LOADING:
            return
        runtime = self._runtimes[record.rollout.policy.runtime]
        model = await self._loaded(record)
        there = await runtime.models()
        if record.rollout.state is State.PREPARING and not alone:
            await self._await_baseline(record, there)
        if model is None or model.name not in there:
            content = await self._content(record.version)
            model = await self._intend(record, runtime)
            if model is None:
                return
            await self._push(runtime, model.name, content, record.version)
            await self._note_loaded(model)
        await self._deployer.tell(rollout_id, Loaded())
        await self._warm_up(runtime, model.name, record.version)
        await self._deployer.tell(rollout_id, Warmed())

    async def _await_baseline(self, record: RolloutRecord, there: frozenset[str]) -> None:
        """A runtime that has just restarted gets back first what callers need. A rollout that overtook that would be taken for one
        whose evidence the restart has spoiled. Raises _BaselineLost."""
        rollout = record.rollout
        async with self._store.transaction() as work:
            known = await work.models(rollout.policy.runtime)
        if any(
            (m.endpoint, m.arm) == (rollout.endpoint, rollout.baseline) and m.wanted and m.state == "loaded" and m.name not in there
            for m in known
        ):
            raise _BaselineLost(f"{rollout.policy.runtime} has lost the version that serves, which is loaded again first")

    async def _push(self, runtime: Runtime, model: str, content: bytes, version: Version) -> None:
        """Have the runtime load it. When that takes too long, again by the same name: a load that ended meanwhile is found to be done."""
        for further in reversed(range(LOADS)):
            try:
                await runtime.load(model, content, version.signature)
                return
            except Refused as refused:
                raise _Failed(Cause.RUNTIME, refused.message) from refused
            except LoadTooSlow as slow:
                if not further:
                    raise _Failed(Cause.RUNTIME, f"{slow.message}, tried {LOADS} times") from slow
                _log.warning("%s; it is tried again", slow)

    async def _loaded(self, record: RolloutRecord) -> LoadedModel | None:
        """The model that an earlier attempt has loaded."""
        rollout = record.rollout
        async with self._store.transaction() as work:
            arms = await work.arms(rollout.endpoint, [rollout.canary])
            name = arms[rollout.canary].runtime_model
            return next((model for model in await work.models() if model.name == name and model.wanted and model.state == "loaded"), None)

    async def _intend(self, record: RolloutRecord, runtime: Runtime) -> LoadedModel | None:
        """Write down that a load is about to begin, under a name never used before; what earlier attempts loaded must go."""
        rollout = record.rollout
        async with self._store.transaction() as work:
            endpoint = await work.lock(rollout.endpoint)
            current = await work.rollout(rollout.id)
            if endpoint is None or current is None or current.rollout.state not in LOADING:
                return None
            for earlier in await work.models():
                if (earlier.endpoint, earlier.arm) == (rollout.endpoint, rollout.canary) and earlier.wanted:
                    await work.save_model(replace(earlier, wanted=False))
            generation = endpoint.generation + 1
            name = runtime_model(record.version, generation)
            await work.save_endpoint(replace(endpoint, generation=generation))
            model = LoadedModel(name, runtime.name, rollout.endpoint, rollout.canary, wanted=True, state="intended")
            await work.save_model(model)
            return model

    async def _note_loaded(self, model: LoadedModel) -> None:
        async with self._store.transaction() as work:
            await work.lock(model.endpoint)
            if not any(known.name == model.name and known.wanted for known in await work.models()):
                return  # another attempt has taken over
            arms = await work.arms(model.endpoint, [model.arm])
            await work.save_arm(replace(arms[model.arm], runtime_model=model.name))
            await work.save_model(replace(model, state="loaded"))

    async def _content(self, version: Version) -> bytes:
        """The model's bytes, by their hash. Raises _Failed when they are missing or not these."""
        sha256 = version.blob.sha256
        try:
            return await self._artifacts.read(blob_key(sha256), sha256=sha256, max_bytes=self._max_model_bytes)
        except Invalid as invalid:
            raise _Failed(Cause.ARTIFACT, f"the artifact cannot be used: {invalid}") from invalid

    async def _samples(self, version: Version) -> Samples:
        if version.samples is None:
            return zeros(version.signature)
        try:
            text = await self._artifacts.read(version.samples.key, sha256=version.samples.sha256, max_bytes=_MAX_SAMPLES_BYTES)
            return read_samples(text, version.signature)
        except (Invalid, SignatureInvalid) as invalid:
            raise _Failed(Cause.ARTIFACT, f"the sample rows cannot be used: {invalid}") from invalid

    async def _warm_up(self, runtime: Runtime, model: str, version: Version) -> None:
        """Have the model answer its sample rows: the only proof that it is ready, and that it is the model that was trained."""
        samples = await self._samples(version)
        try:
            answered = await runtime.infer(model, samples.inputs, version.signature)
        except Refused as refused:
            raise _Failed(Cause.RUNTIME, f"it does not answer its sample rows: {refused.message}") from refused
        wrong = differences(samples.outputs, answered)
        if wrong:
            raise _Failed(Cause.RUNTIME, f"it answers its sample rows otherwise than where it was trained: {'; '.join(wrong)}")

    # The reconciler.

    async def reconcile(self, epoch: int) -> None:
        """Compare every runtime with what is wanted of it and put right what differs. Raises Deposed, Unavailable (the store is away)."""
        for runtime in self._runtimes.values():
            try:
                there = await runtime.models()
            except Transient as passing:
                _log.warning("%s cannot be compared with what it should have loaded: %s", runtime.name, passing)
                continue
            async with self._store.transaction() as work:
                await work.fence(epoch)
                known = await work.models(runtime.name)
            lost = [model for model in known if model.wanted and model.state == "loaded" and model.name not in there]
            if lost:
                await self._restarted(runtime, lost, epoch)
            for model in known:
                if not model.wanted:
                    await self._take_down(runtime, model, there, epoch)

    async def _restarted(self, runtime: Runtime, lost: list[LoadedModel], epoch: int) -> None:
        """The runtime lost models. Rollouts that need them end, and what callers need is loaded again."""
        metrics.lost(runtime.name, len(lost))
        _log.error("%s has lost %s", runtime.name, ", ".join(model.name for model in lost))
        arms = {(model.endpoint, model.arm) for model in lost}
        for record in await self._store.live():
            rollout = record.rollout
            mine = {(rollout.endpoint, rollout.canary), (rollout.endpoint, rollout.baseline)}
            # One that still loads finds out by itself.
            if rollout.state is not State.PREPARING and mine & arms:
                await self._deployer.tell(rollout.id, RuntimeRestarted(f"{runtime.name} restarted and lost what it had loaded"), epoch)
        for model in lost:
            await self._load_again(runtime, model, epoch)

    async def _load_again(self, runtime: Runtime, model: LoadedModel, epoch: int) -> None:
        arm = await self._still_needed(model, epoch)
        if arm is None:
            return
        try:
            await runtime.load(model.name, await self._content(arm.version), arm.version.signature)
            await self._warm_up(runtime, model.name, arm.version)
        except Transient as passing:
            _log.warning("%s is not loaded again yet: %s", model.name, passing)
        except (Refused, _Failed) as failed:
            _log.error("%s cannot be loaded again: %s", model.name, failed)
        else:
            _log.info("%s is loaded again", model.name)

    async def _still_needed(self, model: LoadedModel, epoch: int) -> Arm | None:
        """The model's arm, unless nobody needs it any more: then it is noted as gone."""
        async with self._store.transaction() as work:
            await work.fence(epoch)
            record = await work.lock(model.endpoint)
            if record is None:
                return None
            arms = await work.arms(model.endpoint, [model.arm])
            needed = {record.endpoint.serving, record.endpoint.previous}
            live = None if record.endpoint.live is None else await work.rollout(record.endpoint.live)
            if live is not None and live.rollout.state is not State.ABORTING:
                needed.add(live.rollout.canary)
            if model.arm in needed:
                return arms[model.arm]
            await work.save_model(replace(model, wanted=False, state="gone"))
            return None

    async def _take_down(self, runtime: Runtime, model: LoadedModel, there: frozenset[str], epoch: int) -> None:
        try:
            if model.name in there:
                await runtime.unload(model.name)
        except Transient as passing:
            _log.warning("%s is not unloaded yet: %s", model.name, passing)
            return
        async with self._store.transaction() as work:
            await work.fence(epoch)
            await work.save_model(replace(model, state="gone"))
