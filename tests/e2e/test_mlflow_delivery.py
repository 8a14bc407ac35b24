"""What a script logs with the unmodified mlflow client travels to production by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.world import GOOD, World, model_bytes
from tests.mlflow import clients

SCRIPT = Path(clients.HERE) / "delivered.py"
EXAMPLES = Path(__file__).parents[2] / "examples" / "mlflow"


@pytest.mark.parametrize("client", clients.NAMES)
async def test_a_script_that_knows_mlflow_alone_is_delivered(world: World, client: str, tmp_path: Path) -> None:
    world.apply(world.delivery().replace(", parity]", "]"))  # it logs no answers that could be compared
    (tmp_path / "model.onnx").write_bytes(model_bytes(GOOD))
    code, printed, errors = await clients.run(
        clients.python(client), SCRIPT, world.url, world.key, world.name, str(tmp_path / "model.onnx"), folder=tmp_path
    )
    assert code == 0, errors[-3_000:]
    run_id = printed.split()[-1]
    world.arrives(run_id, "completed")
    answer = world.infer()
    assert (answer.status_code, answer.headers["x-headrace-model-version"]) == (200, "1")
    (version,) = world.versions().values()
    assert version["aliases"] == ["champion"]
    assert version["journey"]["run_id"] == run_id
