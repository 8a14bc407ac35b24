"""The demo's client application: sends real flights of May at a steady rate and keeps its own count of every answer.

Runs as a process of its own, `python -m scripts.demo.client ROWS LEDGER --url .. --endpoint .. --rate ..`, until SIGTERM. The rate is
kept whatever the answers do (open loop), and a request's latency counts from when it was due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

_TIMEOUT_S = 30.0


class Ledger:
    """What became of every request, by the version that answered. `relieved`: those of a version that another answered in its place."""

    def __init__(self) -> None:
        self.sent = 0
        self.latencies_ms: defaultdict[str, list[float]] = defaultdict(list)
        self.fallbacks: Counter[str] = Counter()
        self.last_request: dict[str, str] = {}
        self.relieved: Counter[str] = Counter()
        self.first_relieved: dict[str, float] = {}
        self.failures: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def as_dict(self, *, running: bool) -> dict[str, Any]:
        return {
            "running": running,
            "sent": self.sent,
            "answered": sum(len(values) for values in self.latencies_ms.values()),
            "failures": dict(self.failures),
            "versions": {
                version: {
                    "requests": len(values := self.latencies_ms.get(version, [])),
                    "failures": self.failed[version],
                    "p50_ms": percentile(values, 0.50) if values else None,
                    "p99_ms": percentile(values, 0.99) if values else None,
                    "fallbacks": self.fallbacks[version],
                    "relieved": self.relieved[version],
                    "first_relieved": self.first_relieved.get(version),
                    "last_request": self.last_request.get(version, ""),
                }
                for version in sorted({*self.latencies_ms, *self.failed, *self.relieved})
            },
        }

    def stood_in(self, version: str, arm: str) -> None:
        """This version answered in the place of an arm, which is named like v3-g7."""
        relieved = arm.removeprefix("v").partition("-")[0]
        self.fallbacks[version] += 1
        self.relieved[relieved] += 1
        self.first_relieved.setdefault(relieved, time.time())

    def fail(self, cause: str, version: str) -> None:
        """A request got no answer; `version` is whose it was, empty when nobody said."""
        self.failures[cause[:200]] += 1
        self.failed[version or "unknown"] += 1


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all values do not exceed. Raises ValueError without values."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


async def drive(rows: list[bytes], ledger: Ledger, args: argparse.Namespace, stopping: asyncio.Event) -> None:
    """Sends until told to stop, then waits for the answers that are still to come."""
    headers = {"authorization": f"Bearer {os.environ['HEADRACE_API_KEY']}", "content-type": "application/json"}
    url = f"{args.url}/v2/models/{args.endpoint}/infer"
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[None]] = set()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        began = loop.time()
        written = began
        while not stopping.is_set():
            due = began + ledger.sent / args.rate
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(_one(session, url, rows[ledger.sent % len(rows)], due, ledger))
            ledger.sent += 1
            pending.add(task)
            task.add_done_callback(pending.discard)
            if loop.time() - written > 1.0:
                written = loop.time()
                write(args.ledger, ledger.as_dict(running=True))
        await asyncio.gather(*pending)
    write(args.ledger, ledger.as_dict(running=False))


async def _one(session: aiohttp.ClientSession, url: str, body: bytes, due: float, ledger: Ledger) -> None:
    version = ""
    try:
        async with session.post(url, data=body) as answer:
            version = answer.headers.get("X-Headrace-Model-Version", "")
            content = await answer.json(content_type=None)
            if answer.status != 200 or not content.get("outputs"):
                ledger.fail(f"{answer.status} {content.get('error', content)}", version)
                return
            version = answer.headers["X-Headrace-Model-Version"]
            ledger.last_request[version] = answer.headers["X-Request-Id"]
            if arm := answer.headers.get("X-Headrace-Fallback"):
                ledger.stood_in(version, arm)
            ledger.latencies_ms[version].append((asyncio.get_running_loop().time() - due) * 1000)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        ledger.fail(f"{type(error).__name__}: {error}", version)


def write(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file at once, so that nobody reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


async def _run(args: argparse.Namespace) -> None:
    rows = [line.encode() for line in args.rows.read_text().splitlines()]
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await drive(rows, Ledger(), args, stopping)


def main() -> None:
    """Entry point. The key comes from HEADRACE_API_KEY."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="one V2 request body per line")
    parser.add_argument("ledger", type=Path, help="where to keep the count")
    parser.add_argument("--url", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
