"""The files that users copy are right by all four grammars: that of the registry and those of the services whose sections are in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from deployer.domain import policy as serving
from evaluator.domain import policy as evaluation
from registry.domain.deliveries import read
from trainer.domain import section as training

ROOT = Path(__file__).parents[3]


def documented() -> str:
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/deliveries.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    "text", [documented(), (ROOT / "examples/flights/delivery.yaml").read_text()], ids=["docs/deliveries.md", "examples/flights"]
)
def test_examples_are_right(text: str) -> None:
    file, problems = read(text)
    assert problems == []
    assert set(file.sections) == {"train", "evaluate", "promote", "serve"}
    assert training.parse(file.sections["train"]).command
    assert evaluation.parse(json.loads(file.sections["evaluate"])).experiment == file.experiment
    assert serving.parse(json.loads(file.sections["serve"])).endpoint == file.endpoint
