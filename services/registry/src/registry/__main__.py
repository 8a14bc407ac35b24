"""`python -m registry`: runs the registry; `migrate` brings its schema up to date, `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from registry.bootstrap import MIGRATIONS, build
from registry.settings import RegistrySettings

if __name__ == "__main__":
    main(RegistrySettings, build, MIGRATIONS)
