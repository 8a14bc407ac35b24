"""`python -m eventing`: what an operator does to a service's outbox and inbox; see `eventing.recovery`."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from servicekit import db

from eventing.kafka import KafkaBroker
from eventing.recovery import adopt_cluster, republish_since


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m eventing", description="HEADRACE_DATABASE_URL says where the service keeps its schema."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    republish = commands.add_parser("republish", help="publish again what was written since a time; consumers drop what they have")
    republish.add_argument("schema")
    republish.add_argument("--since", required=True, type=_time, help="ISO 8601; UTC where no zone is given")
    republish.add_argument("--topic", help="only this one, as headrace.runs")
    adopt = commands.add_parser("adopt-cluster", help="after Kafka was replaced or wiped: go on with the one at HEADRACE_KAFKA_BOOTSTRAP")
    adopt.add_argument("schema")
    print(asyncio.run(_run(parser.parse_args(arguments))))


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


async def _run(chosen: argparse.Namespace) -> str:
    engine = db.create_engine(os.environ["HEADRACE_DATABASE_URL"], pool_size=1, command_timeout_s=None)
    try:
        if chosen.command == "republish":
            count = await republish_since(engine, chosen.schema, chosen.since, chosen.topic)
            return f"{count} events will be published again"
        cluster_id = await KafkaBroker(os.environ["HEADRACE_KAFKA_BOOTSTRAP"], "eventing-recovery").cluster_id()
        count = await adopt_cluster(engine, chosen.schema, cluster_id)
        return f"{chosen.schema} goes on with cluster {cluster_id}; {count} events will be published again"
    finally:
        await engine.dispose()


if __name__ == "__main__":
    main()
