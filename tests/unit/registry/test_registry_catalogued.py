"""What clients say of a model and its versions: said twice it changes nothing, and what is served or on its way is not taken away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

import pytest
from registry.domain.errors import Refused
from registry.domain.models import By, Model, Policy
from registry.domain.versions import Deliverable, Evidence, Journey, Judgement
from servicekit.clock import SequentialIds

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ANN = By("ann", NOW, "because", person=True)
OPEN = Policy("flights", needed=0)
new_id = SequentialIds().uuid7


def judged(run: str) -> Judgement:
    file = Deliverable("model", "onnx", f"sha-{run}", 10, f"blobs/{run}", b"encoded")
    return Judgement("flights", Journey(f"journey-{run}", "flights", 1, run), file, Evidence(f"eval-{run}", 0, "", "report"), "author", {})


def with_version() -> Model:
    """Version 1 rolls out."""
    model = Model(UUID(int=7), "flights", NOW)
    model.passed(judged("r1"), OPEN, ANN, new_id, "")
    return model


def test_what_is_said_again_is_no_change() -> None:
    model = with_version()
    changes: tuple[Callable[[], object], ...] = (
        lambda: model.describe("of flights", ANN),
        lambda: model.describe_version(1, "the first", ANN),
        lambda: model.set_tag("team", "a", ANN),
        lambda: model.tag_version(1, "team", "a", ANN),
        lambda: model.set_alias("best", 1, ANN),
        lambda: model.delete_tag("team", ANN),
        lambda: model.untag_version(1, "team", ANN),
        lambda: model.delete_alias("best", ANN),
    )
    for once in changes:
        before = len(model.audits)
        once()
        assert len(model.audits) == before + 1
        once()
        assert len(model.audits) == before + 1
    assert (model.description, model.version(1).description, model.tags, model.version(1).tags) == ("of flights", "the first", {}, {})


def test_what_rolls_out_is_neither_renamed_nor_deleted() -> None:
    model = with_version()
    model.rename("flights", ANN)  # its own name
    changes: tuple[Callable[[], None], ...] = (
        lambda: model.rename("arrivals", ANN),
        lambda: model.delete(ANN),
        lambda: model.delete_version(1, ANN),
    )
    for change in changes:
        with pytest.raises(Refused, match="rolling out: abort the rollout first"):
            change()
    assert (model.name, model.deleted, model.version(1).deleted) == ("flights", False, False)


def test_what_serves_is_not_deleted() -> None:
    model = with_version()
    model.completed(1, "done", ANN)
    with pytest.raises(Refused, match="is in production: a model that is served"):
        model.delete(ANN)
    with pytest.raises(Refused, match="is in production: promote another"):
        model.delete_version(1, ANN)


def test_champion_is_nobodys_alias() -> None:
    model = with_version()
    with pytest.raises(Refused, match="champion is set by promotion"):
        model.set_alias("champion", 1, ANN)
    with pytest.raises(Refused, match="champion goes with"):
        model.delete_alias("champion", ANN)
