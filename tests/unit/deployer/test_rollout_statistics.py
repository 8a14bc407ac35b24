"""The betting tests keep their promise: few false alarms, quick discovery, and payoffs that are what the formulas say.

With -rP they print what they measured: the figures in docs/rollouts.md.
"""

from __future__ import annotations

import math
import statistics as summary

import numpy as np
import pytest
from deployer.domain.statistics import (
    ALPHA,
    BETS,
    CAP,
    LEAST_UNITS,
    Rate,
    Wealth,
    excess_payoff,
    harm_payoff,
    mean_wealth,
    no_harm_payoff,
    refuted,
)
from hypothesis import given
from hypothesis import strategies as st

rates = st.integers(0, 1_000).flatmap(lambda units: st.builds(Rate, st.just(units), st.integers(0, units)))
shares = st.floats(0, 1)


@given(rates, rates)
def test_harm_pays_within_its_bounds_and_turns_its_sign_with_the_arms(canary: Rate, baseline: Rate) -> None:
    payoff = harm_payoff(canary, baseline)
    assert -1 <= payoff <= 1
    assert payoff == -harm_payoff(baseline, canary)
    if min(canary.value, baseline.value) >= CAP:
        assert payoff == 0


@given(rates, rates, st.floats(0.001, 1))
def test_no_harm_pays_the_margin_when_both_are_the_same(canary: Rate, baseline: Rate, margin: float) -> None:
    assert no_harm_payoff(canary, baseline, margin) >= -1
    assert no_harm_payoff(canary, canary, margin) == margin


@given(rates, shares)
def test_excess_never_pays_while_the_rate_is_within_its_limit(observed: Rate, limit: float) -> None:
    payoff = excess_payoff(observed, limit)
    assert -1 <= payoff <= 1
    assert (payoff > 0) == (observed.value > limit)


def test_excess_of_one_window_is_bounded() -> None:
    assert excess_payoff(Rate(1_000, 1_000), 0.01) == pytest.approx(1.0)
    assert excess_payoff(Rate(0, 0), 0.0) == 0.0


def test_bad_requests_that_arrive_after_their_window_never_make_a_rate_above_one() -> None:
    assert Rate(2, 5).value == 1.0


@given(st.lists(st.floats(-1, 1), max_size=40))
def test_wealth_is_the_mean_of_products(payoffs: list[float]) -> None:
    wealth = Wealth()
    for payoff in payoffs:
        wealth = wealth.bet(payoff)
    expected = sum(math.prod(1 + bet * payoff for payoff in payoffs) for bet in BETS) / len(BETS)
    assert wealth.value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_stake_is_never_more_than_the_wealth() -> None:
    with pytest.raises(ValueError, match="below -1"):
        Wealth().bet(-1.01)


def test_wealth_survives_a_very_long_win_and_a_very_long_loss() -> None:
    won = lost = Wealth()
    for _ in range(5_000):
        won, lost = won.bet(1.0), lost.bet(-1.0)
    assert refuted(won.value)
    assert math.isfinite(won.value)
    assert 0 <= lost.value < 1e-6


def test_the_mean_of_no_tests_refutes_nothing() -> None:
    assert mean_wealth([]) == 1.0
    assert refuted(1 / ALPHA)
    assert not refuted(1 / ALPHA - 1e-9)


def _first_alarm(
    rng: np.random.Generator, share: float, per_window: float, baseline: float, canary: float, windows: int, stall_every: int = 0
) -> int | None:
    """Windows until harm is found, of a stream of windows of Poisson traffic; every so often one arm stalls for a window."""
    wealth, seen_canary, seen_baseline = Wealth(), Rate(0, 0), Rate(0, 0)
    requests = rng.poisson(per_window, windows)
    in_canary = rng.binomial(requests, share)
    bad_canary = rng.binomial(in_canary, canary)
    bad_baseline = rng.binomial(requests - in_canary, baseline)
    stalled = rng.integers(0, max(1, stall_every), 2)
    for window in range(windows):
        units_c, units_b = int(in_canary[window]), int(requests[window] - in_canary[window])
        stall_c = stall_every and window % stall_every == stalled[0]
        stall_b = stall_every and window % stall_every == stalled[1]
        seen_canary += Rate(units_c, units_c if stall_c else int(bad_canary[window]))
        seen_baseline += Rate(units_b, units_b if stall_b else int(bad_baseline[window]))
        if min(seen_canary.units, seen_baseline.units) >= LEAST_UNITS:
            wealth = wealth.bet(harm_payoff(seen_canary, seen_baseline))
            seen_canary = seen_baseline = Rate(0, 0)
            if refuted(wealth.value):
                return window + 1
    return None


@pytest.mark.parametrize(
    ("share", "per_window", "bad", "stall_every"),
    [
        (0.05, 100, 0.01, 0),
        (0.25, 100, 0.05, 0),
        (0.5, 100, 0.2, 0),
        (0.05, 100, 0.01, 100),
        (0.5, 100, 0.01, 100),
        # Little traffic at equal shares: what a rule about the canary's units alone gets wrong.
        (0.5, 3, 0.05, 0),
        (0.5, 3, 0.2, 0),
        (0.5, 1, 0.2, 0),
    ],
)
def test_an_innocent_canary_is_aborted_at_most_as_often_as_alpha(share: float, per_window: float, bad: float, stall_every: int) -> None:
    rng = np.random.default_rng(20_240_501)
    runs = 200
    alarms = [_first_alarm(rng, share, per_window, bad, bad, 400, stall_every) for _ in range(runs)]
    false = sum(alarm is not None for alarm in alarms)
    print(f"{share:.0%} of {per_window}/window, {bad:.0%} bad, a stall every {stall_every or '-'}: {false} of {runs} aborted")
    assert false <= ALPHA * runs


@pytest.mark.parametrize(
    ("share", "baseline", "canary", "within"),
    [(0.05, 0.01, 0.05, 65), (0.25, 0.01, 0.05, 40), (0.05, 0.0, 0.5, 10), (0.25, 0.0, 0.5, 10)],
)
def test_a_worse_canary_is_found_quickly(share: float, baseline: float, canary: float, within: int) -> None:
    rng = np.random.default_rng(7)
    found = [_first_alarm(rng, share, 100, baseline, canary, 900) or 900 for _ in range(60)]
    print(f"{baseline:.0%} -> {canary:.0%} bad at {share:.0%} of 100/window: found after {summary.median(found):g} windows (median)")
    assert summary.median(found) <= within


def _windows_until_shown(rng: np.random.Generator, baseline: float, canary: float, margin: float, windows: int) -> int | None:
    wealth = Wealth()
    for window in range(windows):
        units = 50
        wealth = wealth.bet(
            no_harm_payoff(Rate(units, int(rng.binomial(units, canary))), Rate(units, int(rng.binomial(units, baseline))), margin)
        )
        if refuted(wealth.value):
            return window + 1
    return None


@pytest.mark.parametrize(("margin", "within"), [(0.02, 280), (0.05, 120)])
def test_an_innocent_canary_is_shown_to_be_harmless(margin: float, within: int) -> None:
    rng = np.random.default_rng(11)
    shown = [_windows_until_shown(rng, 0.02, 0.02, margin, 900) or 900 for _ in range(40)]
    print(f"2% bad, margin {margin:.0%}: shown after {summary.median(shown):g} windows (median)")
    assert summary.median(shown) <= within


def test_a_canary_worse_by_the_margin_is_seldom_called_harmless() -> None:
    rng = np.random.default_rng(13)
    runs = 200
    shown = [_windows_until_shown(rng, 0.01, 0.06, 0.05, 200) for _ in range(runs)]
    wrong = sum(window is not None for window in shown)
    print(f"1% -> 6% bad, margin 5%: called harmless in {wrong} of {runs}")
    assert wrong <= ALPHA * runs
