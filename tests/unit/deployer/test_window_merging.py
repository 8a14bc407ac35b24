"""Windows of several gateways become merged windows by counts of units alone, and never across a change of weights."""

from __future__ import annotations

from deployer.domain.statistics import LEAST_UNITS, Rate
from deployer.domain.windows import Counts, Merged, Merger, ShadowCounts, Window
from hypothesis import given
from hypothesis import strategies as st

ONE = frozenset({"a"})
TWO = frozenset({"a", "b"})


def window(instance: str = "a", revision: int = 1, canary: int = 0, baseline: int = 0, seconds: float = 1.0) -> Window:
    return Window(instance, revision, seconds, Counts(canary, {"error": canary}), Counts(baseline))


def test_one_gateway_with_enough_traffic_gives_one_merged_window_each() -> None:
    merger = Merger(1)
    for _ in range(3):
        (merged,) = merger.add(window(canary=4, baseline=96), ONE)
        assert (merged.canary.units, merged.baseline.units, merged.windows, merged.seconds) == (4, 96, 1, 1.0)
        assert merged.canary.rate("error") == Rate(4, 4)


def test_windows_wait_until_both_arms_have_enough() -> None:
    merger = Merger(1)
    assert merger.add(window(canary=9, baseline=1), ONE) == []
    assert merger.add(window(canary=0, baseline=2), ONE) == []
    (merged,) = merger.add(window(canary=0, baseline=1), ONE)
    assert (merged.canary.units, merged.baseline.units, merged.windows, merged.seconds) == (9, 4, 3, 3.0)


def test_a_window_is_closed_when_every_gateway_has_reported() -> None:
    merger = Merger(1)
    assert merger.add(window("a", canary=5, baseline=5), TWO) == []
    (merged,) = merger.add(window("b", canary=5, baseline=5), TWO)
    assert (merged.canary.units, merged.seconds) == (10, 1.0)


def test_a_late_gateway_does_not_hold_the_others_up() -> None:
    merger = Merger(1)
    assert merger.add(window("a", canary=5, baseline=5), TWO) == []
    (merged,) = merger.add(window("a", canary=6, baseline=6), TWO)
    assert merged.canary.units == 5


def test_windows_of_another_revision_are_never_merged_with_these() -> None:
    merger = Merger(1)
    assert merger.add(window(canary=3, baseline=50), ONE) == []
    assert merger.add(window(revision=2, canary=3, baseline=50), ONE) == []
    assert merger.add(window(revision=1, canary=50, baseline=50), ONE) == []
    (merged,) = merger.add(window(revision=2, canary=1, baseline=50), ONE)
    assert (merged.revision, merged.canary.units) == (2, 4)


def test_a_new_merger_and_a_lost_window_are_gaps() -> None:
    merger = Merger(1)
    (first,) = merger.add(window(canary=4, baseline=4), ONE)
    (second,) = merger.add(window(canary=4, baseline=4), ONE)
    merger.add(window(canary=1, baseline=4), ONE)
    merger.interrupted()
    (third,) = merger.add(window(canary=4, baseline=4), ONE)
    assert [first.gap, second.gap, third.gap] == [True, False, True]


def test_copies_are_merged_by_their_comparisons() -> None:
    merger = Merger(1)
    shadow = ShadowCounts(compared=2, different=1, errors=1, shed=7)
    assert merger.add(Window("a", 1, 1.0, baseline=Counts(50), shadow=shadow), ONE) == []
    (merged,) = merger.add(Window("a", 1, 1.0, baseline=Counts(50), shadow=shadow), ONE)
    assert merged.shadow == ShadowCounts(4, 2, 2, 14)
    assert merged.shadow.difference() == Rate(6, 4)


windows = st.builds(
    window,
    instance=st.sampled_from("ab"),
    revision=st.sampled_from([1, 1, 1, 2]),
    canary=st.integers(0, 6),
    baseline=st.integers(0, 6),
)


@given(st.lists(windows, max_size=60))
def test_no_unit_is_counted_twice_and_every_bet_has_enough(stream: list[Window]) -> None:
    merger = Merger(1)
    merged: list[Merged] = [m for w in stream for m in merger.add(w, TWO)]
    for revision in (1, 2):
        fed = sum(w.canary.units for w in stream if w.revision == revision)
        assert sum(m.canary.units for m in merged if m.revision == revision) <= fed
    assert all(min(m.canary.units, m.baseline.units) >= LEAST_UNITS for m in merged)
    assert [m.revision for m in merged] == sorted(m.revision for m in merged)


def test_one_arm_with_all_traffic_is_enough_when_it_is_only_watched() -> None:
    merger = Merger(1, alone=True)
    assert merger.add(window(canary=3), {"a"}) == []
    (merged,) = merger.add(window(canary=1), {"a"})
    assert (merged.canary.units, merged.baseline.units, merged.windows) == (4, 0, 2)
    compared = Merger(1)
    assert compared.add(window(canary=400), {"a"}) == []
