"""`python -m deployer`: runs the deployer; `migrate` brings its schema up to date, `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from deployer.bootstrap import MIGRATIONS, build
from deployer.settings import DeployerSettings

if __name__ == "__main__":
    main(DeployerSettings, build, MIGRATIONS)
