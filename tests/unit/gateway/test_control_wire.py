"""Protobuf as JSON: values and schema come from one mapping."""

from __future__ import annotations

import json
import math

from contracts.deployer.v1 import events_pb2 as deployer_events
from contracts.deployer.v1 import service_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_events
from contracts.eventing.v1 import service_pb2 as eventing_pb
from contracts.registry.v1 import service_pb2 as registry_pb
from contracts.tracker.v1 import service_pb2 as tracker_pb
from gateway.control.wire import schema, to_json


def test_every_field_is_there_by_its_own_name() -> None:
    told = to_json(tracker_pb.GetRunResponse(run=tracker_pb.Run(run_id="ab", metrics={"auc": 0.5})))
    assert set(told) == {"run"}
    assert set(told["run"]) == {field.name for field in tracker_pb.Run.DESCRIPTOR.fields}
    assert told["run"]["metrics"] == {"auc": 0.5}
    assert told["run"]["models"] == []
    assert told["run"]["source"] is None


def test_integers_of_64_bits_are_numbers() -> None:
    told = to_json(registry_pb.Delivery(revision=2**40))
    assert json.loads(json.dumps(told))["revision"] == 2**40


def test_timestamps_enums_bytes_and_absent_optionals() -> None:
    rollout = deployer_pb.Rollout(cause=deployer_events.END_CAUSE_HARM)
    rollout.created_at.FromJsonString("2026-01-02T03:04:05Z")
    told = to_json(rollout)
    assert told["created_at"] == "2026-01-02T03:04:05Z"
    assert told["finished_at"] is None
    assert told["cause"] == "END_CAUSE_HARM"
    assert to_json(eventing_pb.DeadLetter(payload=b"\x00\xff"))["payload"] == "AP8="
    assert to_json(evaluator_events.Comparison())["champion"] is None
    assert to_json(evaluator_events.Comparison(champion=0.0))["champion"] == 0.0


def test_an_enum_value_from_the_future_is_its_number() -> None:
    assert to_json(deployer_pb.Rollout(cause=99))["cause"] == 99  # type: ignore[arg-type]  # that is the point


def test_numbers_that_json_has_not_are_words() -> None:
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf}
    assert to_json(tracker_pb.Run(metrics=values))["metrics"] == {"nan": "NaN", "up": "Infinity", "down": "-Infinity"}


def test_the_schema_describes_what_is_answered() -> None:
    described = schema(deployer_pb.GetRolloutResponse)["properties"]["rollout"]["anyOf"][0]["properties"]
    assert described["paused"] == {"type": "boolean"}
    assert described["guards"]["type"] == "array"
    assert described["created_at"]["anyOf"][0]["format"] == "date-time"
    assert "END_CAUSE_HARM" in described["cause"]["enum"]
    runs = schema(tracker_pb.Run)["properties"]
    assert runs["metrics"] == {"type": "object", "additionalProperties": {"type": "number"}}
