"""The registry's first tables, what keeps its log and its versions from being rewritten, and the tables of eventing."""

from __future__ import annotations

from alembic import op
from eventing import schema as eventing_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "registry"

_STATEMENTS = (
    """
    CREATE TABLE delivery (
        name text PRIMARY KEY,
        revision bigint NOT NULL,
        deleted boolean NOT NULL
    )
    """,
    """
    CREATE TABLE delivery_revision (
        name text NOT NULL,
        revision bigint NOT NULL,
        yaml text NOT NULL,
        sections jsonb NOT NULL,
        experiment text NOT NULL,
        model text NOT NULL,
        endpoint text NOT NULL,
        approvals integer NOT NULL CHECK (approvals >= 0),
        applied_by text NOT NULL,
        applied_at timestamptz NOT NULL,
        deleted boolean NOT NULL,
        PRIMARY KEY (name, revision)
    )
    """,
    "CREATE INDEX delivery_revision_model ON delivery_revision (model)",
    """
    CREATE TABLE claim (
        kind text NOT NULL CHECK (kind IN ('experiment', 'model', 'endpoint')),
        name text NOT NULL,
        delivery text NOT NULL REFERENCES delivery,
        PRIMARY KEY (kind, name)
    )
    """,
    "CREATE INDEX claim_delivery ON claim (delivery)",
    """
    CREATE TABLE model (
        id uuid PRIMARY KEY,
        name text NOT NULL CONSTRAINT model_name UNIQUE,
        latest bigint NOT NULL,
        champion bigint NOT NULL,
        sequence bigint NOT NULL,
        created_at timestamptz NOT NULL
    )
    """,
    "COMMENT ON COLUMN model.sequence IS 'of the model''s last event on headrace.models'",
    """
    CREATE TABLE model_version (
        model_id uuid NOT NULL REFERENCES model,
        number bigint NOT NULL CHECK (number > 0),
        stage text NOT NULL CHECK (stage IN ('Development', 'Staging', 'Production', 'Archived')),
        reason text NOT NULL,
        rolling_out boolean NOT NULL,
        run_id text NOT NULL,
        journey_id text NOT NULL,
        delivery text NOT NULL,
        delivery_revision bigint NOT NULL,
        blob_sha256 text NOT NULL,
        blob_size bigint NOT NULL,
        blob_key text NOT NULL,
        format text NOT NULL,
        model_name text NOT NULL,
        deliverable bytea NOT NULL,
        evaluation_id text NOT NULL,
        champion_version bigint NOT NULL,
        champion_sha256 text NOT NULL,
        report_key text NOT NULL,
        author text NOT NULL,
        provenance jsonb NOT NULL,
        traceparent text NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (model_id, number),
        CONSTRAINT model_version_once UNIQUE (model_id, run_id, blob_sha256)
    )
    """,
    "COMMENT ON COLUMN model_version.deliverable IS 'headrace.tracker.v1.DeliverableModel as it arrived'",
    # There is one champion, and nothing else is in production.
    "CREATE UNIQUE INDEX model_version_in_production ON model_version (model_id) WHERE stage = 'Production'",
    """
    CREATE TABLE model_alias (
        model_id uuid NOT NULL,
        alias text NOT NULL CHECK (alias <> 'champion'),
        version bigint NOT NULL,
        PRIMARY KEY (model_id, alias),
        FOREIGN KEY (model_id, version) REFERENCES model_version
    )
    """,
    """
    CREATE TABLE approval (
        id uuid PRIMARY KEY,
        model_id uuid NOT NULL,
        version bigint NOT NULL,
        evaluation_id text NOT NULL,
        delivery text NOT NULL,
        delivery_revision bigint NOT NULL,
        author text NOT NULL,
        needed integer NOT NULL CHECK (needed > 0),
        status text NOT NULL CHECK (status IN ('pending', 'approved', 'rejected', 'withdrawn')),
        requested_at timestamptz NOT NULL,
        FOREIGN KEY (model_id, version) REFERENCES model_version
    )
    """,
    "CREATE INDEX approval_model ON approval (model_id, version)",
    "CREATE INDEX approval_delivery ON approval (delivery)",
    """
    CREATE TABLE approval_vote (
        approval_id uuid NOT NULL REFERENCES approval,
        subject text NOT NULL,
        approve boolean NOT NULL,
        comment text NOT NULL,
        at timestamptz NOT NULL,
        PRIMARY KEY (approval_id, subject)
    )
    """,
    """
    CREATE TABLE api_key (
        key_id text PRIMARY KEY,
        revision bigint NOT NULL,
        hash text NOT NULL CHECK (hash ~ '^[0-9a-f]{64}$'),
        subject text NOT NULL,
        roles text[] NOT NULL,
        inference_endpoints text[] NOT NULL,
        created_at timestamptz NOT NULL,
        expires_at timestamptz,
        revoked boolean NOT NULL
    )
    """,
    """
    CREATE TABLE audit (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL,
        actor text NOT NULL,
        action text NOT NULL,
        target text NOT NULL,
        before jsonb NOT NULL,
        after jsonb NOT NULL,
        reason text NOT NULL
    )
    """,
    "CREATE INDEX audit_target ON audit (target text_pattern_ops, id)",
    """
    CREATE TABLE webhook (
        id uuid PRIMARY KEY,
        body text NOT NULL,
        created_at timestamptz NOT NULL,
        attempts integer NOT NULL,
        next_attempt_at timestamptz NOT NULL,
        sent_at timestamptz,
        gave_up_at timestamptz,
        last_error text NOT NULL
    )
    """,
    "CREATE INDEX webhook_due ON webhook (next_attempt_at) WHERE sent_at IS NULL AND gave_up_at IS NULL",
    # What is written once stays written, whoever holds the service's role.
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP;
    END
    $$
    """,
    "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON delivery_revision EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON approval_vote EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER never_deleted BEFORE DELETE OR TRUNCATE ON model_version EXECUTE FUNCTION refuse_change()",
    """
    CREATE TRIGGER what_it_is BEFORE UPDATE ON model_version FOR EACH ROW
    WHEN ((OLD.model_id, OLD.number, OLD.run_id, OLD.blob_sha256, OLD.blob_size, OLD.blob_key, OLD.format, OLD.model_name, OLD.deliverable,
           OLD.author, OLD.traceparent, OLD.created_at)
          IS DISTINCT FROM
          (NEW.model_id, NEW.number, NEW.run_id, NEW.blob_sha256, NEW.blob_size, NEW.blob_key, NEW.format, NEW.model_name, NEW.deliverable,
           NEW.author, NEW.traceparent, NEW.created_at))
    EXECUTE FUNCTION refuse_change()
    """,
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)
    eventing_schema.create(op, SCHEMA)


def downgrade() -> None:
    eventing_schema.drop(op, SCHEMA)
    for table in ("webhook", "audit", "api_key", "approval_vote", "approval", "model_alias", "model_version", "model"):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP TABLE claim, delivery_revision, delivery")
    op.execute("DROP FUNCTION refuse_change")
