"""A registry that was in use before there was a catalogue keeps its models, and knows of them what clients ask."""

from __future__ import annotations

from typing import Any

import asyncpg
from registry.bootstrap import MIGRATIONS
from servicekit import migrate

MODEL = "00000000-0000-7000-8000-000000000001"


async def test_versions_from_before_have_a_source_and_the_champion_before_is_known(database: Any) -> None:
    await migrate.upgrade(database.sqlalchemy, "registry", MIGRATIONS, "0003")
    connection = await asyncpg.connect(str(database), server_settings={"search_path": "registry"})
    await connection.execute(f"INSERT INTO model VALUES ('{MODEL}', 'flights', 2, 2, 5, now())")
    for number, stage in ((1, "Archived"), (2, "Production")):
        await connection.execute(
            "INSERT INTO model_version (model_id, number, stage, reason, rolling_out, run_id, journey_id, delivery, delivery_revision, "
            "blob_sha256, blob_size, blob_key, format, model_name, deliverable, evaluation_id, champion_version, champion_sha256, "
            "report_key, author, provenance, traceparent, created_at) "
            f"VALUES ('{MODEL}', {number}, '{stage}', '', false, 'r{number}', 'j', 'd', 1, 'sha{number}', 1, 'k', 'onnx', 'model', '', "
            f"'e{number}', 0, '', '', 'ann', '{{}}', '', now())"
        )
        await connection.execute(
            "INSERT INTO audit (at, actor, action, target, before, after, reason) VALUES (now(), 'event:deploy.completed:1', 'alias.set', "
            f"'model/flights@champion', '{{\"version\": {number - 1}}}', '{{\"version\": {number}}}', '')"
        )
    await migrate.upgrade(database.sqlalchemy, "registry", MIGRATIONS)
    model = await connection.fetchrow("SELECT previous, deleted, updated_at = created_at AS unchanged FROM model")
    assert tuple(model) == (1, False, True)
    versions = await connection.fetch("SELECT source, path, storage, registered_by, deleted FROM model_version ORDER BY number")
    assert [tuple(row) for row in versions] == [(f"runs:/r{n}/model", "model", f"runs:/r{n}/model", "", False) for n in (1, 2)]
    await connection.close()
