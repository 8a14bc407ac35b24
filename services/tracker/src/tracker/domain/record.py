"""A run's whole record as MLflow's API shows it, and what its clients describe as the inputs and outputs of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tracker.domain.errors import Problem, Rejected
from tracker.domain.run import Metric, Run, check_text

MAX_DATASETS, MAX_RUN_MODELS = 1_000, 1_000
"""Per request."""

MAX_DATASET_NAME, MAX_DIGEST, MAX_SOURCE, MAX_SCHEMA, MAX_PROFILE = 500, 36, 65_535, 1_048_575, 16_777_215
MAX_INPUT_TAG_KEY, MAX_INPUT_TAG, MAX_INPUT_TAGS = 255, 500, 100
MAX_MODEL_ID = 250
"""Lengths in characters, as MLflow has them."""


@dataclass(frozen=True, slots=True)
class DescribedDataset:
    """A data set as a client describes it. Its source is a text: nothing here ever opens it."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str = ""
    profile: str = ""


@dataclass(frozen=True, slots=True)
class DatasetInput:
    """A data set that a run reads, and what for (tag mlflow.data.context)."""

    dataset: DescribedDataset
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """A logged model that a run made, and at which step."""

    model_id: str
    step: int


@dataclass(frozen=True, slots=True)
class ModelMetric:
    """A point of a run's metric that is about a logged model; about it on a data set when one is named."""

    metric: Metric
    model_id: str
    dataset_name: str = ""
    dataset_digest: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A run with all that it logged; of each metric the latest point."""

    run: Run
    metrics: Sequence[Metric] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetInput] = ()
    model_inputs: Sequence[str] = ()
    model_outputs: Sequence[ModelOutput] = ()


def check_dataset_inputs(inputs: Sequence[DatasetInput]) -> None:
    """Raises Rejected with what is wrong with the data sets of a request."""
    if len(inputs) > MAX_DATASETS:
        raise Rejected([Problem("datasets", f"at most {MAX_DATASETS} in a request, these are {len(inputs)}")])
    problems: list[Problem] = []
    for index, one in enumerate(inputs):
        dataset, where = one.dataset, f"datasets[{index}]"
        for name, text, limit, needed in (
            ("name", dataset.name, MAX_DATASET_NAME, True),
            ("digest", dataset.digest, MAX_DIGEST, True),
            ("source_type", dataset.source_type, MAX_DATASET_NAME, True),
            ("source", dataset.source, MAX_SOURCE, True),
            ("schema", dataset.schema, MAX_SCHEMA, False),
            ("profile", dataset.profile, MAX_PROFILE, False),
        ):
            if wrong := check_text(text, limit) or ("is missing" if needed and not text else ""):
                problems.append(Problem(f"{where}.dataset.{name}", wrong))
        if len(one.tags) > MAX_INPUT_TAGS:
            problems.append(Problem(f"{where}.tags", f"at most {MAX_INPUT_TAGS}"))
        for key, value in one.tags.items():
            if wrong := check_text(key, MAX_INPUT_TAG_KEY) or check_text(value, MAX_INPUT_TAG):
                problems.append(Problem(f"{where}.tags[{key[:50]!r}]", wrong))
    if problems:
        raise Rejected(problems[:20])


def check_models(model_ids: Sequence[str]) -> None:
    """Raises Rejected with what is wrong with the models of a request."""
    if len(model_ids) > MAX_RUN_MODELS:
        raise Rejected([Problem("models", f"at most {MAX_RUN_MODELS} in a request, these are {len(model_ids)}")])
    problems = [
        Problem(f"models[{index}].model_id", wrong)
        for index, model_id in enumerate(model_ids)
        if (wrong := check_text(model_id, MAX_MODEL_ID) or ("" if model_id else "is missing"))
    ]
    if problems:
        raise Rejected(problems[:20])
