"""Sequential tests on rates of bad requests, by betting: is the canary worse than the baseline, or shown to be no worse?

Each test keeps a wealth that starts at 1 and is multiplied once per merged window. Under the hypothesis that it tries to refute the
wealth is a supermartingale, so it reaches 1/alpha with probability alpha at most, however often one looks (Ville's inequality).
Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024; Ramdas, Gruenwald, Vovk and
Shafer, Game-theoretic statistics and safe anytime-valid inference, Statistical Science 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALPHA = 0.05
"""Probability with which an innocent canary may be aborted, and a harmful one may be called harmless."""

BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Fractions of its wealth that the bettor stakes; the mixture of them needs no tuning to the size of the effect."""

CAP = 0.25
"""A window's bad rate counts at most this much for harm: a stall that makes a whole window bad is one piece of evidence, not a hundred."""

LEAST_UNITS = 4
"""A merged window needs this many units in each arm that it compares."""

_LARGEST_LOG = 700.0  # exp() overflows a little above; a wealth of 1e304 has long been decided


@dataclass(frozen=True)
class Rate:
    """How many of `units` were bad in one merged window. Units are requests or callers, whichever was randomised."""

    units: int
    bad: int

    @property
    def value(self) -> float:
        """The bad rate, 0 when there were no units."""
        return min(self.bad, self.units) / self.units if self.units else 0.0

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.units + other.units, self.bad + other.bad)


@dataclass(frozen=True)
class Wealth:
    """The capital of a mixture of bettors: one logarithm per fraction in BETS, so that long losses and long wins stay within floats."""

    logs: tuple[float, ...] = (0.0,) * len(BETS)

    def bet(self, payoff: float) -> Wealth:
        """Return the wealth after one more window with this payoff, which must be at least -1. Payoff 0 changes nothing."""
        if payoff < -1.0:
            raise ValueError(f"a payoff below -1 would make the wealth negative: {payoff}")
        return Wealth(tuple(log + math.log1p(fraction * payoff) for log, fraction in zip(self.logs, BETS, strict=True)))

    @property
    def value(self) -> float:
        """The mean of the bettors' capitals."""
        return sum(math.exp(min(log, _LARGEST_LOG)) for log in self.logs) / len(self.logs)


def harm_payoff(canary: Rate, baseline: Rate) -> float:
    """Payoff against "the canary is no worse": (min(p_c, C) - min(p_b, C)) / C, within -1 and 1.

    Its mean is at most 0 when the canary is no worse and has the smaller share: the cap is concave, so the noisier rate, which is the
    smaller arm's, can only lose by it.
    """
    return (min(canary.value, CAP) - min(baseline.value, CAP)) / CAP


def no_harm_payoff(canary: Rate, baseline: Rate, margin: float) -> float:
    """Payoff against "the canary is worse by `margin` or more": margin - (p_c - p_b). Uncapped, so its mean is exact at any share."""
    return margin - (canary.value - baseline.value)


def excess_payoff(observed: Rate, limit: float) -> float:
    """Payoff against "the rate is at most `limit`", for one sample: (min(p, limit + C) - limit) / max(limit, C), within -1 and 1."""
    return (min(observed.value, limit + CAP) - limit) / max(limit, CAP)


def mean_wealth(wealths: Iterable[Wealth]) -> float:
    """The mean of several tests' wealths, 1 for none. It reaches 1/alpha with probability alpha at most when all their hypotheses hold."""
    values = [wealth.value for wealth in wealths]
    return sum(values) / len(values) if values else 1.0


def refuted(wealth: float, alpha: float = ALPHA) -> bool:
    """True when a wealth has refuted its hypothesis at level alpha."""
    return wealth >= 1.0 / alpha
