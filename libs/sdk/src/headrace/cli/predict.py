"""headrace predict: one request through the gateway, and who answered it."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cli.output import JsonFlag, console, print_json
from headrace.http import Client, Denied, HeadraceError, InvalidInput, Json


def register(app: typer.Typer) -> None:
    app.command()(predict)


def predict(
    endpoint: Annotated[str, typer.Argument(help="The endpoint.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="JSON of the inputs: {name: value or list}, or a whole Open Inference Protocol request. @file or @- for stdin.",
        ),
    ],
    json: JsonFlag = False,
) -> None:
    """Ask an endpoint for a prediction; says which version and arm answered, and the request's id for `headrace trace`."""
    given = _load(data)
    with Client() as client:
        if "inputs" not in given:
            signature = (client.get(f"/api/v1/endpoints/{endpoint}")["endpoint"]["route"] or {}).get("signature") or {}
            given = _request(given, signature.get("inputs", []))
        began = time.perf_counter()
        answer = client.raw(
            "POST", f"/v2/models/{endpoint}/infer", content=jsonlib.dumps(given).encode(), headers={"content-type": "application/json"}
        )
        took_ms = (time.perf_counter() - began) * 1000
    try:
        body: Any = answer.json()
    except ValueError:
        body = {"error": answer.text[:300]}
    if answer.status_code >= 400:
        message = str(body.get("error", body))
        raise {401: Denied, 403: Denied}.get(answer.status_code, InvalidInput if answer.status_code < 500 else HeadraceError)(message)
    seen = {
        "request_id": answer.headers.get("x-request-id", ""),
        "model_version": answer.headers.get("x-headrace-model-version", ""),
        "arm": answer.headers.get("x-headrace-arm", ""),
        "latency_ms": round(took_ms, 2),
    }
    if json:
        print_json({**seen, "answer": body})
        return
    for output in body.get("outputs", []):
        console.print(f"{output['name']}: {output['data']}", markup=False)
    console.print(f"version {seen['model_version']}, arm {seen['arm']}, {seen['latency_ms']} ms, request {seen['request_id']}", style="dim")


def _load(data: str) -> Json:
    try:
        text = data
        if data.startswith("@"):
            text = sys.stdin.read() if data == "@-" else Path(data[1:]).read_text()
        loaded = jsonlib.loads(text)
    except OSError as error:
        raise InvalidInput(f"cannot read {data[1:]}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidInput(f"--data is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise InvalidInput("--data must be a JSON object")
    return loaded


def _request(values: Json, inputs: list[Json]) -> Json:
    """Open Inference Protocol V2 request from {name: value or list}, by the endpoint's signature."""
    known = {spec["name"]: spec for spec in inputs}
    if unknown := sorted(set(values) - set(known)):
        raise InvalidInput(f"unknown inputs {', '.join(unknown)}; the endpoint takes {', '.join(known) or 'nothing that is known yet'}")
    if missing := sorted(set(known) - set(values)):
        raise InvalidInput(f"missing inputs: {', '.join(missing)}")
    tensors = []
    for name, value in values.items():
        rows = value if isinstance(value, list) else [value]
        inner = [int(size) for size in known[name]["shape"][1:]]
        tensors.append({"name": name, "datatype": known[name]["datatype"], "shape": [len(rows), *inner], "data": rows})
    return {"inputs": tensors}
