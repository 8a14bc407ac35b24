"""The artifact store on MLflow's wire: sent, listed, fetched, sent in parts, taken away, and kept safe."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any

import httpx
import pytest
from contracts.tracker.v1 import service_pb2 as pb
from servicekit import db
from servicekit.access import Caller
from servicekit.rpc import acting_for
from sqlalchemy import text

STORE = "/api/2.0/mlflow-artifacts"
EDITOR, VIEWER = "key-of-ada", "key-of-vic"


async def new_run(door: Any, key: str = EDITOR) -> str:
    made = await door.post("/runs/create", {"experiment_id": "0"}, key)
    return str(made["run"]["info"]["run_id"])


async def send(door: Any, method: str, path: str, key: str = EDITOR, **more: Any) -> httpx.Response:
    """A request with a path as it is written."""
    async with httpx.AsyncClient(trust_env=False, base_url=door.url, timeout=60) as http:
        answer: httpx.Response = await http.request(method, path, headers={"authorization": f"Bearer {key}"}, **more)
        return answer


async def as_written(door: Any, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to a request whose path no client has looked at."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {EDITOR}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


async def put(door: Any, run_id: str, path: str, data: bytes, key: str = EDITOR) -> httpx.Response:
    return await send(door, "PUT", f"{STORE}/artifacts/0/{run_id}/artifacts/{path}", key, content=data)


async def get(door: Any, run_id: str, path: str, key: str = EDITOR) -> httpx.Response:
    return await send(door, "GET", f"{STORE}/artifacts/0/{run_id}/artifacts/{path}", key)


async def rows(door: Any, statement: str) -> list[Any]:
    engine = db.create_engine(door.running.settings.database_url)
    async with engine.connect() as conn:
        found = list(await conn.execute(text(statement)))
    await engine.dispose()
    return found


async def test_a_file_is_sent_listed_and_fetched(door: Any) -> None:
    run_id = await new_run(door)
    large = os.urandom(20_000_000)
    for path, data in (("notes.txt", b"hello"), ("model/MLmodel", b"flavors: {}"), ("model/data/weights.bin", large), ("empty", b"")):
        sent = await put(door, run_id, path, data)
        assert (sent.status_code, sent.json()) == (200, {})
    listed = await send(door, "GET", "/api/2.0/mlflow/artifacts/list", VIEWER, params={"run_id": run_id})
    assert listed.json() == {
        "root_uri": f"mlflow-artifacts:/0/{run_id}/artifacts",
        "files": [
            {"path": "empty", "is_dir": False, "file_size": 0},
            {"path": "model", "is_dir": True},
            {"path": "notes.txt", "is_dir": False, "file_size": 5},
        ],
    }
    below = await send(door, "GET", "/ajax-api/2.0/mlflow/artifacts/list", params={"run_uuid": run_id, "path": "model"})
    assert [(one["path"], one["is_dir"]) for one in below.json()["files"]] == [("model/MLmodel", False), ("model/data", True)]
    stored = await send(door, "GET", f"{STORE}/artifacts", params={"path": f"0/{run_id}/artifacts/model"})
    assert stored.json() == {"files": [{"path": "MLmodel", "is_dir": False, "file_size": 11}, {"path": "data", "is_dir": True}]}
    for nothing in ("notes.txt", "missing"):
        asked = await send(door, "GET", "/api/2.0/mlflow/artifacts/list", params={"run_id": run_id, "path": nothing})
        assert asked.json()["files"] == []
    fetched = await get(door, run_id, "model/data/weights.bin", VIEWER)
    assert fetched.content == large
    assert fetched.headers["content-length"] == str(len(large))
    assert (await get(door, run_id, "empty")).content == b""
    missing = await get(door, run_id, "missing")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")


async def test_a_browser_saves_what_it_fetches_and_never_runs_it(door: Any) -> None:
    run_id = await new_run(door)
    for name, kind in (
        ("page.html", "text/plain"),
        ("plot.png", "image/png"),
        ("MLmodel", "text/plain"),
        ("drawing.svg", "application/octet"),
    ):
        await put(door, run_id, name, b"<script>alert(1)</script>")
        shown = await get(door, run_id, name)
        assert shown.headers["content-type"].startswith(kind)
        assert shown.headers["x-content-type-options"] == "nosniff"
        assert shown.headers["content-disposition"].startswith("attachment")


async def test_a_file_is_replaced_as_a_whole_and_taken_away_with_its_bytes(door: Any) -> None:
    run_id = await new_run(door)
    await put(door, run_id, "a/one", b"1")
    await put(door, run_id, "a/one", b"2")
    await put(door, run_id, "a/two", b"3")
    await put(door, run_id, "ab", b"4")
    assert (await get(door, run_id, "a/one")).content == b"2"
    for _ in range(2):
        gone = await send(door, "DELETE", f"{STORE}/artifacts/0/{run_id}/artifacts/a")
        assert gone.status_code == 200
    assert [row.path for row in await rows(door, "SELECT path FROM tracker.artifact")] == ["ab"]
    assert (await get(door, run_id, "ab")).content == b"4"


@pytest.mark.parametrize(
    "path",
    [
        "../{other}/artifacts/secret", "%2e%2e/{other}/artifacts/secret", "%252e%252e/{other}/artifacts/secret", "a/%2e%2e/secret",
        "..%2f..%2f{other}%2fartifacts%2fsecret", "a\\..\\secret", "a%5c..%5csecret", "a%255c..%255csecret", "/etc/passwd", "%2fetc/passwd",
        "a//b", "a/./b", "a%00b", "a%2500b", "a%0ab", "C:/windows", "x" * 600, "%c0%ae%c0%ae/%00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_no_path_leads_out_of_its_run(door: Any, method: str, path: str) -> None:
    run_id, other = await new_run(door), await new_run(door)
    await put(door, other, "secret", b"of the other")
    # Sent as it is: a client of HTTP would take the dots away by itself.
    status, body = await as_written(door, method, f"{STORE}/artifacts/0/{run_id}/artifacts/{path.format(other=other)}", b"x")
    assert status in (400, 404)
    assert b"of the other" not in body
    assert [row.path for row in await rows(door, "SELECT path FROM tracker.artifact")] == ["secret"]


@pytest.mark.parametrize(
    "path", ["", "0", "0/artifacts", "x/{run}/artifacts/a", "0/{run}", "0/{run}/other/a", "0/models/{run}/artifacts/a"]
)
async def test_what_names_no_run_is_refused(door: Any, path: str) -> None:
    where = path.format(run=await new_run(door))
    assert (await send(door, "PUT", f"{STORE}/artifacts/{where}", content=b"x")).status_code in (400, 404)
    assert (await send(door, "GET", f"{STORE}/artifacts", params={"path": where})).status_code == 400


async def test_a_run_is_found_in_its_own_experiment_only(door: Any) -> None:
    run_id = await new_run(door)
    made = await door.post("/experiments/create", {"name": "another"})
    sent = await send(door, "PUT", f"{STORE}/artifacts/{made['experiment_id']}/{run_id}/artifacts/a", content=b"x")
    assert sent.status_code == 404


async def test_roles_and_run_tokens_hold_here_too(door: Any) -> None:
    run_id, other = await new_run(door), await new_run(door)
    await put(door, other, "theirs", b"x")
    assert (await put(door, run_id, "a", b"x", VIEWER)).status_code == 403
    with acting_for(Caller("gateway", "ada", frozenset({"editor"}))):
        made = await door.running.stub("gateway").CreateRun(pb.CreateRunRequest(experiment_id=0))
    assert (await put(door, made.run.run_id, "mine", b"x", made.run_token)).status_code == 200
    assert (await put(door, other, "mine", b"x", made.run_token)).status_code == 403
    assert (await get(door, other, "theirs", made.run_token)).status_code == 403
    for method in ("GET", "PUT", "DELETE"):
        assert (await send(door, method, f"{STORE}/artifacts/0/{run_id}/artifacts/a", "hr_none_x")).status_code == 401


async def test_a_run_that_has_ended_takes_new_files_and_a_deleted_one_none(door: Any) -> None:
    run_id = await new_run(door)
    await door.post("/runs/update", {"run_id": run_id, "status": "FINISHED"})
    assert (await put(door, run_id, "late", b"x")).status_code == 200
    await door.post("/runs/delete", {"run_id": run_id})
    refused = await put(door, run_id, "later", b"x")
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert (await send(door, "DELETE", f"{STORE}/artifacts/0/{run_id}/artifacts/late")).status_code == 400


async def test_a_file_that_breaks_off_leaves_what_was_there(door: Any) -> None:
    run_id = await new_run(door)
    await put(door, run_id, "model.bin", b"the old")

    async def broken() -> Any:
        yield os.urandom(9_000_000)
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError):
        await send(door, "PUT", f"{STORE}/artifacts/0/{run_id}/artifacts/model.bin", content=broken())
    assert (await get(door, run_id, "model.bin")).content == b"the old"
    assert len(await rows(door, "SELECT 1 FROM tracker.artifact")) == 1


async def test_a_big_file_goes_in_parts_straight_to_the_store_and_comes_straight_from_it(door: Any) -> None:
    run_id = await new_run(door)
    data = os.urandom(11_000_000)
    where = f"0/{run_id}/artifacts/model"
    made = (await send(door, "POST", f"{STORE}/mpu/create/{where}", json={"path": "/home/ada/big.bin", "num_parts": 2})).json()
    parts = []
    async with httpx.AsyncClient(trust_env=False) as http:
        for one, piece in zip(made["credentials"], (data[:6_000_000], data[6_000_000:]), strict=True):
            stored = await http.put(one["url"], content=piece)
            parts.append({"part_number": one["part_number"], "etag": stored.headers["etag"], "url": one["url"]})
    ending = {"path": "/home/ada/big.bin", "upload_id": made["upload_id"], "parts": parts}
    other = await send(door, "POST", f"{STORE}/mpu/complete/{where}/else", json=ending)
    assert other.status_code == 404
    for _ in range(2):
        assert (await send(door, "POST", f"{STORE}/mpu/complete/{where}", json=ending)).status_code == 200
    link = (await send(door, "GET", f"{STORE}/presigned/{where}/big.bin")).json()
    assert (link["file_size"], link["headers"]) == (len(data), {})
    async with httpx.AsyncClient(trust_env=False) as http:
        ranged = await http.get(link["url"], headers={"range": "bytes=6000000-6000009"})
    assert (ranged.status_code, ranged.content) == (206, data[6_000_000:6_000_010])
    stored_rows = await rows(door, "SELECT sha256, size_bytes FROM tracker.artifact")
    assert [(row.sha256, row.size_bytes) for row in stored_rows] == [(hashlib.sha256(data).hexdigest(), len(data))]


async def test_parts_that_are_given_up_or_wrong_leave_nothing(door: Any) -> None:
    run_id = await new_run(door)
    where = f"0/{run_id}/artifacts"
    for number in (0, 10_001):
        assert (await send(door, "POST", f"{STORE}/mpu/create/{where}", json={"path": "a", "num_parts": number})).status_code == 400
    assert (await send(door, "POST", f"{STORE}/mpu/create/{where}", json={"path": "..", "num_parts": 1})).status_code == 400
    made = (await send(door, "POST", f"{STORE}/mpu/create/{where}", json={"path": "a", "num_parts": 1})).json()
    ending = {"path": "a", "upload_id": made["upload_id"], "parts": [{"part_number": 2, "etag": "x"}]}
    assert (await send(door, "POST", f"{STORE}/mpu/complete/{where}", json=ending)).status_code == 400
    for _ in range(2):
        assert (await send(door, "POST", f"{STORE}/mpu/abort/{where}", json=ending)).status_code == 200
    assert await rows(door, "SELECT 1 FROM tracker.artifact") == []
    assert await rows(door, "SELECT 1 FROM tracker.upload") == []
