"""MLflow's API on registered models and versions, by plain HTTP on a real PostgreSQL: what clients see, and what they are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

RUN = "0123456789abcdef0123456789abcdef"
LOGGED = "m-0123456789abcdef0123456789abcdef"


async def refused(call: Any, code: str = "INVALID_PARAMETER_VALUE", match: str | None = None) -> None:
    with pytest.raises(Exception, match=match) as caught:
        await call
    assert getattr(caught.value, "code", "") == code, caught.value


async def test_a_model_is_made_described_tagged_renamed_and_deleted(registry: Any) -> None:
    ed = registry.mlflow()
    made = await ed.model("birds", description="wings", tags=[{"key": "team", "value": "a"}, {"key": "team", "value": "b"}])
    assert (made["name"], made["description"], made["tags"]) == ("birds", "wings", [{"key": "team", "value": "b"}])
    assert isinstance(made["creation_timestamp"], int)
    assert made["creation_timestamp"] == made["last_updated_timestamp"] > 1_700_000_000_000
    await refused(ed.model("birds"), "RESOURCE_ALREADY_EXISTS")
    changed = await ed("PATCH", "registered-models/update", name="birds", description="grün 🐦")
    assert changed["registered_model"]["description"] == "grün 🐦"
    await ed("POST", "registered-models/set-tag", name="birds", key="k", value="v")
    await ed("POST", "registered-models/set-tag", name="birds", key="k", value="w")
    for _ in range(2):
        await ed("DELETE", "registered-models/delete-tag", name="birds", key="team")
    assert (await ed("GET", "registered-models/get", name="birds"))["registered_model"]["tags"] == [{"key": "k", "value": "w"}]
    await ed.version(name="birds", source=f"runs:/{RUN}/model")
    [before] = await registry.rows("SELECT id FROM model")
    assert (await ed("POST", "registered-models/rename", name="birds", new_name="fowl"))["registered_model"]["name"] == "fowl"
    [after] = await registry.rows("SELECT id FROM model")
    assert before["id"] == after["id"]
    assert (await ed.get(1, "fowl"))["name"] == "fowl"
    await refused(ed("GET", "registered-models/get", name="birds"), "RESOURCE_DOES_NOT_EXIST")
    await ed("DELETE", "registered-models/delete", name="fowl")
    await refused(ed("DELETE", "registered-models/delete", name="fowl"), "RESOURCE_DOES_NOT_EXIST")
    await refused(ed.get(1, "fowl"), "RESOURCE_DOES_NOT_EXIST")
    await ed.model("fowl")
    assert (await ed.version(name="fowl", source=f"runs:/{RUN}/model"))["version"] == "1"
    actions = [row["action"] for row in await registry.rows("SELECT action FROM audit WHERE actor = 'ed' ORDER BY id")]
    assert actions == [
        "model.create", "model.describe", "model.tag", "model.tag", "model.untag", "version.register", "model.rename", "model.rename",
        "model.delete", "model.create", "version.register",
    ]  # fmt: skip


async def test_a_version_is_registered_described_tagged_and_deleted(registry: Any) -> None:
    ed = registry.mlflow()
    await ed.model()
    tags = [{"key": "stage", "value": "x"}]
    made = await ed.version(f"runs:/{RUN}/a/b", run_id=RUN, tags=tags, description="first", run_link="https://ci/1")
    times = {"creation_timestamp": made["creation_timestamp"], "last_updated_timestamp": made["last_updated_timestamp"]}
    assert made == times | {
        "name": "flights", "version": "1", "user_id": "ed", "current_stage": "None", "source": f"runs:/{RUN}/a/b", "status": "READY",
        "description": "first", "run_id": RUN, "run_link": "https://ci/1", "tags": tags, "aliases": [],
    }  # fmt: skip
    assert await ed.get(1) == made
    second = await ed.version(f"models:/{LOGGED}", model_id=LOGGED)
    assert (second["version"], second["model_id"]) == ("2", LOGGED)
    copied = await ed.version("models:/flights/1", "flights")
    assert (copied["source"], copied["run_id"], copied["version"]) == ("models:/flights/1", RUN, "3")
    uri = await ed("GET", "model-versions/get-download-uri", name="flights", version="3")
    assert uri == {"artifact_uri": f"runs:/{RUN}/a/b"}
    proxied = await ed.version(f"mlflow-artifacts:/7/{RUN}/artifacts/a", run_id=RUN)
    assert proxied["source"] == f"mlflow-artifacts:/7/{RUN}/artifacts/a"
    changed = await ed("PATCH", "model-versions/update", name="flights", version="1", description="changed")
    assert changed["model_version"]["description"] == "changed"
    await ed("POST", "model-versions/set-tag", name="flights", version="1", key="k", value="v" * 100_000)
    await ed("DELETE", "model-versions/delete-tag", name="flights", version="1", key="stage")
    assert [tag["key"] for tag in (await ed.get(1))["tags"]] == ["k"]
    await ed("POST", "registered-models/alias", name="flights", alias="blue", version="1")
    await ed("DELETE", "model-versions/delete", name="flights", version="1")
    await refused(ed.get(1), "RESOURCE_DOES_NOT_EXIST")
    await refused(ed("GET", "registered-models/alias", name="flights", alias="blue"), match="alias blue not found")
    assert (await ed.version(f"runs:/{RUN}/a"))["version"] == "5", "a number is not used again"
    [kept] = await registry.rows("SELECT before, after FROM audit WHERE action = 'version.delete'")
    assert '"deleted": true' in kept["after"]
    events = await registry.wait_told("model.registered", 5)
    assert [one.sequence for one in events] == [1, 2, 3, 4, 5]


async def test_aliases_and_latest_versions(registry: Any) -> None:
    ed = registry.mlflow()
    await ed.model()
    for _ in range(4):
        await ed.version(f"runs:/{RUN}/model")
    for alias, version in (("blue", "1"), ("grün", "2"), ("blue", "3")):
        await ed("POST", "registered-models/alias", name="flights", alias=alias, version=version)
    assert (await ed("GET", "registered-models/alias", name="flights", alias="blue"))["model_version"]["version"] == "3"
    assert (await ed.get(3))["aliases"] == ["blue"]
    assert (await ed("GET", "registered-models/alias", name="flights", alias="latest"))["model_version"]["version"] == "4"
    model = (await ed("GET", "registered-models/get", name="flights"))["registered_model"]
    assert model["aliases"] == [{"alias": "blue", "version": "3"}, {"alias": "grün", "version": "2"}]
    for _ in range(2):
        await ed("DELETE", "registered-models/alias", name="flights", alias="blue")
    assert (await ed.move(1, "staging"))["current_stage"] == "Staging"
    assert (await ed.move(2, "Staging", archive_existing_versions=True))["current_stage"] == "Staging"
    assert (await ed.get(1))["current_stage"] == "Archived"
    assert (await ed.move(2, "None"))["current_stage"] == "None"
    await ed.move(3, "Staging")
    for method in ("GET", "POST"):
        found = await ed(method, "registered-models/get-latest-versions", name="flights")
        assert {(one["version"], one["current_stage"]) for one in found["model_versions"]} == {
            ("4", "None"), ("3", "Staging"), ("1", "Archived")
        }  # fmt: skip
        found = await ed(method, "registered-models/get-latest-versions", name="flights", stages=["Staging", "archived"])
        assert sorted(one["version"] for one in found["model_versions"]) == ["1", "3"]
    await refused(ed.move(2, "Archived", archive_existing_versions=True), match="archive_existing_versions")
    await refused(ed.move(2, "Live"), match="Value must be one of None, Staging, Production, Archived")


async def test_models_and_versions_are_found_by_filter_order_and_page(registry: Any) -> None:
    ed = registry.mlflow()
    for name in ("Ab", "ab%c", "b", "prompt"):
        await ed.model(
            name, tags=[{"key": "mlflow.prompt.is_prompt", "value": "true"}] if name == "prompt" else [{"key": "a b", "value": name}]
        )
    await ed("PATCH", "registered-models/update", name="Ab", description="changed last")

    async def models(**said: Any) -> list[str]:
        return [one["name"] for one in (await ed("GET", "registered-models/search", **said))["registered_models"]]

    assert await models() == ["Ab", "ab%c", "b"]
    assert await models(order_by="name DESC") == ["b", "ab%c", "Ab"]
    assert (await models(order_by=["last_updated_timestamp DESC"]))[0] == "Ab"
    for text, expected in {
        "name = 'b'": ["b"],
        "name != 'b'": ["Ab", "ab%c"],
        "name LIKE 'a%'": ["ab%c"],
        "name ilike 'A%'": ["Ab", "ab%c"],
        "name IN ('b', 'Ab', 'x')": ["Ab", "b"],
        "tags.`a b` = 'b'": ["b"],
        "tag.\"a b\" ILIKE '%B%' AND name != 'b'": ["Ab", "ab%c"],
        "tags.none != 'b'": [],
        "name = 'b''; DROP TABLE model; --'": [],
        "name LIKE '\\'": [],
        "tags.`mlflow.prompt.is_prompt` = 'true'": ["prompt"],
        "name ILIKE '%' AND tags.`mlflow.prompt.is_prompt` != 'true'": ["Ab", "ab%c", "b"],
    }.items():
        assert await models(filter=text) == expected, text
    found, token = [], ""
    while True:
        page = await ed("GET", "registered-models/search", max_results=2, **({"page_token": token} if token else {}))
        found += [one["name"] for one in page["registered_models"]]
        token = page.get("next_page_token", "")
        if not token:
            break
    assert found == ["Ab", "ab%c", "b"]

    runs = [f"{number:032x}" for number in range(3)]
    for run in runs:
        await ed.version(f"runs:/{run}/model", "b", run_id=run, tags=[{"key": "of", "value": run}])
    await ed.version(f"runs:/{runs[0]}/model", "Ab", run_id=runs[0])

    async def versions(**said: Any) -> list[tuple[str, str]]:
        return [(one["name"], one["version"]) for one in (await ed("GET", "model-versions/search", **said))["model_versions"]]

    assert await versions(order_by=["name ASC", "version_number ASC"]) == [("Ab", "1"), ("b", "1"), ("b", "2"), ("b", "3")]
    for text, numbers in {
        "name='b'": ["3", "2", "1"],
        f"run_id='{runs[1]}'": ["2"],
        f"run_id IN ('{runs[1]}', '{runs[2]}')": ["3", "2"],
        f"source_path = 'runs:/{runs[2]}/model'": ["3"],
        "name = 'b' and version_number > 1": ["3", "2"],
        "name = 'b' AND version_number <= '1'": ["1"],
        f"tags.of = '{runs[0]}'": ["1"],
    }.items():
        assert [number for _, number in await versions(filter=text, order_by="version_number DESC")] == numbers, text
    page = await ed("GET", "model-versions/search", filter="name='b'", max_results=2)
    rest = await ed("GET", "model-versions/search", filter="name='b'", max_results=2, page_token=page["next_page_token"])
    assert [one["version"] for one in [*page["model_versions"], *rest["model_versions"]]] == ["3", "2", "1"]
    assert "next_page_token" not in rest
    await refused(ed("GET", "model-versions/search", filter="name='Ab'", page_token=page["next_page_token"]), match="page token")


async def test_a_hostile_search_is_refused(registry: Any) -> None:
    ed = registry.mlflow()
    for path in ("registered-models/search", "model-versions/search"):
        for wrong in (
            "name", "name =", "name = b", "name = 'b", "= 'b'", "name = 'b' OR name = 'c'", "(name = 'b')", "name = 'b' name = 'c'",
            "stage = 'x'", "metrics.x > 1", "name > 'a'", "name IN ()", "name IN ('a'", "name IN 'a'", "tags. = 'x'", "name == 'a'",
            "name = 'a\x00'", "tags.a IN ('b')", "name IS NULL", " AND ".join(["name = 'b'"] * 51), "a" * 50_001,
        ):  # fmt: skip
            await refused(ed("GET", path, filter=wrong))
        for wrong in ("stage", "name down", "name ASC, x", "", "run_id", "name ASC ASC"):
            await refused(ed("GET", path, order_by=wrong))
        await refused(ed("GET", path, order_by=["name", "name DESC"]))
        for size in ("0", "-1", "200001", "9" * 30, "many"):
            await refused(ed("GET", path, max_results=size))
        for token in ("x", "AAAA", "eyJvZmZzZXQiOiAxfQ==", "\x00", "é"):
            await refused(ed("GET", path, page_token=token), match="token")
    for wrong in ("version_number = 'x'", "version_number = 1.5", "version_number LIKE '1'", f"version_number = {2**63}"):
        await refused(ed("GET", "model-versions/search", filter=wrong))


NAMES = ["", " ", "a/b", "a:b", ".", "..", "a" * 257, "a\x00b", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_cannot_be(registry: Any, name: str) -> None:
    ed = registry.mlflow()
    await ed.model()
    await refused(ed.model(name))
    assert [row["name"] for row in await registry.rows("SELECT name FROM model")] == ["flights"]


async def test_texts_that_are_too_long_or_hold_what_they_must_not(registry: Any) -> None:
    ed = registry.mlflow()
    await ed.model("ünïcödé 模型")
    await ed.model()
    await ed.version(f"runs:/{RUN}/model")
    of = {"name": "flights", "version": "1"}
    for path in ("registered-models", "model-versions"):
        for description in ("x" * 5_001, "a\x00"):
            await refused(ed("PATCH", f"{path}/update", **of, description=description))
        for key, value in (("", "v"), ("k" * 251, "v"), ("k", "v" * 100_001), ("a\x00", "v"), ("k", "\x00"), ("../k", "v"), ("a;b", "v")):
            await refused(ed("POST", f"{path}/set-tag", **of, key=key, value=value))
        await refused(ed("DELETE", f"{path}/delete-tag", **of, key=""), match="'key'")
    many = [{"key": f"k{number}", "value": ""} for number in range(1_001)]
    await refused(ed.model("x", tags=many), match="1000 at most")
    await refused(ed.version(f"runs:/{RUN}/model", tags=many), match="1000 at most")
    heavy = [{"key": f"k{number}", "value": "v" * 100_000} for number in range(11)]
    await refused(ed.version(f"runs:/{RUN}/model", tags=heavy), match="together")
    for version in ("x", "", "-1", "1.0", "9" * 19, "١"):
        await refused(ed("GET", "model-versions/get", name="flights", version=version), match="version")
    await refused(ed("GET", "model-versions/get", name="flights", version="0"), "RESOURCE_DOES_NOT_EXIST")
    for alias in ("", "latest", "LATEST", "v1", "V12", "a b", "a/b", "a" * 256, "Champion", "a\x00"):
        await refused(ed("POST", "registered-models/alias", name="flights", alias=alias, version="1"))
    await refused(ed("POST", "registered-models/alias", name="flights", alias="b", version="7"), "RESOURCE_DOES_NOT_EXIST")
    assert not await registry.rows("SELECT 1 FROM audit WHERE action NOT IN ('model.create', 'version.register')")


@pytest.mark.parametrize(
    "source",
    [
        "", "model", "/etc/passwd", "file:///etc/passwd", "FILE:/etc", "http://10.0.0.1/x", "https://x/y", "s3://bucket/key", "gs://b/k",
        "hdfs://x/y", "dbfs:/x", "ftp://x/y", "mlflow-artifacts://host:1/0/r/artifacts/x", "runs:/", "runs:/r1", "runs:r1/model",
        f"runs:/{RUN}/../x", f"runs:/{RUN}/a/../../b", f"runs:/{RUN}/%2e%2e/x", f"runs:/{RUN}/%252e%252e%252fx", f"runs:/{RUN}//x",
        f"runs:/{RUN}/a\\..\\b", f"runs:/{RUN}/a%5c..%5cb", f"runs:/{RUN}/a%00", f"runs:/{RUN}/a\x00", f"runs:/{RUN}/a?x=1",
        "runs://host/r/x", "models:/m-xyz", "models:/flights", "models://x/1", "mlflow-artifacts:/0/other", "mlflow-artifacts:/../../etc",
        f"mlflow-artifacts:/0/{RUN}/x/model", "runs:/" + "r" * 500, "dummy-source", "\ud800",
    ],
)  # fmt: skip
async def test_a_source_that_is_no_name_of_ours(registry: Any, source: str) -> None:
    ed = registry.mlflow()
    await ed.model()
    await refused(ed.version(source))
    assert not await registry.rows("SELECT 1 FROM model_version")


async def test_a_source_and_the_ids_beside_it_agree(registry: Any) -> None:
    ed = registry.mlflow()
    await ed.model()
    other = "f" * 32
    await refused(ed.version(f"runs:/{RUN}/model", run_id=other), match="run_id request parameter")
    await refused(ed.version(f"mlflow-artifacts:/0/{RUN}/artifacts/m", run_id=other), match="run_id request parameter")
    await refused(ed.version(f"models:/{LOGGED}", model_id=f"m-{other}"), match="model_id request parameter")
    await refused(ed.version(f"runs:/{RUN}/model", run_id=RUN, model_id="m-1"), match="logged model")
    await refused(ed.version(f"runs:/{RUN}/model", run_id="../x"), match="run_id")
    await refused(ed.version("models:/flights/9"), "RESOURCE_DOES_NOT_EXIST")
    await refused(ed.version("models:/unknown@blue"), "RESOURCE_DOES_NOT_EXIST")
    await refused(ed.version(f"runs:/{RUN}/model", "unknown"), "RESOURCE_DOES_NOT_EXIST")
    prompt = [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
    await ed.model("words", tags=prompt)
    assert (await ed.version("dummy-source", "words", tags=prompt))["version"] == "1"
    await refused(ed.version(f"runs:/{RUN}/model", "words", tags=prompt))
    assert (await ed("GET", "model-versions/search", filter="name='words'"))["model_versions"] == []


async def test_of_two_who_do_it_at_once_one_wins(registry: Any) -> None:
    ed, zoe = registry.mlflow("ed"), registry.mlflow("zoe")
    answers = await asyncio.gather(*(one.model("birds") for one in (ed, zoe) * 4), return_exceptions=True)
    assert sorted(getattr(one, "code", "won") for one in answers) == ["RESOURCE_ALREADY_EXISTS"] * 7 + ["won"]
    numbers = await asyncio.gather(*(one.version(f"runs:/{RUN}/model", "birds") for one in (ed, zoe) * 4))
    assert sorted(int(one["version"]) for one in numbers) == list(range(1, 9))
    for name in ("one", "two"):
        await ed.model(name)
    renames = [one("POST", "registered-models/rename", name=name, new_name="both") for one, name in ((ed, "one"), (zoe, "two"))]
    answers = await asyncio.gather(*renames, return_exceptions=True)
    assert sorted(getattr(one, "code", "won") for one in answers) == ["RESOURCE_ALREADY_EXISTS", "won"]
    sets = [one("POST", "registered-models/alias", name="birds", alias="blue", version=v) for one, v in ((ed, "1"), (zoe, "2"))]
    await asyncio.gather(*sets)
    found = (await ed("GET", "registered-models/alias", name="birds", alias="blue"))["model_version"]["version"]
    [*_, last] = await registry.rows("SELECT before, after FROM audit WHERE action = 'alias.set' ORDER BY id")
    assert f'"version": {found}' in last["after"], "the one that came last, and the log says so"
    deletes = await asyncio.gather(
        *(one("DELETE", "model-versions/delete", name="birds", version="3") for one in (ed, zoe)), return_exceptions=True
    )
    assert sorted(getattr(one, "code", "won") for one in deletes) == ["RESOURCE_DOES_NOT_EXIST", "won"]


async def test_every_endpoint_asks_who_is_calling(registry: Any) -> None:
    (api,) = [component for component in registry.components if hasattr(component, "http")]
    assert len(api.http.endpoints) == 2 * 21
    for endpoint in api.http.endpoints:
        for method in endpoint.methods:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api.http), base_url="http://registry") as client:
                bare = await client.request(method, endpoint.path)
                wrong = await client.request(method, endpoint.path, headers={"authorization": "Bearer gateway.wrong"})
                eve = registry.mlflow("eve", "viewer")
                seen = await client.request(method, endpoint.path, headers=eve.headers)
                script = await client.request(method, endpoint.path, headers=registry.mlflow("run:x", run=RUN).headers)
                nobody = await client.request(method, endpoint.path, headers={"authorization": eve.headers["authorization"]})
            assert {bare.status_code, wrong.status_code} == {401}, endpoint.path
            assert bare.json()["error_code"] == "UNAUTHENTICATED"
            reads = method == "GET" or endpoint.path.endswith("get-latest-versions")
            assert (seen.status_code == 403) is not reads, endpoint.path
            assert (script.status_code == 403) is not endpoint.path.endswith("/create"), endpoint.path
            assert nobody.status_code == 403, endpoint.path
    missing = await registry.mlflow().send("GET", "registered-models/unknown")
    assert (missing.status_code, missing.headers["content-type"].partition(";")[0]) == (404, "text/plain")


async def test_a_run_token_registers_what_its_run_made_and_nothing_else(registry: Any) -> None:
    script = registry.mlflow(f"run:{RUN}", run=RUN)
    await script.model()
    assert (await script.version(f"runs:/{RUN}/model"))["run_id"] == RUN
    assert (await script.version(f"models:/{LOGGED}", model_id=LOGGED))["run_id"] == RUN, "so that no other run's evaluation is its own"
    other = "f" * 32
    await registry.mlflow().version(f"runs:/{other}/model")
    for source in (f"runs:/{other}/model", "models:/flights/3"):
        await refused(script.version(source), "PERMISSION_DENIED", "this token is good for run")
    await refused(script.version(f"models:/{LOGGED}", run_id=other), "PERMISSION_DENIED")
