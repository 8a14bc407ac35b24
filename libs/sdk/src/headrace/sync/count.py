"""Counts what a source holds, and says what of it cannot be taken, without sending anything."""

from __future__ import annotations

from headrace.http import InvalidInput
from headrace.sync.report import Report
from headrace.sync.source import Source


def count(source: Source, report: Report, name: str | None) -> None:
    """Raises InvalidInput when there is no experiment of that name."""
    chosen = [one for one in source.experiments() if name in (None, one.name)]
    if name is not None and not chosen:
        raise InvalidInput(f"the source has no experiment {name!r}")
    for experiment in chosen:
        report.taken["experiments"] += 1
        for run in source.runs(experiment):
            report.taken["runs"] += 1
            report.taken["metric points"] += sum(1 for _ in source.points(run))
            owner, usual = f"run {run.id}", f"{run.experiment_id}/{run.id}/artifacts"
            report.taken["artifacts"] += sum(1 for _ in source.artifacts.files(owner, run.artifact_uri, usual))
        for model in source.logged_models(experiment):
            report.taken["logged models"] += 1
            owner, usual = f"logged model {model.id}", f"{model.experiment_id}/models/{model.id}/artifacts"
            report.taken["artifacts"] += sum(1 for _ in source.artifacts.files(owner, model.artifact_uri, usual))
    if name is None:
        for registered in source.registered_models():
            report.taken["registered models"] += 1
            report.taken["model versions"] += sum(1 for _ in source.versions(registered))
