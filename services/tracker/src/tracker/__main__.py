"""`python -m tracker`: runs the tracker; `migrate` brings its schema up to date, `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from tracker.bootstrap import MIGRATIONS, build
from tracker.settings import TrackerSettings

if __name__ == "__main__":
    main(TrackerSettings, build, MIGRATIONS)
