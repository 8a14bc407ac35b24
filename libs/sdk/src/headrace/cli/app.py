"""Puts the commands together and turns errors into a sentence and an exit code.

Exit codes: 0 done; 1 the thing itself ended badly (a rollout rolled back, a training failed); 2 wrong input;
3 something does not answer; 4 not allowed; 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from headrace.cli import data, deadletters, deliveries, keys, models, predict, rollouts, stack, traces, training
from headrace.cli.output import fail
from headrace.http import HeadraceError

app = typer.Typer(
    name="headrace",
    help="Carries a finished training run to production by itself: evaluated, promoted, canaried, rolled back when it is worse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (stack, deliveries, training, models, rollouts, predict, traces, data, deadletters, keys):
    module.register(app)


def main() -> None:
    """Entry point of the console script."""
    try:
        code = app(standalone_mode=False)
    except HeadraceError as error:
        fail(error, as_json="--json" in sys.argv)
        code = error.exit_code
    except typer.TyperException as error:  # the words on the command line
        show = getattr(error, "show", None)
        show() if show is not None else print(error, file=sys.stderr)
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
