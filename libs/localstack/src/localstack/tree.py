"""The causal tree of a set of spans: children under parents, and a trace that began because of a span in another one under that span."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from rich.tree import Tree

from localstack.span_store import Reference, Span


@dataclass
class Node:
    """A span with what it caused, in the order in which that began. `linked`: it hangs here by a link, not as a child."""

    span: Span
    linked: bool = False
    children: list[Node] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As JSON: the span's fields, its duration in milliseconds, and its children."""
        span = self.span
        return {
            "trace_id": span.trace_id,
            "span_id": span.span_id,
            "service": span.service,
            "name": span.name,
            "kind": span.kind,
            "status": span.status,
            "start_ns": span.start_ns,
            "duration_ms": (span.end_ns - span.start_ns) / 1e6,
            "attributes": dict(span.attributes),
            "linked": self.linked,
            "children": [child.as_dict() for child in self.children],
        }


def build(spans: Iterable[Span]) -> list[Node]:
    """The roots, in the order in which they began. Every span is in the result once, whatever links and parents say.

    A span hangs under its parent; without one that is known, under the earliest known span that it links to; else it is a root.
    """
    nodes = {span.reference: Node(span) for span in sorted(spans, key=lambda each: (each.start_ns, each.span_id))}
    above: dict[Reference, Reference] = {}
    roots = []
    for reference, node in nodes.items():
        cause = _cause(node.span, nodes)
        if cause is None or _is_under(cause, reference, above):
            roots.append(node)
            continue
        above[reference] = cause
        node.linked = cause.trace_id != reference.trace_id or cause.span_id != node.span.parent_id
        nodes[cause].children.append(node)
    return roots


def _cause(span: Span, nodes: dict[Reference, Node]) -> Reference | None:
    parent = Reference(span.trace_id, span.parent_id)
    if parent in nodes:
        return parent
    known = [link for link in span.links if link in nodes]
    return min(known, key=lambda link: nodes[link].span.start_ns, default=None)


def _is_under(start: Reference, sought: Reference, above: dict[Reference, Reference]) -> bool:
    """Whether `sought` is `start` or above it: hanging it there would close a circle."""
    at: Reference | None = start
    while at is not None:
        if at == sought:
            return True
        at = above.get(at)
    return False


def render(roots: Iterable[Node]) -> list[Tree]:
    """One rich tree per root: service, name, duration, error."""
    return [_branch(root, None) for root in roots]


def _branch(node: Node, parent: Tree | None) -> Tree:
    span = node.span
    line = Text()
    if node.linked:
        line.append("~> ", "dim")
    line.append(span.service, "bold")
    line.append(f" {span.name}  ")
    line.append(f"{(span.end_ns - span.start_ns) / 1e6:.1f} ms", "dim")
    if span.status == "error":
        line.append("  error", "red")
    branch = Tree(line) if parent is None else parent.add(line)
    for child in node.children:
        _branch(child, branch)
    return branch
