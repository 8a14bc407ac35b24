"""The deployer's tables, as SQLAlchemy Core sees them. The migrations make them; their columns are explained here."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, DateTime, MetaData, SmallInteger, Table, Text, func
from sqlalchemy.dialects.postgresql import JSONB, UUID

SCHEMA = "deployer"

METADATA = MetaData(schema=SCHEMA)

# One row. The epoch grows with every change of leader; a leader's transactions check that theirs is still the one.
leader = Table(
    "leader",
    METADATA,
    Column("id", SmallInteger, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
)

# Every revision of every delivery that was heard of, with its serve section.
delivery = Table(
    "delivery",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("revision", BigInteger, primary_key=True),
    Column("endpoint", Text, nullable=False),
    Column("section", JSONB(none_as_null=True)),
    Column("deleted", Boolean, nullable=False),
    Column("heard_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# The aggregate's row: whoever decides anything about an endpoint locks it. It holds the sequences of the endpoint's events.
# acknowledged: the highest revision that all gateways served by. watched: the route is to be published again and again.
# watching: the completed rollout that is watched, null when none is.
endpoint = Table(
    "endpoint",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("delivery", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("serving", Text),
    Column("previous", Text),
    Column("live", UUID(as_uuid=False)),
    Column("waiting", UUID(as_uuid=False)),
    Column("watching", UUID(as_uuid=False)),
    Column("generation", BigInteger, nullable=False),
    Column("acknowledged", BigInteger, nullable=False),
    Column("watched", Boolean, nullable=False),
    Column("deploys_sequence", BigInteger, nullable=False),
    Column("routes_sequence", BigInteger, nullable=False),
    Column("publication", BigInteger, nullable=False),
    Column("published_at", DateTime(timezone=True)),
    Column("changed_at", DateTime(timezone=True), nullable=False),
)

# Every snapshot that was published, by revision.
route = Table(
    "route",
    METADATA,
    Column("endpoint", Text, primary_key=True),
    Column("revision", BigInteger, primary_key=True),
    Column("body", JSONB, nullable=False),
    Column("made_at", DateTime(timezone=True), nullable=False),
)

arm = Table(
    "arm",
    METADATA,
    Column("endpoint", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("version", JSONB, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("runtime_model", Text, nullable=False),
    Column("last_revision", BigInteger, nullable=False),
)

# body: the whole rollout as the domain has it. traceparent: of the event that caused it, so that one chain is one trace.
rollout = Table(
    "rollout",
    METADATA,
    Column("id", UUID(as_uuid=False), primary_key=True),
    Column("endpoint", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("body", JSONB, nullable=False),
    Column("baseline_version", BigInteger, nullable=False),
    Column("traceparent", Text, nullable=False),
    Column("decisions", BigInteger, nullable=False),
    Column("deadline_at", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("finished_at", DateTime(timezone=True)),
)

# Append-only: what was decided, when, why, on what evidence.
decision = Table(
    "decision",
    METADATA,
    Column("rollout_id", UUID(as_uuid=False), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("from_state", Text, nullable=False),
    Column("to_state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("evidence", JSONB, nullable=False),
)

# Written before a runtime is called: `intended` before a load, `wanted` false before an unload.
runtime_model = Table(
    "runtime_model",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("runtime", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("arm", Text, nullable=False),
    Column("wanted", Boolean, nullable=False),
    Column("state", Text, nullable=False),
    Column("changed_at", DateTime(timezone=True), nullable=False),
)
