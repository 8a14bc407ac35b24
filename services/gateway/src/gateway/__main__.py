"""`python -m gateway`: runs the gateway; `settings` documents its variables."""

from __future__ import annotations

from servicekit.main import main

from gateway.bootstrap import build
from gateway.settings import GatewaySettings

if __name__ == "__main__":
    main(GatewaySettings, build)
