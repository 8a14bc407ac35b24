"""What the deployer is made of lets everything go when it is stopped."""

from __future__ import annotations

from artifacts.s3 import S3Store
from deployer.bootstrap import build
from deployer.settings import DeployerSettings
from servicekit.lifecycle import Closing


async def test_the_object_store_is_stopped_last() -> None:
    components = build(DeployerSettings(database_url="postgresql+asyncpg://nobody@127.0.0.1:1/none"))
    store, closing = components[:2]  # they are stopped in reverse
    assert isinstance(store, S3Store)
    assert isinstance(closing, Closing)
    await closing.stop()
    await store.stop()
