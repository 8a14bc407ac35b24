"""Puts the commands together and turns errors into a sentence and an exit code.

Exit codes: 0 done; 1 the thing itself ended badly (a rollout rolled back, a training failed); 2 wrong input;
3 something does not answer; 4 not allowed; 130 interrupted; 141 nobody reads on, as with `| head`.
"""

from __future__ import annotations

import os
import sys

import typer

from headrace.cli import data, deadletters, deliveries, keys, models, predict, rollouts, stack, sync, traces, training
from headrace.cli.output import fail
from headrace.http import HeadraceError

app = typer.Typer(
    name="headrace",
    help="Carries a finished training run to production by itself: evaluated, promoted, canaried, rolled back when it is worse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (stack, deliveries, training, models, rollouts, predict, traces, data, sync, deadletters, keys):
    module.register(app)


def main() -> None:
    """Entry point of the console script."""
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _unread()
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # typer and rich make one of the other
            raise
        code = _unread()
    sys.exit(code)


def _run() -> int:
    try:
        return int(app(standalone_mode=False) or 0)
    except HeadraceError as error:
        fail(error, as_json="--json" in sys.argv)
        return error.exit_code
    except typer.TyperException as error:  # the words on the command line
        show = getattr(error, "show", None)
        show() if show is not None else print(error, file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130


def _unread() -> int:
    """What is still to be written goes nowhere; the code is that of a program which a closed pipe ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141
