"""`python -m evaluator`: runs the evaluator; `migrate` brings its schema up to date, `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from evaluator.bootstrap import MIGRATIONS, build
from evaluator.settings import EvaluatorSettings

if __name__ == "__main__":
    main(EvaluatorSettings, build, MIGRATIONS)
