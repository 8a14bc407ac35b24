"""Clients that log metrics of runs of their own at an even pace: as many training scripts do while others search.

A process of its own, so that its work is not counted against whoever measures. It reads a line of JSON (address, headers, how many clients,
requests per second of each) from its standard input, prints "ready" when all have logged once, and ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tests.bench.plain_http import START_MS, Client, Target


@contextlib.contextmanager
def writing(target: Target, clients: int, each_per_s: float) -> Iterator[None]:
    """Has them log as long as it is open. Blocks until they do. Raises RuntimeError when one of them failed."""
    command = [sys.executable, "-m", "tests.bench.tracking_writers"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the writers have no pipes")
        process.stdin.write(json.dumps([target[0], dict(target[1]), clients, each_per_s]) + "\n")
        process.stdin.flush()
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the writers did not begin")
            yield
        finally:
            process.stdin.close()
            left = process.wait(60)
    if left:
        raise RuntimeError(f"the writers ended with {left}")


def main() -> None:
    """Entry point of the process."""
    address, headers, clients, each_per_s = json.loads(sys.stdin.readline())
    over = threading.Event()
    begun = threading.Barrier(clients + 1)
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            client = Client((address, headers))
            run_id = client.new_run()
            step = 0
            next_at = time.monotonic() + number / clients / each_per_s
            while not over.wait(max(0.0, next_at - time.monotonic())):
                client.post("/runs/log-metric", {"run_id": run_id, "key": "loss", "value": 1.0, "timestamp": START_MS, "step": step})
                if step == 0:
                    begun.wait(60)
                step += 1
                next_at += 1 / each_per_s
            client.close()
        except BaseException as error:
            failed.append(error)
            begun.abort()
            raise

    threads = [threading.Thread(target=write, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        begun.wait(60)
        print("ready", flush=True)
        sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    main()
