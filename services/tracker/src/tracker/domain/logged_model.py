"""A logged model as MLflow 3 has it: made PENDING, filled with files, then READY or FAILED; and the words that it is searched by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tracker.domain.artifact import location
from tracker.domain.errors import Problem, Refused
from tracker.domain.filters import NUMERIC, Attribute, Filter, Kind, Op, Vocabulary
from tracker.domain.record import ModelMetric
from tracker.domain.run import MAX_NAME, check_text

MAX_PARAMS, MAX_TAGS = 1_000, 1_000
"""Per request. MLflow's clients send 100 params at a time."""

_NOT_IN_NAMES = frozenset("/:.%\"'")


class ModelStatus(StrEnum):
    """As MLflow names them."""

    PENDING = "PENDING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class LoggedModel:
    """One logged model. `source_run_id` is "" for one that no run made; `user` is who made it."""

    model_id: str
    experiment_id: int
    name: str
    model_type: str
    source_run_id: str
    user: str
    status: ModelStatus
    lifecycle_stage: str
    created_ms: int
    updated_ms: int

    @property
    def artifact_uri(self) -> str:
        return location(self.experiment_id, self.model_id)

    def finalize(self, status: ModelStatus, now_ms: int) -> LoggedModel:
        """The model as it is when its files are all there, or never will be. Repeatable. Raises Refused for one that was ready or failed
        and is to be otherwise: whoever saw it ready has used it."""
        if self.status is status:
            return self
        if self.status is not ModelStatus.PENDING:
            raise Refused(f"the logged model {self.model_id} is {self.status} already, which does not change")
        return dataclasses.replace(self, status=status, updated_ms=now_ms)

    def delete(self, now_ms: int) -> LoggedModel:
        return dataclasses.replace(self, lifecycle_stage="deleted", updated_ms=now_ms)


@dataclass(frozen=True, slots=True)
class LoggedModelView:
    """A logged model with what was logged of it; of each metric, run and data set the latest point."""

    model: LoggedModel
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[tuple[str, ModelMetric]] = ()
    """With the run that logged each."""


def check_model_name(name: str) -> list[Problem]:
    """What is wrong with a name: MLflow writes it into addresses."""
    if not name.strip() or _NOT_IN_NAMES & set(name):
        return [Problem("name", "a name is needed, without / : . % and quotes")]
    wrong = check_text(name, MAX_NAME)
    return [Problem("name", wrong)] if wrong else []


@dataclass(frozen=True, slots=True)
class OnDataset:
    """A data set that metrics must be about; `digest` "" is any of that name."""

    name: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ModelOrder:
    """A key to order by: an attribute, or a metric, then on a data set if one is named."""

    kind: Kind
    key: str
    ascending: bool
    dataset: OnDataset | None = None


@dataclass(frozen=True, slots=True)
class ModelSearch:
    """What is searched for, in the order of MLflow: newest first when nothing else is asked. `source_run_id` "" is any."""

    experiment_ids: tuple[int, ...]
    where: Filter
    datasets: tuple[OnDataset, ...]
    order_by: tuple[ModelOrder, ...]
    source_run_id: str
    offset: int
    limit: int


_TEXTS = frozenset({Op.EQ, Op.NE, Op.LIKE, Op.ILIKE, Op.IN, Op.NOT_IN})


def _attribute(name: str, ops: frozenset[Op], *spellings: str) -> dict[str, Attribute]:
    return dict.fromkeys((name, *spellings), Attribute(name, ops))


LOGGED_MODELS = Vocabulary(
    kinds={"metrics": Kind.METRIC, "params": Kind.PARAM, "tags": Kind.TAG, "attributes": Kind.ATTRIBUTE},
    ops={Kind.METRIC: NUMERIC, Kind.PARAM: _TEXTS, Kind.TAG: _TEXTS},
    attributes={
        **_attribute("model_id", _TEXTS),
        **_attribute("name", _TEXTS),
        **_attribute("model_type", _TEXTS),
        **_attribute("status", _TEXTS),
        **_attribute("source_run_id", _TEXTS),
        **_attribute("created_ms", NUMERIC, "creation_timestamp", "creation_time", "creation_timestamp_ms"),
        **_attribute("updated_ms", NUMERIC, "last_updated_timestamp", "last_updated_time", "last_updated_timestamp_ms"),
    },
    ordered=frozenset({Kind.ATTRIBUTE, Kind.METRIC}),
)
