"""The evidence of a rollout: what each guard's bets are worth, and what that says about the canary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from deployer.domain import statistics
from deployer.domain.policy import Guard, GuardKind, Policy
from deployer.domain.statistics import ALPHA, Rate, Wealth
from deployer.domain.windows import Merged, ShadowCounts

LEAST_REFERENCE = 200
"""Units of the baseline, seen before the canary had traffic, without which its own earlier rate is not known well enough."""

UNTRIED = Wealth()
UNSEEN = Rate(0, 0)
NO_COPIES = ShadowCounts()


@dataclass(frozen=True)
class GuardEvidence:
    """One guard's bets. `harm`: against "no worse" (shadow differences: "at most at_most"); `no_harm`: against "worse by the margin".

    `breach`: against "the endpoint as a whole is bad at most at_most"; `interference`: against "the baseline is no worse than it was
    by more than the margin"; `reference` is that earlier rate. `proven` stays once no-harm was shown.
    """

    harm: Wealth = UNTRIED
    no_harm: Wealth = UNTRIED
    breach: Wealth = UNTRIED
    interference: Wealth = UNTRIED
    proven: bool = False
    canary: Rate = UNSEEN
    baseline: Rate = UNSEEN
    reference: Rate = UNSEEN


@dataclass(frozen=True)
class Evidence:
    """All that a rollout has seen. The step's own counts restart with each step and with each gap in the windows."""

    guards: tuple[tuple[str, GuardEvidence], ...] = ()
    windows: int = 0
    step_units: int = 0
    step_seconds: float = 0.0
    shadow: ShadowCounts = NO_COPIES
    interference_s: float = 0.0

    def of(self, guard: str) -> GuardEvidence:
        """The evidence of one guard, empty before its first window."""
        return dict(self.guards).get(guard, GuardEvidence())

    def restarted(self) -> Evidence:
        """The same evidence with the step's minimum to be seen anew."""
        return replace(self, step_units=0, step_seconds=0.0)


@dataclass(frozen=True)
class Verdict:
    """Sentences about what the evidence shows; empty where it shows nothing."""

    harm: str
    breach: str
    interference: str


def weigh(evidence: Evidence, window: Merged, policy: Policy, shadowing: bool) -> Evidence:
    """Place every guard's bets on one merged window and count it towards the step's minimum.

    While shadowing, only copies and the baseline's own rate are weighed: the copies need not be a fair sample of the traffic.
    """
    if window.gap:
        evidence = evidence.restarted()
    guards = tuple((guard.id, _weigh_guard(evidence.of(guard.id), guard, window, shadowing)) for guard in policy.guards)
    return replace(
        evidence,
        guards=guards,
        windows=evidence.windows + 1,
        step_units=evidence.step_units + window.canary.units,
        step_seconds=evidence.step_seconds + window.seconds,
        shadow=evidence.shadow + window.shadow,
    )


def _weigh_guard(seen: GuardEvidence, guard: Guard, window: Merged, shadowing: bool) -> GuardEvidence:
    if guard.kind is GuardKind.SHADOW_DIFFERENCE:
        differences = window.shadow.difference()
        if differences.units == 0 or guard.at_most is None:
            return seen
        return replace(seen, harm=seen.harm.bet(statistics.excess_payoff(differences, guard.at_most)), canary=seen.canary + differences)
    canary, baseline = window.canary.rate(guard.id), window.baseline.rate(guard.id)
    margin = guard.margin or 0.0
    seen = replace(seen, canary=seen.canary + canary, baseline=seen.baseline + baseline)
    if guard.at_most is not None and canary.units + baseline.units:
        seen = replace(seen, breach=seen.breach.bet(statistics.excess_payoff(canary + baseline, guard.at_most)))
    if shadowing:
        return replace(seen, reference=seen.reference + baseline)
    if seen.reference.units >= LEAST_REFERENCE and baseline.units:
        earlier = min(1.0, seen.reference.value + margin)
        seen = replace(seen, interference=seen.interference.bet(statistics.excess_payoff(baseline, earlier)))
    if canary.units and baseline.units:
        no_harm = seen.no_harm.bet(statistics.no_harm_payoff(canary, baseline, margin))
        proven = seen.proven or statistics.refuted(no_harm.value)
        seen = replace(seen, harm=seen.harm.bet(statistics.harm_payoff(canary, baseline)), no_harm=no_harm, proven=proven)
    return seen


def verdict(evidence: Evidence, policy: Policy) -> Verdict:
    """Say what the evidence shows now. Each of the three tests is over all guards together and errs with probability ALPHA at most."""
    return Verdict(
        harm=_harm(evidence, policy) if statistics.refuted(_mean(evidence, policy, "harm")) else "",
        breach=_breach(evidence, policy) if statistics.refuted(_mean(evidence, policy, "breach")) else "",
        interference=_interference(evidence, policy) if statistics.refuted(_mean(evidence, policy, "interference")) else "",
    )


def bounded(policy: Policy) -> bool:
    """Whether a guard bounds the rate of the endpoint itself, so that a version can be watched that has nothing to compare it with."""
    return any(guard.at_most is not None for guard in policy.compared)


def watch(evidence: Evidence, window: Merged, policy: Policy) -> Evidence:
    """Place the bets against every guard's `at_most` on a window of a version that has all traffic."""
    guards = tuple((guard.id, _watch_guard(evidence.of(guard.id), guard, window)) for guard in policy.compared)
    return replace(evidence, guards=guards, windows=evidence.windows + 1)


def _watch_guard(seen: GuardEvidence, guard: Guard, window: Merged) -> GuardEvidence:
    rate = window.canary.rate(guard.id)
    if guard.at_most is None or not rate.units:
        return seen
    return replace(seen, breach=seen.breach.bet(statistics.excess_payoff(rate, guard.at_most)), canary=seen.canary + rate)


def unproven(evidence: Evidence, policy: Policy) -> tuple[str, ...]:
    """The guards by which the canary is not yet shown to be no worse than their margin."""
    return tuple(guard.id for guard in policy.compared if not evidence.of(guard.id).proven)


def explain(evidence: Evidence, window: Merged, policy: Policy) -> dict[str, Any]:
    """One merged window and what it did to every guard, for the decision log."""
    return {
        "window": {
            "revision": window.revision,
            "seconds": round(window.seconds, 3),
            "windows": window.windows,
            "gap": window.gap,
            "canary": {"units": window.canary.units, "bad": dict(window.canary.bad)},
            "baseline": {"units": window.baseline.units, "bad": dict(window.baseline.bad)},
            "shadow": {
                "compared": window.shadow.compared,
                "different": window.shadow.different,
                "errors": window.shadow.errors,
                "shed": window.shadow.shed,
            },
        },
        "step": {"units": evidence.step_units, "seconds": round(evidence.step_seconds, 3)},
        "guards": {guard.id: _explain_guard(evidence.of(guard.id)) for guard in policy.guards},
        "harm_wealth": _round(_mean(evidence, policy, "harm")),
        "abort_at": 1.0 / ALPHA,
    }


def _explain_guard(seen: GuardEvidence) -> dict[str, Any]:
    return {
        "canary": _round(seen.canary.value),
        "baseline": _round(seen.baseline.value),
        "harm": _round(seen.harm.value),
        "no_harm": _round(seen.no_harm.value),
        "proven": seen.proven,
        "breach": _round(seen.breach.value),
        "interference": _round(seen.interference.value),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _mean(evidence: Evidence, policy: Policy, test: str) -> float:
    """The mean wealth of one test over the guards that take part in it: all, those with an at_most, or those that compare."""
    if test == "breach":
        taking_part = [guard for guard in policy.compared if guard.at_most is not None]
    elif test == "interference":
        taking_part = list(policy.compared)
    else:
        taking_part = list(policy.guards)
    wealths: list[Wealth] = [getattr(evidence.of(guard.id), test) for guard in taking_part]
    return statistics.mean_wealth(wealths)


def _worst(evidence: Evidence, policy: Policy, test: str) -> Guard:
    return max(policy.guards, key=lambda guard: getattr(evidence.of(guard.id), test).value)


def _rate(rate: Rate) -> str:
    return f"{rate.value:.1%} of {rate.units}"


def _harm(evidence: Evidence, policy: Policy) -> str:
    guard = _worst(evidence, policy, "harm")
    seen = evidence.of(guard.id)
    if guard.kind is GuardKind.SHADOW_DIFFERENCE:
        return f"{guard.id}: {_rate(seen.canary)} shadow answers differ, more than {guard.at_most:.1%}"
    return f"{guard.id}: the canary is worse, bad are {_rate(seen.canary)} against {_rate(seen.baseline)} requests of the baseline"


def _breach(evidence: Evidence, policy: Policy) -> str:
    guard = _worst(evidence, policy, "breach")
    seen = evidence.of(guard.id)
    return f"{guard.id}: bad are {_rate(seen.canary + seen.baseline)} requests of the endpoint as a whole, more than {guard.at_most:.1%}"


def _interference(evidence: Evidence, policy: Policy) -> str:
    guard = _worst(evidence, policy, "interference")
    seen = evidence.of(guard.id)
    return f"{guard.id}: the baseline itself got worse since the rollout began ({_rate(seen.reference)} requests were bad before)"
