"""headrace dlq list|show|replay|drop: events that a consumer could not apply."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.output import JsonFlag, console, print_json, table
from headrace.http import Client

dlq = typer.Typer(help="Parked events: looked at, applied again in order, or dropped.", no_args_is_help=True)
Service = Annotated[str, typer.Argument(help="The service that parked it.")]
Consumer = Annotated[str, typer.Argument(help="Its consumer, as `list` prints it.")]
Topic = Annotated[str, typer.Argument(help="The topic.")]
Key = Annotated[str, typer.Argument(help="The event's key.")]
Sequence = Annotated[int, typer.Argument(help="The event's number among those of its key.")]


def register(app: typer.Typer) -> None:
    app.add_typer(dlq, name="dlq")


@dlq.command("list")
def list_parked(json: JsonFlag = False) -> None:
    """What is parked, in every service."""
    with Client() as client:
        answer = client.get("/api/v1/dead-letters")
    if json:
        print_json(answer)
    else:
        table(
            ["service", "consumer", "topic", "key", "sequence", "type", "reason"],
            (
                [d["service"], d["consumer"], d["topic"], d["key"], d["sequence"], d["event_type"], d["reason"]]
                for d in answer["dead_letters"]
            ),
        )
        for unreachable in answer.get("unreachable", []):
            console.print(f"not asked, it does not answer: {unreachable}", style="yellow")


@dlq.command()
def show(service: Service, consumer: Consumer, topic: Topic, key: Key, sequence: Sequence, json: JsonFlag = False) -> None:
    """One parked event with its bytes (base64)."""
    with Client() as client:
        answer = client.get(f"/api/v1/dead-letters/{service}/one", consumer=consumer, topic=topic, key=key, sequence=sequence)
    print_json(answer) if json else table(["field", "value"], answer["dead_letter"].items())


@dlq.command()
def replay(service: Service, consumer: Consumer, topic: Topic, key: Key, json: JsonFlag = False) -> None:
    """Apply the parked events of a key again, in order; stops at the first that fails."""
    with Client() as client:
        answer = client.post(f"/api/v1/dead-letters/{service}/replay", {"consumer": consumer, "topic": topic, "key": key})
    print_json(answer) if json else console.print(
        f"applied {answer['applied']}, remaining {answer['remaining']} {answer.get('reason', '')}", markup=False
    )
    if int(answer["remaining"]):
        raise typer.Exit(1)


@dlq.command()
def drop(
    service: Service,
    consumer: Consumer,
    topic: Topic,
    key: Key,
    sequence: Sequence,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept.")],
    json: JsonFlag = False,
) -> None:
    """Forget one parked event: its effect never happens."""
    with Client() as client:
        client.post(
            f"/api/v1/dead-letters/{service}/drop",
            {"consumer": consumer, "topic": topic, "key": key, "sequence": sequence, "reason": reason},
            repeatable=True,
        )
    print_json({"dropped": {"service": service, "key": key, "sequence": sequence}}) if json else console.print(
        f"{key} #{sequence}: dropped"
    )
