"""The deployer's tables, as SQLAlchemy Core sees them. The migrations make them; their columns are explained here."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, DateTime, MetaData, SmallInteger, Table, Text
from sqlalchemy.dialects.postgresql import JSONB, UUID

SCHEMA = "deployer"

metadata = MetaData(schema=SCHEMA)

# One row. The epoch grows with every change of leader; a leader's transactions check that theirs is still the one.
leader = Table(
    "leader",
    metadata,
    Column("id", SmallInteger, primary_key=True),
    Column("epoch", BigInteger),
    Column("holder", Text),
    Column("since", DateTime(timezone=True)),
)

# Every revision of every delivery that was heard of, with its serve section.
delivery = Table(
    "delivery",
    metadata,
    Column("name", Text, primary_key=True),
    Column("revision", BigInteger, primary_key=True),
    Column("endpoint", Text),
    Column("section", JSONB(none_as_null=True)),
    Column("deleted", Boolean),
)

# The aggregate's row: whoever decides anything about an endpoint locks it. It holds the sequences of the endpoint's events.
# acknowledged: the highest revision that all gateways served by. watched: the route is to be published again and again.
# watching: the completed rollout that is watched, null when none is.
endpoint = Table(
    "endpoint",
    metadata,
    Column("name", Text, primary_key=True),
    Column("delivery", Text),
    Column("revision", BigInteger),
    Column("serving", Text),
    Column("previous", Text),
    Column("live", UUID(as_uuid=False)),
    Column("waiting", UUID(as_uuid=False)),
    Column("watching", UUID(as_uuid=False)),
    Column("generation", BigInteger),
    Column("acknowledged", BigInteger),
    Column("watched", Boolean),
    Column("deploys_sequence", BigInteger),
    Column("routes_sequence", BigInteger),
    Column("publication", BigInteger),
    Column("published_at", DateTime(timezone=True)),
    Column("changed_at", DateTime(timezone=True)),
)

# Every snapshot that was published, by revision.
route = Table(
    "route",
    metadata,
    Column("endpoint", Text, primary_key=True),
    Column("revision", BigInteger, primary_key=True),
    Column("body", JSONB),
    Column("made_at", DateTime(timezone=True)),
)

arm = Table(
    "arm",
    metadata,
    Column("endpoint", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("version", JSONB),
    Column("runtime", Text),
    Column("runtime_model", Text),
    Column("last_revision", BigInteger),
)

# body: the whole rollout as the domain has it. traceparent: of the event that caused it, so that one chain is one trace.
rollout = Table(
    "rollout",
    metadata,
    Column("id", UUID(as_uuid=False), primary_key=True),
    Column("endpoint", Text),
    Column("state", Text),
    Column("body", JSONB),
    Column("baseline_version", BigInteger),
    Column("traceparent", Text),
    Column("decisions", BigInteger),
    Column("deadline_at", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True)),
)

# Append-only: what was decided, when, why, on what evidence.
decision = Table(
    "decision",
    metadata,
    Column("rollout_id", UUID(as_uuid=False), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("at", DateTime(timezone=True)),
    Column("from_state", Text),
    Column("to_state", Text),
    Column("reason", Text),
    Column("evidence", JSONB),
)

# Written before a runtime is called: `intended` before a load, `wanted` false before an unload.
runtime_model = Table(
    "runtime_model",
    metadata,
    Column("name", Text, primary_key=True),
    Column("runtime", Text),
    Column("endpoint", Text),
    Column("arm", Text),
    Column("wanted", Boolean),
    Column("state", Text),
    Column("changed_at", DateTime(timezone=True)),
)
