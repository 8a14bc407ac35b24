"""Histories of metrics in a real PostgreSQL: pages, several runs, and samples that keep MLflow's rule and their size."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from servicekit.access import Caller
from servicekit.errors import Forbidden, Invalid, NotFound
from tracker.adapters import history
from tracker.domain.run import Metric
from tracker.handlers import NewRun
from tracker.histories import Histories

VIEWER = Caller("gateway", "vic", frozenset({"viewer"}))
Point = tuple[int, int, float]


def sample(points: Sequence[Point], parts: int) -> list[Point]:
    """MLflow's rule: the first of each of so many parts of the same size, the last of all in the place of the last."""
    ordered = sorted(points)
    size, larger = divmod(len(ordered), parts)
    starts, at = [], 0
    for part in range(min(parts, len(ordered))):
        starts.append(at)
        at += size + (part < larger)
    found = [ordered[start] for start in starts]
    if found[-1] != ordered[-1]:
        found = [*found[:-1], ordered[-1]] if len(found) == parts else [*found, ordered[-1]]
    return found


async def run_with(stored: Any, editor: Caller, points: Sequence[Point], key: str = "loss") -> str:
    view, _ = await stored.tracker.create_run(editor, NewRun(0))
    for at in range(0, len(points), 1000):
        batch = [Metric(key, value, time, step) for step, time, value in points[at : at + 1000]]
        await stored.tracker.log_batch(editor, view.run.run_id, batch, {}, {})
    return str(view.run.run_id)


async def sampled(histories: Histories, run_id: str, most: int, steps: tuple[int | None, int | None] = (None, None)) -> list[Point]:
    found = await histories.sampled(VIEWER, [run_id], "loss", steps, most)
    assert {of for of, _ in found} <= {run_id}
    return [(one.step, one.timestamp_ms, one.value) for _, one in found]


async def test_a_history_comes_in_pages_by_time(stored: Any, editor: Caller) -> None:
    points = [(9 - index // 2, 100 + index // 3, float(index % 5)) for index in range(20)]
    run_id = await run_with(stored, editor, points)
    histories = Histories(history.SqlHistories(stored.engine))
    expected = sorted((time, step, value) for step, time, value in points)
    whole, token = await histories.page(VIEWER, run_id, "loss", None, "")
    assert ([(one.timestamp_ms, one.step, one.value) for one in whole], token) == (expected, "")
    found: list[tuple[int, int, float]] = []
    token = ""
    while True:
        page, token = await histories.page(VIEWER, run_id, "loss", 7, token)
        found += [(one.timestamp_ms, one.step, one.value) for one in page]
        if not token:
            break
    assert found == expected
    assert await histories.page(VIEWER, run_id, "none", None, "") == ([], "")


async def test_pages_go_on_after_points_that_are_no_numbers(stored: Any, editor: Caller) -> None:
    run_id = await run_with(stored, editor, [(0, 1, math.nan), (0, 1, 1.0), (0, 2, math.nan), (1, 1, math.nan)])
    histories = Histories(history.SqlHistories(stored.engine))
    token, found = "", []
    for _ in range(4):
        page, token = await histories.page(VIEWER, run_id, "loss", 1, token)
        found += [(one.timestamp_ms, one.step, repr(one.value)) for one in page]
    assert (found, token) == ([(1, 0, "1.0"), (1, 0, "nan"), (1, 1, "nan"), (2, 0, "nan")], "")


async def test_several_runs_come_by_run_and_time(stored: Any, editor: Caller) -> None:
    first = await run_with(stored, editor, [(1, 5, 0.5), (2, 4, 0.25)])
    second = await run_with(stored, editor, [(1, 1, 1.0)])
    histories = Histories(history.SqlHistories(stored.engine))
    found = await histories.of_runs(VIEWER, [first, second], "loss", 10)
    expected = sorted([(first, 4, 2), (first, 5, 1), (second, 1, 1)])
    assert [(run_id, one.timestamp_ms, one.step) for run_id, one in found] == expected
    assert [
        (run_id, one.timestamp_ms, one.step) for run_id, one in await histories.of_runs(VIEWER, [first, second], "loss", 2)
    ] == expected[:2]


@pytest.mark.parametrize("most", [1, 2, 7, 60, 100, 101, 2500])
async def test_a_sample_keeps_mlflows_rule(stored: Any, editor: Caller, most: int) -> None:
    chance = random.Random(most)
    points = [(chance.randrange(40), chance.randrange(5), float(chance.randrange(3))) for _ in range(130)]
    points = list(dict.fromkeys(points))
    run_id = await run_with(stored, editor, points)
    histories = Histories(history.SqlHistories(stored.engine))
    assert await sampled(histories, run_id, most) == sample(points, most)
    within = [point for point in points if 10 <= point[0] <= 20]
    assert await sampled(histories, run_id, most, (10, 20)) == sample(within, most)
    assert await sampled(histories, run_id, most, (100, 200)) == []


@pytest.mark.parametrize(
    "points",
    [
        [(step, step * 10, float(step)) for step in range(3_000)],
        [(0, time, float(time % 7)) for time in range(3_000)],
        [(index % 3, index, 1.0) for index in range(3_000)],
        [(0, 1, float(value)) for value in range(3_000)],
        [(step if step < 2_999 else 2**63 - 1, 5, 1.0) for step in range(3_000)],
        [(step if step else -(2**63), 5, 1.0) for step in range(3_000)],
        [(step, 1, math.nan) for step in range(3_000)],
    ],
    ids=["steps", "times of one step", "times of few steps", "values of one time", "far last", "far first", "no numbers"],
)
async def test_a_sample_of_a_long_history_has_its_ends_and_its_size(
    stored: Any, editor: Caller, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "COUNTED", 1_000)
    run_id = await run_with(stored, editor, points)
    histories = Histories(history.SqlHistories(stored.engine))
    for most in (1, 2, 100):
        found = await sampled(histories, run_id, most)
        logged = {repr(point) for point in points}
        assert {repr(point) for point in found} <= logged
        assert len({repr(point) for point in found}) == len(found) <= most
        order = [(step, time) for step, time, _ in found]
        assert order == sorted(order)
        assert found[-1][:2] == max(points, key=lambda point: point[:2])[:2]
        assert most == 1 or found[0][:2] == min(points, key=lambda point: point[:2])[:2]


async def test_a_sample_of_many_even_steps_is_even(stored: Any, editor: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(step, step, float(step)) for step in range(4_000)]
    run_id = await run_with(stored, editor, points)
    histories = Histories(history.SqlHistories(stored.engine))
    counted = await sampled(histories, run_id, 100)
    monkeypatch.setattr(history, "COUNTED", 1_000)
    assert await sampled(histories, run_id, 100) == counted == sample(points, 100)
    one_step = [(0, time, 1.0) for time in range(4_000)]
    other = await run_with(stored, editor, one_step)
    assert await sampled(histories, other, 100) == sample(one_step, 100)


async def test_what_is_wrong_is_told(stored: Any, editor: Caller) -> None:
    run_id = await run_with(stored, editor, [(0, 1, 1.0)])
    other = await run_with(stored, editor, [(0, 1, 1.0)])
    histories = Histories(history.SqlHistories(stored.engine))
    token_of = Caller("gateway", f"run:{run_id}", frozenset(), run_id, 0)
    assert len(await histories.sampled(token_of, [run_id], "loss", (None, None), 10)) == 1
    with pytest.raises(Forbidden):
        await histories.sampled(token_of, [run_id, other], "loss", (None, None), 10)
    with pytest.raises(NotFound, match="0000"):
        await histories.of_runs(VIEWER, [run_id, "0" * 32], "loss", 10)
    for steps, most, why in (
        ((5, 4), 10, "end_step must be greater"),
        ((5, None), 10, "both must be specified"),
        ((0, 2**63), 10, "64 bits"),
        ((None, None), 0, "between 1 and 2500"),
        ((None, None), 2501, "between 1 and 2500"),
    ):
        with pytest.raises(Invalid, match=why):
            await histories.sampled(VIEWER, [run_id], "loss", steps, most)
    with pytest.raises(Invalid, match="at most 100"):
        await histories.of_runs(VIEWER, [run_id] * 101, "loss", 10)
    for most in (0, -1):
        with pytest.raises(Invalid, match="positive"):
            await histories.page(VIEWER, run_id, "loss", most, "")
    _, token = await histories.page(VIEWER, run_id, "loss", 1, "")
    assert token == ""
    with pytest.raises(Invalid, match="page token"):
        await histories.page(VIEWER, run_id, "loss", 1, "bm8=")
