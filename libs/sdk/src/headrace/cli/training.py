"""headrace run, trainings, attach, cancel: submit training and follow it."""

from __future__ import annotations

import gzip
import io
import json as jsonlib
import os
import subprocess
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from headrace.cli.deliveries import GOOD_ENDS, follow
from headrace.cli.output import JsonFlag, console, print_json, say, table
from headrace.http import Client, InvalidInput, Json, Unreachable
from headrace.uploads import put_part, sha256_of

_SKIPPED = frozenset({".git", ".venv", "__pycache__", ".headrace", ".cache", "node_modules"})


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(trainings)
    app.command()(attach)
    app.command()(cancel)


def run(
    file: Annotated[Path, typer.Option("--file", "-f", help="The delivery file whose train section to use.")] = Path("delivery.yaml"),
    source: Annotated[
        Path | None, typer.Option("--source", help="The folder with the code. Default: the delivery's train.source.path.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--command", help="""What to run, as a JSON list like '["python", "train.py"]'. Default: the delivery's train.command."""
        ),
    ] = None,
    extra: Annotated[list[str] | None, typer.Argument(help="Behind --: arguments added to the command.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random generators.")] = 0,
    name: Annotated[str, typer.Option("--name", help="Name of the run.")] = "",
    follow_delivery: Annotated[bool, typer.Option("--watch/--no-watch", help="Afterwards follow the run to production.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, and do not follow; `headrace attach` follows later.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train where the trainer is: packs the source folder, submits it, and follows the log. Ctrl-C ends the following, not the training."""
    delivery = _delivery(file)
    train: Json = delivery.get("train") or {}
    path = train.get("source", {}).get("path")
    folder = source or (_find_source(file, path) if path else None)
    body: Json = {"delivery": delivery["metadata"]["name"], "seed": seed, "run_name": name, "request_id": str(uuid.uuid4())}
    words = _words(command) if command else list(train.get("command") or [])
    body["command"] = [*words, *(extra or [])]
    with Client() as client:
        if folder is not None:
            body["source"] = upload_source(client, folder)
        training = client.post("/api/v1/trainings", body)["training"]
        training_id = training["training_id"]
        if detach:
            print_json(training) if json else console.print(
                f"training {training_id} submitted: `headrace attach {training_id}` follows it, `headrace cancel {training_id}` stops it"
            )
            return
        if not json:
            say(f"training {training_id} submitted")
        training = _follow(client, training_id, quiet=json)
        ok = training["status"] == "succeeded"
        journey = None
        if ok and follow_delivery:
            journey = follow(client, delivery["metadata"]["name"], training["run_id"], timeout_s=3600.0, quiet=json)
            ok = journey["state"] in GOOD_ENDS
    if json:
        print_json({"training": training, "journey": journey})
    if not ok:
        raise typer.Exit(1)


def trainings(
    delivery: Annotated[str | None, typer.Option("--delivery", help="Only of this delivery.")] = None, json: JsonFlag = False
) -> None:
    """The trainings, newest first."""
    with Client() as client:
        answer = client.get("/api/v1/trainings", delivery=delivery)
    if json:
        print_json(answer)
        return
    table(
        ["training", "delivery", "status", "attempt", "run", "created", "reason"],
        (
            [t["training_id"], t["delivery"], t["status"], t["attempt"], t["run_id"][:8], t["created_at"], _last_line(t["reason"])]
            for t in answer["trainings"]
        ),
    )


def attach(training_id: Annotated[str, typer.Argument(help="The training.")], json: JsonFlag = False) -> None:
    """Follow a training's log from its beginning to its end, as `headrace run` does. Ends with 1 when it does not succeed."""
    with Client() as client:
        training = _follow(client, training_id, quiet=json)
    if json:
        print_json(training)
    if training["status"] != "succeeded":
        raise typer.Exit(1)


def cancel(training_id: Annotated[str, typer.Argument(help="The training.")], json: JsonFlag = False) -> None:
    """Stop a training, at any time."""
    with Client() as client:
        training = client.post(f"/api/v1/trainings/{training_id}/cancel", repeatable=True)["training"]
    if json:
        print_json(training)
    elif training["status"] in ("succeeded", "failed"):
        console.print(f"training {training_id}: already {training['status']}: nothing to cancel")
    else:
        pending = "" if training["status"] == "cancelled" else "being cancelled, still "
        console.print(f"training {training_id}: {pending}{training['status']}")


def _words(command: str) -> list[str]:
    try:
        words = jsonlib.loads(command)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InvalidInput(f"""--command must be a JSON list of words, like '["python", "train.py"]', not {command}""")
    return words


def _delivery(file: Path) -> Json:
    try:
        loaded: Any = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}; name the delivery file with --file") from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"{file} is not YAML: {error}") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("metadata"), dict) or not loaded["metadata"].get("name"):
        raise InvalidInput(f"{file} is not a delivery file: metadata.name is missing")
    return loaded


def _find_source(file: Path, path: str) -> Path:
    """The path in a delivery is relative to the repository: tried from here and from the file's own parents."""
    for base in (Path.cwd(), *file.resolve().parents):
        if (base / path).is_dir():
            return base / path
    raise InvalidInput(f"train.source.path {path} is not a folder here; name it with --source")


def upload_source(client: Client, folder: Path) -> Json:
    """Packs a folder and uploads it; returns the `source` of a training. Repeatable: the same files are not sent again.

    Left out is what git ignores. Raises InvalidInput when a file is one of the holdouts.
    """
    files = _files(folder)
    _refuse_holdouts(client, files)
    with tempfile.TemporaryDirectory(prefix="headrace-source-") as scratch:
        archive = Path(scratch) / "source.tar.gz"
        _pack(folder, files, archive)
        digest, size = sha256_of(archive)
        ticket = client.post("/api/v1/trainings/source-uploads", {"sha256": digest, "size_bytes": size}, repeatable=True)
        if ticket.get("url"):
            with httpx.Client(timeout=120.0, trust_env=False) as store:
                put_part(store, ticket["url"], archive.read_bytes())
    return {"upload_id": ticket["upload_id"], **_git(folder)}


def _files(folder: Path) -> list[Path]:
    """What a training gets of a folder, sorted: in a git checkout what git does not ignore; never links."""
    words = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(words, capture_output=True, check=True, timeout=30).stdout
        found = {folder / os.fsdecode(name) for name in listed.split(b"\0") if name}
    except (OSError, subprocess.SubprocessError):  # not a git checkout
        found = set(folder.rglob("*"))
    kept = (path for path in found if not any(part in _SKIPPED for part in path.relative_to(folder).parts))
    return sorted(path for path in kept if not path.is_symlink() and path.is_file())


def _refuse_holdouts(client: Client, files: list[Path]) -> None:
    """A file that is a holdout would show a training its exam."""
    holdouts = {one["blob"]["sha256"]: one for one in client.get("/api/v1/datasets").get("datasets", []) if one.get("holdout")}
    sizes = {int(one["blob"]["size_bytes"]) for one in holdouts.values()}
    for path in files:
        if path.stat().st_size in sizes and (found := holdouts.get(sha256_of(path)[0])):
            raise InvalidInput(
                f"{path} is version {found['ref']['version']} of the holdout {found['ref']['name']}, which no training may read: "
                "move it out of the source folder, or name it in .gitignore"
            )


def _pack(folder: Path, files: list[Path], archive: Path) -> None:
    """The same files give the same bytes, so that what is stored already is not sent again."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in files:
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size, info.mode = path.stat().st_size, 0o755 if path.stat().st_mode & 0o100 else 0o644
            tar.addfile(info, io.BytesIO(path.read_bytes()))


def _git(folder: Path) -> Json:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        dirty = bool(git("status", "--porcelain", "--", ".").strip())
        return {"commit": commit, "dirty": dirty, "diff": git("diff", "HEAD", "--", ".")[:500_000] if dirty else ""}
    except (OSError, subprocess.SubprocessError):  # not a git checkout: nothing to record
        return {}


def _follow(client: Client, training_id: str, *, quiet: bool) -> Json:
    """Prints the log until the training has ended, and how it did; returns the training. Who stops looking is told how to go on."""
    try:
        for line in client.lines(f"/api/v1/trainings/{training_id}/log", follow="true"):
            if not quiet:
                print(line, flush=True)
        training: Json = client.get(f"/api/v1/trainings/{training_id}")["training"]
    except (KeyboardInterrupt, Unreachable):
        say(f"the training goes on: `headrace attach {training_id}` follows it again, `headrace cancel {training_id}` stops it")
        raise
    if not quiet:
        why = _last_line(training.get("reason") or "")
        run_id = training["run_id"]
        say(f"training {training['status']}{f': {why}' if why else ''}{f'  (run {run_id})' if run_id else ''}")
    return training


def _last_line(reason: str) -> str:
    """Of a traceback, what was raised: the rest of it is in the log, and in the reason as JSON."""
    return next((line.strip() for line in reversed(reason.splitlines()) if line.strip()), "")
