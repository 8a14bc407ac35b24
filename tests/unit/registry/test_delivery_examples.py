"""The files that users copy are right by all four grammars: that of the registry and those of the services whose sections are in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from deployer.domain import policy as serving
from evaluator.domain import policy as evaluation
from registry.domain.deliveries import read
from trainer.domain import section as training

ROOT = Path(__file__).parents[3]


def documented(page: str = "docs/deliveries.md") -> str:
    found = re.search(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
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


def test_the_serve_section_of_the_page_on_rollouts_is_right() -> None:
    section = serving.parse(yaml.safe_load(documented("docs/rollouts.md"))["serve"])
    assert [guard.id for guard in section.guards] == ["error", "latency_ms>50", "shadow_difference"]
    assert section.shadow is not None
    assert section.shadow.only_values
