"""Events and answers on the wire: nothing is lost on the way, and what cannot be understood is not guessed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
from contracts.deployer.v1 import events_pb2 as deployer_pb
from contracts.evaluator.v1 import events_pb2 as evaluator_pb
from contracts.registry.v1 import events_pb2, service_pb2
from contracts.tracker.v1 import events_pb2 as tracker_pb
from contracts.tracker.v1 import model_pb2
from eventing import topics
from eventing.consumer import UnknownValue
from google.protobuf.timestamp_pb2 import Timestamp
from registry.domain import events
from registry.domain.access import new_key
from registry.domain.deliveries import Revision
from registry.domain.events import VersionRef
from registry.domain.versions import Deliverable, Journey
from registry.entrypoints import translate
from registry.ports import Encoded
from servicekit.errors import Invalid

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
REF = VersionRef(UUID(int=1), "flights", 3)
JOURNEY = Journey("j", "flights", 2, "r")


def a_judgement() -> evaluator_pb.Judgement:
    return evaluator_pb.Judgement(
        evaluation_id="e",
        journey=events_pb2.Journey(journey_id="j", delivery="flights", delivery_revision=2, run_id="r"),
        model="flights",
        candidate=model_pb2.DeliverableModel(
            name="model",
            format="onnx",
            blob=model_pb2.BlobRef(sha256="s", size_bytes=9, key="k"),
            signature=model_pb2.ModelSignature(inputs=[model_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1, 3])]),
            samples=model_pb2.BlobRef(sha256="t"),
        ),
        champion_version=2,
        champion_sha256="c",
        holdout=model_pb2.DatasetRef(name="holdout", version=3, sha256="h"),
        comparison=evaluator_pb.Comparison(metric="auc", challenger=0.7, champion=0.6, rows=10),
        gates=[evaluator_pb.Gate(name="auc", passed=True, value=0.7, limit=0.6, detail="better")],
        report_html=model_pb2.BlobRef(key="report.html"),
        report_json=model_pb2.BlobRef(key="report.json"),
        author="ann",
        source=tracker_pb.RunSource(commit="abc", dirty=True, diff_key="d", command="python train.py", training_id="t"),
        training_data=[model_pb2.DatasetRef(name="flights", version=1, sha256="f")],
    )


def test_a_judgement_keeps_where_the_version_came_from() -> None:
    message = a_judgement()
    read = translate.judgement(message)
    assert read.candidate.encoded == message.candidate.SerializeToString()
    assert (read.candidate.sha256, read.candidate.size_bytes, read.evidence.champion_version, read.evidence.champion_sha256) == (
        "s",
        9,
        2,
        "c",
    )
    assert read.evidence.report_key == "report.html"
    known = read.provenance
    assert known["source"] == {"commit": "abc", "dirty": True, "diff": "d", "command": "python train.py", "training": "t"}
    assert known["data"] == [{"name": "flights", "version": 1, "sha256": "f"}]
    assert known["evaluation"]["holdout"] == {"name": "holdout", "version": 3, "sha256": "h"}
    assert known["evaluation"]["comparison"]["champion"] == 0.6
    assert known["evaluation"]["gates"][0]["detail"] == "better"
    assert (known["model"]["sha256"], known["samples"]) == ("s", "t")


@pytest.mark.parametrize("field", ["evaluation_id", "journey", "model", "candidate"])
def test_a_judgement_without_what_matters_is_invalid(field: str) -> None:
    message = a_judgement()
    message.ClearField(field)  # type: ignore[arg-type]  # a literal type of every field's name
    with pytest.raises(Invalid, match=field):
        translate.judgement(message)


def deliverable() -> Deliverable:
    return translate.judgement(a_judgement()).candidate


def promoted() -> events.ModelPromoted:
    return events.ModelPromoted(REF, JOURNEY, "flights", deliverable(), "e", "ann", 2)


def test_model_promoted_says_whether_a_verdict_binds_it() -> None:
    for override in (False, True):
        encoded = translate.encode(replace(promoted(), override=override))
        message = events_pb2.ModelPromoted.FromString(encoded.payload)
        assert (message.override, message.champion_version) == (override, 2)


def test_model_promoted_carries_the_whole_model() -> None:
    encoded = translate.encode(promoted())
    assert (encoded.type, encoded.topic, encoded.subject) == ("model.promoted", topics.MODELS, "flights/3")
    message = events_pb2.ModelPromoted.FromString(encoded.payload)
    assert message.model == a_judgement().candidate
    assert (message.endpoint, message.champion_version, message.promoted_by, message.evaluation_id) == ("flights", 2, "ann", "e")
    assert message.version == events_pb2.VersionRef(model_id=str(UUID(int=1)), model="flights", version=3)
    assert message.journey == a_judgement().journey


@pytest.mark.parametrize(
    ("event", "kind", "parse"),
    [
        (lambda: events.ModelRegistered(REF, JOURNEY, deliverable(), "e"), "model.registered", events_pb2.ModelRegistered),
        (
            lambda: events.ModelApprovalRequested(REF, JOURNEY, UUID(int=5), "e", 2),
            "model.approval_requested",
            events_pb2.ModelApprovalRequested,
        ),
        (lambda: events.ModelArchived(REF, JOURNEY, "worse"), "model.archived", events_pb2.ModelArchived),
        (
            lambda: events.ModelReevaluationRequested(UUID(int=1), JOURNEY, "e", 4, "changed"),
            "model.reevaluation_requested",
            events_pb2.ModelReevaluationRequested,
        ),
    ],
)
def test_events_of_models(event: object, kind: str, parse: type) -> None:
    encoded: Encoded = translate.encode(event())  # type: ignore[operator]  # made late, so that collecting costs nothing
    assert (encoded.type, encoded.topic) == (kind, topics.MODELS)
    message = parse.FromString(encoded.payload)  # type: ignore[attr-defined]  # any generated class
    assert message.journey == a_judgement().journey
    assert all(message.HasField(field.name) or getattr(message, field.name) for field in message.DESCRIPTOR.fields if field.message_type)
    assert all(getattr(message, field.name) for field in message.DESCRIPTOR.fields if not field.message_type)


def revision(deleted: bool = False) -> Revision:
    sections = {"train": "{1}", "evaluate": "{2}", "promote": "{3}", "serve": "{4}"}
    return Revision("flights", 4, "yaml", sections, "exp", "model", "end", 1, "ann", NOW, deleted)


def test_delivery_applied_is_a_full_snapshot() -> None:
    encoded = translate.encode(events.DeliveryApplied(revision()))
    assert (encoded.type, encoded.topic, encoded.subject) == ("delivery.applied", topics.DELIVERIES, "flights")
    message = events_pb2.DeliveryApplied.FromString(encoded.payload)
    assert [message.train_json, message.evaluate_json, message.promote_json, message.serve_json] == ["{1}", "{2}", "{3}", "{4}"]
    assert (message.revision, message.deleted, message.experiment, message.model, message.endpoint) == (4, False, "exp", "model", "end")
    assert message.applied_at.ToDatetime(tzinfo=UTC) == NOW
    gone = events_pb2.DeliveryApplied.FromString(translate.encode(events.DeliveryApplied(revision(deleted=True))).payload)
    assert (gone.deleted, gone.serve_json, gone.endpoint) == (True, "", "end")


def test_access_changed_has_the_hash_and_the_answer_has_not() -> None:
    key = new_key("id", "a" * 64, "ann", ["viewer"], ["*"], NOW, None)
    message = events_pb2.AccessChanged.FromString(translate.encode(events.AccessChanged(key)).payload)
    assert (message.hash, list(message.roles), list(message.inference_endpoints), message.HasField("expires_at")) == (
        "a" * 64,
        ["viewer"],
        ["*"],
        False,
    )
    assert "a" * 64 not in str(translate.api_key(key))


def test_every_cause_of_an_end_has_words_and_only_harm_is_harm() -> None:
    for value in deployer_pb.EndCause.values():
        message = deployer_pb.DeployRolledBack(cause=value, reason="detail")
        if value == deployer_pb.END_CAUSE_UNSPECIFIED:
            with pytest.raises(Invalid):
                translate.cause(message)
            continue
        harm, words = translate.cause(message)
        assert harm is (value == deployer_pb.END_CAUSE_HARM)
        assert words.startswith("rolled back: ")
        assert words.endswith("(detail)")
    assert translate.cause(deployer_pb.DeployRolledBack(cause=deployer_pb.END_CAUSE_DEADLINE))[1] == "rolled back: deadline"


def test_a_cause_newer_than_the_code_is_not_guessed() -> None:
    message = deployer_pb.DeployRolledBack.FromString(b"\x10\x63")  # cause = 99
    with pytest.raises(UnknownValue):
        translate.cause(message)


def test_ids_tokens_and_times_of_requests() -> None:
    assert translate.identifier(str(UUID(int=4)), "approval_id") == UUID(int=4)
    assert (translate.place(""), translate.place("17")) == (0, 17)
    for wrong in ("x", "-1", "1" * 19, "²"):
        with pytest.raises(Invalid):
            translate.place(wrong)
    with pytest.raises(Invalid):
        translate.identifier("x", "approval_id")
    with pytest.raises(Invalid):
        translate.model_id("x")
    assert translate.time_of(service_pb2.CreateApiKeyRequest(), "expires_at") is None
    request = service_pb2.CreateApiKeyRequest(expires_at=Timestamp(seconds=1 << 60))
    with pytest.raises(Invalid):
        translate.time_of(request, "expires_at")
