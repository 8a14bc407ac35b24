"""`python -m trainer.runner FOLDER`: the process of one attempt. It keeps the job's lease, and nothing of it survives when that is lost.

The trainer that started it writes FOLDER/attempt.json and reads FOLDER/outcome.json. SIGUSR1: the training is cancelled. SIGTERM: the
trainer stops and hands the job back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop
from servicekit import settings as settings_module
from servicekit import telemetry

from trainer.bootstrap import build_runner
from trainer.runner.keeper import Claim, run_kept
from trainer.settings import TrainerSettings


async def _run(folder: Path, settings: TrainerSettings) -> int:
    claim = Claim.read(folder)
    if os.getppid() != claim.parent_pid:
        return 3  # the trainer died before it could be told apart from another parent
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def tell(what: str) -> None:
        if not told.done():
            told.set_result(what)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell, "cancelled")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, tell, "stopped")
    async with build_runner(settings, claim, folder) as (attempt, queue):
        return await run_kept(attempt, queue, claim, folder, told, settings.job_lease_s)


def main() -> None:
    folder = Path(sys.argv[1])
    settings = settings_module.load(TrainerSettings)
    active = telemetry.setup("trainer", settings)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log presigned URLs, which are secrets
    try:
        claim = json.loads((folder / "attempt.json").read_text())
        with telemetry.start_span("training attempt", parent=telemetry.context_from(claim["traceparent"])):
            code = uvloop.run(_run(folder, settings))
    finally:
        active.shutdown()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
