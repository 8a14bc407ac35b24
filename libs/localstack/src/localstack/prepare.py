"""`python -m localstack.prepare [--minio]`: fetches and builds now what the stack or the tests would fetch on first use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from localstack import kafka, minio, mlflow_page, postgres, seaweed, triton
from localstack.cache import Progress
from localstack.errors import StackError
from localstack.progress import shown


def fetch(progress: Progress, *, with_minio: bool = False) -> None:
    """Kafka's jars and class archive, Triton's environment, MLflow's page and, if wanted, MinIO.

    Blocks, up to minutes the first time; may be repeated. Raises StackError.
    """
    work: list[Callable[[Progress], Path]] = [kafka.fetch, triton.runtime, mlflow_page.fetch]
    if with_minio:
        work.append(minio.binary)
    postgres.binaries()
    seaweed.binary()
    with ThreadPoolExecutor(max_workers=len(work)) as pool:
        for done in [pool.submit(each, progress) for each in work]:
            done.result()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m localstack.prepare", description="Fetch what the local stack needs into .cache/.")
    parser.add_argument("--minio", action="store_true", help="build MinIO too, which only tests need (minutes)")
    arguments = parser.parse_args(argv)
    try:
        with shown(True) as progress:
            fetch(progress, with_minio=arguments.minio)
    except StackError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
