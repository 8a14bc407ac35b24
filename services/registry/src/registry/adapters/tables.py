"""The registry's tables, as its queries name them. The migrations make them; a test holds the two together."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

SCHEMA = "registry"
METADATA = MetaData(schema=SCHEMA)


def _time(name: str, nullable: bool = False) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _text(name: str, primary_key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=primary_key, nullable=False)


def _said(name: str) -> Column[str]:
    return Column(name, Text, nullable=False, server_default=text("''"))


def _tags() -> Column[Any]:
    return Column("tags", JSONB, nullable=False, server_default=text("'{}'"))


def _number(name: str, primary_key: bool = False) -> Column[int]:
    return Column(name, BigInteger, primary_key=primary_key, nullable=False, autoincrement=False)


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False)


def _publication() -> tuple[Column[int], Column[datetime], Column[datetime]]:
    """Of a row that is one key of a compacted topic: the sequence of its last event, and when it changed and was last published."""
    return _number("sequence"), _time("changed_at"), _time("published_at")


# The newest revision of each delivery; its row is what is locked.
delivery = Table("delivery", METADATA, _text("name", True), _number("revision"), _flag("deleted"), *_publication())

delivery_revision = Table(
    "delivery_revision",
    METADATA,
    _text("name", True),
    _number("revision", True),
    _text("yaml"),
    Column("sections", JSONB, nullable=False),
    _text("experiment"),
    _text("model"),
    _text("endpoint"),
    Column("approvals", Integer, nullable=False),
    _text("applied_by"),
    _time("applied_at"),
    _flag("deleted"),
    Index("delivery_revision_model", "model"),
)

claim = Table("claim", METADATA, _text("kind", True), _text("name", True), _text("delivery"), Index("claim_delivery", "delivery"))

model = Table(
    "model",
    METADATA,
    Column("id", UUID(as_uuid=True), primary_key=True),
    _text("name"),
    _number("latest"),
    _number("champion"),
    Column("sequence", BigInteger, nullable=False, comment="of the model's last event on headrace.models"),
    _time("created_at"),
    _said("description"),
    _tags(),
    _time("updated_at"),
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
    Column("previous", BigInteger, nullable=False, server_default=text("0")),
)
Index("model_name", model.c.name, unique=True, postgresql_where=~model.c.deleted)

model_alias = Table(
    "model_alias", METADATA, Column("model_id", UUID(as_uuid=True), primary_key=True), _text("alias", True), _number("version")
)

model_version = Table(
    "model_version",
    METADATA,
    Column("model_id", UUID(as_uuid=True), primary_key=True),
    _number("number", True),
    _text("stage"),
    _text("reason"),
    _flag("rolling_out"),
    _text("run_id"),
    _text("journey_id"),
    _text("delivery"),
    _number("delivery_revision"),
    _text("blob_sha256"),
    _number("blob_size"),
    _text("blob_key"),
    _text("format"),
    _text("model_name"),
    Column("deliverable", LargeBinary, nullable=False, comment="headrace.tracker.v1.DeliverableModel as it arrived"),
    _text("evaluation_id"),
    _number("champion_version"),
    _text("champion_sha256"),
    _text("report_key"),
    _text("author"),
    Column("provenance", JSONB, nullable=False),
    _text("traceparent"),
    _time("created_at"),
    Column("last_evaluation", Text, nullable=False, server_default=text("''")),
    Column("judged_unfit", Boolean, nullable=False, server_default=text("false")),
    _said("source"),
    _said("path"),
    _said("logged_model"),
    _said("storage"),
    _said("run_link"),
    _said("registered_by"),
    _said("description"),
    _tags(),
    _time("updated_at"),
    Column("deleted", Boolean, nullable=False, server_default=text("false")),
)
Index(
    "model_version_once",
    model_version.c.model_id,
    model_version.c.run_id,
    model_version.c.blob_sha256,
    unique=True,
    postgresql_where=model_version.c.blob_sha256 != "",
)
Index("model_version_run", model_version.c.run_id, postgresql_where=model_version.c.run_id != "")
Index("model_version_logged", model_version.c.logged_model, postgresql_where=model_version.c.logged_model != "")

approval = Table(
    "approval",
    METADATA,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("model_id", UUID(as_uuid=True), nullable=False),
    _number("version"),
    _text("evaluation_id"),
    _text("delivery"),
    _number("delivery_revision"),
    _text("author"),
    Column("needed", Integer, nullable=False),
    _text("status"),
    _time("requested_at"),
    Index("approval_model", "model_id", "version"),
    Index("approval_delivery", "delivery"),
)

approval_vote = Table(
    "approval_vote",
    METADATA,
    Column("approval_id", UUID(as_uuid=True), primary_key=True),
    _text("subject", True),
    _flag("approve"),
    _text("comment"),
    _time("at"),
)

api_key = Table(
    "api_key",
    METADATA,
    _text("key_id", True),
    _number("revision"),
    _text("hash"),
    _text("subject"),
    Column("roles", ARRAY(Text), nullable=False),
    Column("inference_endpoints", ARRAY(Text), nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _flag("revoked"),
    *_publication(),
)

audit = Table(
    "audit",
    METADATA,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _time("at"),
    _text("actor"),
    _text("action"),
    _text("target"),
    Column("before", JSONB, nullable=False),
    Column("after", JSONB, nullable=False),
    _text("reason"),
    Index("audit_target", "target", "id", postgresql_ops={"target": "text_pattern_ops"}),
)

webhook = Table(
    "webhook",
    METADATA,
    Column("id", UUID(as_uuid=True), primary_key=True),
    _text("body"),
    _time("created_at"),
    Column("attempts", Integer, nullable=False),
    _time("next_attempt_at"),
    _time("sent_at", nullable=True),
    _time("gave_up_at", nullable=True),
    _text("last_error"),
)
Index("webhook_due", webhook.c.next_attempt_at, postgresql_where=webhook.c.sent_at.is_(None) & webhook.c.gave_up_at.is_(None))
