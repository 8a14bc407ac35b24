"""The causal tree: each span once, under its parent or under what it links to, whatever the spans claim."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from localstack.span_store import Reference, Span
from localstack.tree import Node, build, render
from rich.console import Console


def span(
    trace: int, number: int, parent: int = 0, *, links: tuple[tuple[int, int], ...] = (), name: str = "work", status: str = "ok"
) -> Span:
    return Span(
        trace_id=f"{trace:032x}",
        span_id=f"{number:016x}",
        parent_id=f"{parent:016x}" if parent else "",
        service="tracker",
        name=name,
        kind="internal",
        start_ns=number * 1_000_000,
        end_ns=number * 1_000_000 + 500_000,
        status=status,
        links=tuple(Reference(f"{to:032x}", f"{at:016x}") for to, at in links),
    )


def shape(node: Node) -> dict[int, object]:
    return {int(node.span.span_id, 16): [shape(child) for child in node.children]}


def every(nodes: list[Node]) -> list[Node]:
    return [one for node in nodes for one in (node, *every(node.children))]


def test_children_hang_under_their_parents_in_the_order_they_began() -> None:
    roots = build([span(1, 3, 1), span(1, 1), span(1, 2, 1), span(1, 4, 2)])
    assert [shape(root) for root in roots] == [{1: [{2: [{4: []}]}, {3: []}]}]


def test_a_trace_hangs_under_the_span_that_it_links_to() -> None:
    (root,) = build([span(1, 1), span(2, 5, links=((1, 1),)), span(2, 6, 5)])
    assert shape(root) == {1: [{5: [{6: []}]}]}
    assert root.children[0].linked
    assert not root.children[0].children[0].linked


def test_a_link_does_not_take_a_span_from_its_parent() -> None:
    roots = build([span(1, 1), span(2, 2), span(2, 3, 2, links=((1, 1),))])
    assert [shape(root) for root in roots] == [{1: []}, {2: [{3: []}]}]


def test_of_several_links_the_earliest_cause_counts() -> None:
    roots = build([span(1, 2), span(3, 1), span(2, 9, links=((1, 2), (3, 1)))])
    assert [shape(root) for root in roots] == [{1: [{9: []}]}, {2: []}]


def test_a_span_whose_parent_never_came_is_a_root() -> None:
    assert [shape(root) for root in build([span(1, 2, parent=1)])] == [{2: []}]


def test_links_in_a_circle_end_somewhere() -> None:
    roots = build([span(1, 1, links=((2, 2),)), span(2, 2, links=((1, 1),))])
    assert sorted(int(node.span.span_id, 16) for node in every(roots)) == [1, 2]


numbers = st.integers(1, 8)


@given(
    st.dictionaries(
        numbers, st.tuples(st.integers(1, 3), st.integers(0, 8), st.lists(st.tuples(st.integers(1, 3), numbers), max_size=3)), max_size=8
    )
)
def test_every_span_is_there_once(drawn: dict[int, tuple[int, int, list[tuple[int, int]]]]) -> None:
    spans = [span(trace, number, parent, links=tuple(links)) for number, (trace, parent, links) in drawn.items()]
    found = every(build(spans))
    assert sorted(node.span.span_id for node in found) == sorted(each.span_id for each in spans)


def test_what_is_printed_names_service_span_duration_and_error() -> None:
    console = Console(file=io.StringIO(), width=100)
    for each in render(build([span(1, 1, name="run.finished"), span(2, 2, links=((1, 1),), name="evaluate", status="error")])):
        console.print(each)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tracker run.finished  0.5 ms" in text
    assert "~> tracker evaluate  0.5 ms  error" in text
