"""Sets up what the services find when they start: roles, schemas and all migrations, the topics, and a bucket with its user.

Run once before the services, and after every update; doing it again changes nothing. Needs the servers to be up.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path
from urllib.parse import unquote, urlsplit

import asyncpg
from eventing.kafka import KafkaBroker
from eventing.topics import ensure_topics
from minio import Minio
from minio.credentials.providers import StaticProvider
from minio.minioadmin import MinioAdmin
from servicekit import migrate

SERVICES = ("tracker", "registry", "trainer", "evaluator", "deployer")
"""Those with a schema. Each has a role of its name, which owns that schema and can see no other."""

ADMIN = "headrace"
"""The superuser of PostgreSQL and, if not told otherwise, the root user of MinIO; no service knows their passwords."""

S3_USER = "services"
ROOT = Path(__file__).resolve().parents[2]

log = logging.getLogger("init")


class Secrets:
    """Secrets by name, each a file in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        return (self._folder / name).read_text().strip()


async def make_roles(address: str, database: str, secrets: Secrets) -> None:
    """A role and a schema for every service; nobody else has a right to anything."""
    host, _, port = address.rpartition(":")
    connection = await asyncpg.connect(host=host, port=int(port), user=ADMIN, password=secrets["postgres_password"], database=database)
    try:
        await connection.execute(f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC')
        for service in SERVICES:
            password = unquote(urlsplit(secrets[f"{service}_database_url"]).password or "")
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", service):
                await connection.execute(f"CREATE ROLE {service}")
            # The server quotes the password: a statement that sets one takes no parameters.
            await connection.execute(
                await connection.fetchval("SELECT format('ALTER ROLE %I LOGIN PASSWORD %L', $1::text, $2::text)", service, password)
            )
            await connection.execute(f'GRANT CONNECT ON DATABASE "{database}" TO {service}')
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {service} AUTHORIZATION {service}")
            await connection.execute(f'ALTER ROLE {service} IN DATABASE "{database}" SET search_path = {service}')
    finally:
        await connection.close()
    log.info("roles and schemas are there")


async def migrate_all(secrets: Secrets) -> None:
    """Brings every schema to its newest revision, as the role that owns it."""
    for service in SERVICES:
        await migrate.upgrade(secrets[f"{service}_database_url"], service, ROOT / "services" / service / "migrations")
        log.info("schema %s is at the newest revision", service)


async def make_topics(bootstrap: str) -> None:
    """All topics with their partition counts."""
    broker = KafkaBroker(bootstrap, "init")
    try:
        await ensure_topics(broker)
    finally:
        await broker.close()
    log.info("topics are there")


def make_bucket(endpoint: str, root: str, bucket: str, secrets: Secrets) -> None:
    """The bucket, and the one user of the services, who can do nothing outside of it."""
    password = secrets["s3_root_password"]
    client = Minio(endpoint, access_key=root, secret_key=password, secure=False)
    if not client.bucket_exists(bucket):
        client.make_bucket(bucket)
    admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(root, password), secure=False)
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
            },
            {
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            },
        ],
    }
    admin.policy_add(f"{bucket}-only", policy=policy)
    admin.user_add(S3_USER, secrets["s3_secret_key"])
    admin.policy_set(f"{bucket}-only", user=S3_USER)
    log.info("bucket and user are there")


async def run(given: argparse.Namespace) -> None:
    """Everything; what fails soonest goes first."""
    secrets = Secrets(given.secrets)
    await asyncio.to_thread(make_bucket, given.s3, given.s3_root_user, given.bucket, secrets)
    await make_roles(given.postgres, given.database, secrets)
    await migrate_all(secrets)
    await make_topics(given.kafka)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", required=True, metavar="HOST:PORT")
    parser.add_argument("--database", default="headrace")
    parser.add_argument("--kafka", required=True, metavar="HOST:PORT")
    parser.add_argument("--s3", required=True, metavar="HOST:PORT")
    parser.add_argument("--s3-root-user", default=ADMIN)
    parser.add_argument("--bucket", default="headrace")
    parser.add_argument("--secrets", type=Path, default=Path("/run/secrets"), metavar="FOLDER")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asyncio.run(run(given))


if __name__ == "__main__":
    main()
