"""The store of spans: found by trace and attribute, connected along links both ways, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from localstack.span_store import Reference, Span, SpanStore


def span(trace: int, number: int, *, links: tuple[int, ...] = (), **attributes: object) -> Span:
    return Span(
        trace_id=f"{trace:032x}",
        span_id=f"{number:016x}",
        parent_id="",
        service="gateway",
        name="predict",
        kind="server",
        start_ns=number,
        end_ns=number + 1,
        attributes={name.replace("__", "."): value for name, value in attributes.items()},
        links=tuple(Reference(f"{to:032x}", f"{1:016x}") for to in links),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpanStore]:
    store = SpanStore(tmp_path / "spans.sqlite")
    yield store
    store.close()


def names(spans: list[Span]) -> list[tuple[int, int]]:
    return [(int(each.trace_id, 16), int(each.span_id, 16)) for each in spans]


def test_a_trace_comes_back_as_it_was_stored(store: SpanStore) -> None:
    kept = span(1, 1, headrace__request_id="r1", count=3, tags=["a", "b"])
    store.add([kept])
    assert store.connected([kept.trace_id]).spans == [kept]


def test_a_span_sent_twice_is_stored_once(store: SpanStore) -> None:
    store.add([span(1, 1)])
    store.add([span(1, 1), span(1, 2)])
    assert store.count() == 2


def test_traces_are_found_by_an_attribute_of_ours_newest_first(store: SpanStore) -> None:
    store.add(
        [
            span(1, 1, headrace__run_id="a"),
            span(2, 2, headrace__run_id="a"),
            span(3, 3, headrace__run_id="b", other_id="a", headrace__arm="a"),
        ]
    )
    assert store.traces_with("headrace.run_id", "a") == [f"{2:032x}", f"{1:032x}"]
    assert store.traces_with("other_id", "a") == store.traces_with("headrace.arm", "a") == []


def test_links_are_followed_in_both_directions_and_over_several_traces(store: SpanStore) -> None:
    store.add([span(1, 1), span(2, 2, links=(1,)), span(3, 3, links=(2,)), span(9, 9)])
    for start in (1, 2, 3):
        assert names(store.connected([f"{start:032x}"]).spans) == [(1, 1), (2, 2), (3, 3)]


def test_following_links_ends_at_200_traces_and_says_so(store: SpanStore) -> None:
    store.add([span(1, 1), *(span(number, number, links=(1,)) for number in range(2, 302))])
    found = store.connected([f"{1:032x}"])
    assert found.truncated
    assert len(found.spans) == 200


@pytest.mark.parametrize("linked", [False, True])
def test_the_oldest_go_first_when_there_are_too_many(tmp_path: Path, linked: bool) -> None:
    store = SpanStore(tmp_path / "small.sqlite", most_spans=100)
    for number in range(1, 501):
        store.add([span(number, number, links=(number - 1,) if linked else (), headrace__run_id=f"r{number}")])
        assert store.count() <= 100
    assert store.traces_with("headrace.run_id", "r500") == [f"{500:032x}"]
    assert store.traces_with("headrace.run_id", "r1") == []
    store.close()
    reopened = SpanStore(tmp_path / "small.sqlite", most_spans=100)
    assert 75 <= reopened.count() <= 100
    reopened.close()


def test_requests_by_the_thousand_do_not_drive_out_the_way_a_version_came_about(tmp_path: Path) -> None:
    store = SpanStore(tmp_path / "small.sqlite", most_spans=100)
    store.add([span(1, 1, headrace__run_id="trained"), span(2, 2, links=(1,))])
    for number in range(10, 2000):
        store.add([span(number, number, headrace__request_id=f"r{number}")])
    assert names(store.connected(store.traces_with("headrace.run_id", "trained")).spans) == [(1, 1), (2, 2)]
    store.close()


def test_what_is_stored_survives_the_process(tmp_path: Path) -> None:
    first = SpanStore(tmp_path / "spans.sqlite")
    first.add([span(1, 1)])
    first.close()
    second = SpanStore(tmp_path / "spans.sqlite")
    assert second.count() == 1
    second.close()
