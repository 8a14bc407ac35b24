"""headrace sync import|export: what MLflow's stores hold, into Headrace and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.output import JsonFlag, print_json, say, table
from headrace.http import Client
from headrace.sync.catalogue import Catalogue
from headrace.sync.count import count
from headrace.sync.exporter import Exporter
from headrace.sync.importer import Importer
from headrace.sync.opening import open_source
from headrace.sync.report import Report

sync = typer.Typer(help="MLflow's stores: taken in, and written.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(sync, name="sync")


@sync.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="An mlruns folder, a SQLite file, or a URI such as sqlite:///mlflow.db.")],
    artifacts_root: Annotated[
        Path | None, typer.Option("--artifacts-root", help="The local folder that artifacts may be read from.")
    ] = None,
    experiment: Annotated[str | None, typer.Option("--experiment", help="Only the experiment of this name.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what the source holds; send nothing.")] = False,
    json: JsonFlag = False,
) -> None:
    """Bring experiments, runs, artifacts and models in. Repeat it at any time: what is there already stays as it is."""
    report = Report(say)
    opened = open_source(source, artifacts_root, report)
    try:
        if dry_run:
            count(opened, report, experiment)
        else:
            with Client(timeout_s=300.0, patience_s=60.0) as client:
                importer = Importer(client, opened, report)
                importer.experiments(experiment)
                models = Catalogue(client, opened, report, importer.run_ids, importer.model_ids)
                models.models(only_of_runs=experiment is not None)
    finally:
        opened.close()
    _tell(report.json(), json, "would be taken" if dry_run else "taken")


@sync.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The mlruns folder to write.")],
    experiment: Annotated[str | None, typer.Option("--experiment", help="Only the experiment of this name.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write everything as MLflow's file store has it, artifacts too. Repeat it at any time: what is there already is not fetched again."""
    report = Report(say)
    with Client(timeout_s=300.0, patience_s=60.0) as client:
        Exporter(client, folder, report).write(experiment)
    _tell(report.json(), json, "written")


def _tell(told: dict[str, Any], json: bool, taken: str) -> None:
    if json:
        print_json(told)
        return
    kinds = list(dict.fromkeys([*told["taken"], *told["already_there"]]))
    table(["", taken, "there already"], ([kind, told["taken"].get(kind, 0), told["already_there"].get(kind, 0)] for kind in kinds))
    if told["not_taken"]:
        say(f"{told['not_taken']} things were not taken; the lines above say which and why")
