"""How long the whole stack takes to start, from nothing and on what it kept, and the memory of each of its processes.

Cold: an empty state folder, with the packages in the cache: databases and logs are made, migrations run. Warm: the same folder again after
`down`. Both are times of `localstack.api.up`, until all parts say that they are ready. Memory is taken after a first version went live and
was asked, each shared page counted by its share (PSS), with the processes that a part has started.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path

from localstack import api, layout
from localstack.api import PartStatus
from localstack.throwaway import ThrowawayServers

from tests.bench.run import Figure
from tests.e2e.world import GOOD, World, model_bytes

ROUNDS = 3
REQUESTS = 200
_NAME = "bench-stack"


async def figures(servers: ThrowawayServers) -> list[Figure]:
    """Starts the stack six times; takes two to three minutes."""
    return await asyncio.to_thread(_measure, servers)


def _measure(servers: ThrowawayServers) -> list[Figure]:
    cold, warm = [], []
    memory: list[PartStatus] = []
    for number in range(ROUNDS):
        state = servers.directory / f"stack-{number}" / ".headrace"
        layout.make(state, random_ports=True)
        try:
            cold.append(_start(servers, state))
            api.down(state)
            warm.append(_start(servers, state))
            if number == ROUNDS - 1:
                _use(state)
                memory = [row for row in api.status(state) if row.pid is not None]
        finally:
            api.down(state)
        print(f"  cold {cold[-1]:.1f} s, warm {warm[-1]:.1f} s", file=sys.stderr, flush=True)
    made = [
        _figure("stack: cold start, median", statistics.median(cold), "s"),
        _figure("stack: warm start, median", statistics.median(warm), "s"),
    ]
    made += [_figure(f"stack: memory of {row.name}", row.rss_bytes / 2**20, "MiB") for row in memory]
    return [*made, _figure("stack: memory of all", sum(row.rss_bytes for row in memory) / 2**20, "MiB")]


def _start(servers: ThrowawayServers, state: Path) -> float:
    began = time.monotonic()
    api.up(state, servers.progress, die_with_us=True)
    return time.monotonic() - began


def _use(state: Path) -> None:
    """One version goes live and answers: until then some parts have not loaded what they need."""
    world = World(layout.make(state, running=True), _NAME)
    try:
        world.apply()
        world.arrives(world.finish_run(model_bytes(GOOD)), "completed")
        for _ in range(REQUESTS):
            world.infer().raise_for_status()
    finally:
        world.close()


def _figure(name: str, value: float, unit: str) -> Figure:
    return {"name": name, "value": round(value, 2), "unit": unit, "aim": None, "lower_is_better": True, "reference": None}
