"""Triggers of a train section: which can be asked for."""

from __future__ import annotations

import json

from trainer.domain.section import parse, unwatched

GOOD = {"source": {"path": "examples/flights"}, "command": ["python", "train.py"]}


def test_triggers_that_nobody_watches_can_be_read_and_are_named() -> None:
    section = parse(json.dumps({**GOOD, "triggers": [{"cron": "0 3 * * 1-5"}, "push", "drift"]}))
    push, drift = unwatched(section)
    assert (push.field, push.message) == ("train.triggers[1]", "push is not watched yet; use cron, or start it with headrace run")
    assert (drift.field, drift.message) == ("train.triggers[2]", "drift is not watched yet; use cron, or start it with headrace run")
    assert unwatched(parse(json.dumps({**GOOD, "triggers": [{"cron": "0 3 * * 1-5"}]}))) == []
