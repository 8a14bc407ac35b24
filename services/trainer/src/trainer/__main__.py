"""`python -m trainer`: runs the trainer; `migrate` brings its schema up to date, `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from trainer.bootstrap import MIGRATIONS, build
from trainer.settings import TrainerSettings

if __name__ == "__main__":
    main(TrainerSettings, build, MIGRATIONS)
