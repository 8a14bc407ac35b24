"""The command line that all services share: run, migrate, or print the table of settings."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop
from pydantic import ValidationError

from servicekit import lifecycle, telemetry
from servicekit import settings as settings_module
from servicekit.lifecycle import Component
from servicekit.settings import SettingsT

_log = logging.getLogger(__name__)

Build = Callable[[SettingsT], Sequence[Component] | Awaitable[Sequence[Component]]]
"""A service's `bootstrap.build`: called within the event loop, returns the components in the order in which they start."""


def main(
    settings_class: type[SettingsT],
    build: Build[SettingsT],
    migrations: Path | None = None,
    argv: Sequence[str] | None = None,
    *,
    schema: str | None = None,
) -> None:
    """Runs a service: `python -m X [--announce FILE]`, `python -m X migrate`, `python -m X settings`.

    `migrations` is the folder that holds `versions/`, `schema` the service's schema (default: its name). Ends with code 2 and
    the fields' names when settings are wrong or missing, with 1 when the service failed.
    """
    name = settings_class.service_name
    arguments = _arguments(name, migrations is not None, argv)
    if arguments.command == "settings":
        sys.stdout.write(settings_module.markdown(settings_class))
        return
    try:
        settings = settings_module.load(settings_class)
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False, include_context=False):
            field = ".".join(map(str, problem["loc"]))
            sys.stderr.write(f"{settings_module.PREFIX}{field.upper()}: {problem['msg']}\n")
        raise SystemExit(2) from None
    active = telemetry.setup(name, settings)
    try:
        if arguments.command == "migrate" and migrations is not None:
            from servicekit import migrate  # Alembic is needed here only, and costs time to import

            try:
                migrate.run(settings, schema or name, migrations)
            except Exception as error:
                _log.critical("the schema of %s could not be migrated", name, exc_info=error)
                raise SystemExit(1) from None
        else:
            uvloop.run(_run(name, settings, build, arguments.announce))
    finally:
        active.shutdown()


async def _run(name: str, settings: SettingsT, build: Build[SettingsT], announce: Path | None) -> None:
    built = build(settings)
    components = await built if inspect.isawaitable(built) else built
    await lifecycle.run(name, settings, components, announce=announce)


def _arguments(name: str, has_migrations: bool, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=f"The {name} service; settings come from HEADRACE_* variables.")
    parser.add_argument("--announce", type=Path, metavar="FILE", help="write the ports and the process id to FILE once it listens")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    if has_migrations:
        commands.add_parser("migrate", help="bring the schema to the newest revision and exit")
    commands.add_parser("settings", help="print the settings as a Markdown table and exit")
    return parser.parse_args(argv)
