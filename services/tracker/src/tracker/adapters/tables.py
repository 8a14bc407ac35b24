"""The tracker's tables as SQLAlchemy Core sees them. The migrations make them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB

SCHEMA = "tracker"
METADATA = MetaData(schema=SCHEMA)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _bigint(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


experiment = Table(
    "experiment",
    METADATA,
    Column("id", BigInteger, Identity(always=False), primary_key=True),
    _text("name"),
    _text("lifecycle_stage"),
    _bigint("created_ms"),
    Column("requested_by", Text),
    Column("request_id", Text),
    _bigint("last_update_ms"),
    UniqueConstraint("name", name="experiment_name"),
    UniqueConstraint("requested_by", "request_id", name="experiment_request"),
)

experiment_tag = Table(
    "experiment_tag",
    METADATA,
    Column("experiment_id", BigInteger, ForeignKey(experiment.c.id), primary_key=True),
    Column("key", Text, primary_key=True),
    _text("value"),
)

run = Table(
    "run",
    METADATA,
    Column("run_id", Text, CheckConstraint("run_id ~ '^[0-9a-f]{32}$'"), primary_key=True),
    Column("experiment_id", BigInteger, ForeignKey(experiment.c.id), nullable=False),
    _text("name"),
    _text("user_name"),
    _text("status"),
    _text("lifecycle_stage"),
    _bigint("started_ms"),
    _bigint("finished_ms"),
    _text("reason"),
    _text("parent_run_id"),
    _text("source_commit"),
    Column("source_dirty", Boolean, nullable=False),
    _text("source_diff_key"),
    _text("source_command"),
    _text("training_id"),
    Column("lease_seconds", Integer, nullable=False),
    Column("lease_expires_at", DateTime(timezone=True)),
    _bigint("fencing_token"),
    _bigint("event_sequence"),
    Column("requested_by", Text),
    Column("request_id", Text),
    _bigint("deleted_ms"),
    UniqueConstraint("requested_by", "request_id", name="run_request"),
)
Index("run_newest", run.c.experiment_id, run.c.started_ms, run.c.run_id)
Index("run_lease", run.c.lease_expires_at, postgresql_where=run.c.status == "RUNNING")


def _run_id(references: bool = True) -> Column[str]:
    return Column("run_id", Text, *([ForeignKey(run.c.run_id)] if references else []), primary_key=True)


# What is searched by its value knows experiment and start of its run, which never change, and is indexed in the order of the answers.
param = Table(
    "param", METADATA, _run_id(), Column("key", Text, primary_key=True), _text("value"), _bigint("experiment_id"), _bigint("started_ms")
)

tag = Table(
    "tag", METADATA, _run_id(), Column("key", Text, primary_key=True), _text("value"), _bigint("experiment_id"), _bigint("started_ms")
)

metric_point = Table(
    "metric_point",
    METADATA,
    _run_id(references=False),
    Column("key", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("timestamp_ms", BigInteger, primary_key=True),
    Column("value", Double, primary_key=True),
)

metric_latest = Table(
    "metric_latest",
    METADATA,
    _run_id(references=False),
    Column("key", Text, primary_key=True),
    _bigint("step"),
    _bigint("timestamp_ms"),
    Column("value", Double, nullable=False),
    _bigint("experiment_id"),
    _bigint("started_ms"),
)

# Metrics, params and tags of a run that has ended, each as the JSON array that searches answer: `adapters.logged` keeps it true.
run_logged = Table("run_logged", METADATA, _run_id(), _text("metrics"), _text("params"), _text("tags"))

upload = Table(
    "upload",
    METADATA,
    Column("upload_id", Text, primary_key=True),
    _text("owner"),
    _text("path"),
    _text("dataset"),
    _text("key"),
    _bigint("size_bytes"),
    _text("sha256"),
    _text("store_id"),
    Column("complete", Boolean, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
Index("upload_content", upload.c.sha256, postgresql_where=upload.c.complete)

artifact = Table(
    "artifact",
    METADATA,
    Column("owner", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    _text("key"),
    _bigint("size_bytes"),
    _text("sha256"),
)

blob = Table("blob", METADATA, Column("sha256", Text, primary_key=True), _bigint("size_bytes"), _text("key"))

model = Table(
    "model",
    METADATA,
    _run_id(),
    Column("name", Text, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    _text("format"),
    Column("blob", Text, ForeignKey(blob.c.sha256), nullable=False),
    Column("samples", Text, ForeignKey(blob.c.sha256)),
    Column("signature", JSONB, nullable=False),
    _text("logged_model_id"),
    _text("folder"),
)

conversion = Table(
    "conversion",
    METADATA,
    _run_id(),
    Column("owner", Text, primary_key=True),
    Column("folder", Text, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    _text("name"),
    Column("flavors", JSONB, nullable=False),
    Column("settled", Boolean, nullable=False),
)

logged_model = Table(
    "logged_model",
    METADATA,
    Column("model_id", Text, CheckConstraint("model_id ~ '^m-[0-9a-f]{32}$'"), primary_key=True),
    Column("experiment_id", BigInteger, ForeignKey(experiment.c.id), nullable=False),
    _text("name"),
    _text("model_type"),
    Column("source_run_id", Text, ForeignKey(run.c.run_id)),
    _text("user_name"),
    _text("status"),
    _text("lifecycle_stage"),
    _bigint("created_ms"),
    _bigint("updated_ms"),
)
Index("logged_model_newest", logged_model.c.experiment_id, logged_model.c.created_ms, logged_model.c.model_id)
Index("logged_model_of", logged_model.c.source_run_id)


def _of_model() -> Column[str]:
    return Column("model_id", Text, ForeignKey(logged_model.c.model_id), primary_key=True)


logged_model_param = Table("logged_model_param", METADATA, _of_model(), Column("key", Text, primary_key=True), _text("value"))

logged_model_tag = Table("logged_model_tag", METADATA, _of_model(), Column("key", Text, primary_key=True), _text("value"))

dataset = Table("dataset", METADATA, Column("name", Text, primary_key=True), _bigint("latest_version"))

dataset_version = Table(
    "dataset_version",
    METADATA,
    Column("name", Text, ForeignKey(dataset.c.name), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    _text("sha256"),
    _bigint("size_bytes"),
    _text("key"),
    _text("schema_json"),
    _bigint("created_ms"),
    Column("holdout", Boolean, nullable=False),
    UniqueConstraint("name", "sha256", name="dataset_version_content"),
)
Index("dataset_version_holdout", dataset_version.c.sha256, postgresql_where=dataset_version.c.holdout)

run_input = Table(
    "run_input",
    METADATA,
    _run_id(),
    Column("dataset", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    ForeignKeyConstraint(["dataset", "version"], [dataset_version.c.name, dataset_version.c.version]),
)

described_dataset = Table(
    "described_dataset",
    METADATA,
    Column("experiment_id", BigInteger, ForeignKey(experiment.c.id), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    _text("source_type"),
    _text("source"),
    _text("schema"),
    _text("profile"),
)

run_dataset = Table(
    "run_dataset",
    METADATA,
    _run_id(),
    _bigint("experiment_id"),
    Column("name", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    Column("tags", JSONB, nullable=False),
    ForeignKeyConstraint(
        ["experiment_id", "name", "digest"],
        [described_dataset.c.experiment_id, described_dataset.c.name, described_dataset.c.digest],
    ),
)
Index("run_dataset_used", run_dataset.c.experiment_id, run_dataset.c.name, run_dataset.c.digest)

run_model = Table(
    "run_model",
    METADATA,
    _run_id(),
    Column("direction", Text, CheckConstraint("direction IN ('input', 'output')"), primary_key=True),
    Column("model_id", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
)
Index("run_model_of", run_model.c.model_id)

model_metric = Table(
    "model_metric",
    METADATA,
    Column("model_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("timestamp_ms", BigInteger, primary_key=True),
    Column("value", Double, primary_key=True),
    _run_id(references=False),
    Column("dataset_name", Text, primary_key=True),
    Column("dataset_digest", Text, primary_key=True),
)
