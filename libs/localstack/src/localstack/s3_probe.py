"""The few S3 requests with which a store is prepared and recognised: make the bucket, leave a sentinel object, read it.

Signature version 4 of AWS, with the standard library only."""

from __future__ import annotations

import hashlib
import hmac
import http.client
from dataclasses import dataclass
from datetime import UTC, datetime

from localstack.errors import StackError

_REGION = "us-east-1"
SENTINEL = ".headrace-sentinel"


@dataclass(frozen=True)
class S3Access:
    """Where a store listens ("127.0.0.1:PORT", plain HTTP), who we are there, and our bucket."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


def request(access: S3Access, method: str, path: str, body: bytes = b"", timeout_s: float = 5) -> tuple[int, bytes]:
    """One signed request; `path` starts with a slash and needs no escaping. Returns status and body.

    Blocks; raises StackError when nobody answers.
    """
    now = datetime.now(UTC)
    day, moment = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": access.endpoint, "x-amz-content-sha256": digest, "x-amz-date": moment}
    names = ";".join(headers)
    canonical = "\n".join([method, path, "", *(f"{name}:{value}" for name, value in headers.items()), "", names, digest])
    scope = f"{day}/{_REGION}/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{access.secret_key}".encode()
    for part in (day, _REGION, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={access.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    host, port = access.endpoint.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise StackError(f"S3 at {access.endpoint} does not answer: {error}") from error
    finally:
        connection.close()


def claim(access: S3Access) -> str | None:
    """Makes bucket and sentinel object when they are missing. None when the store then shows our sentinel, else the reason.

    The sentinel holds a hash of our keys: a store that keeps another one is another stack's. Blocks; may be repeated.
    """
    sentinel = hashlib.sha256(f"sentinel of {access.access_key} {access.secret_key}".encode()).hexdigest()
    path = f"/{access.bucket}/{SENTINEL}"
    try:
        status, body = request(access, "GET", path)
        if status == 404:
            made, answer = request(access, "PUT", f"/{access.bucket}")
            if made not in (200, 409):
                return f"the bucket could not be made: {made} {answer[:200]!r}"
            stored, answer = request(access, "PUT", path, sentinel.encode())
            if stored != 200:
                return f"the sentinel object could not be stored: {stored} {answer[:200]!r}"
            status, body = request(access, "GET", path)
    except StackError as error:
        return str(error)
    if status != 200:
        return f"the sentinel object cannot be read: {status}"
    return None if body.decode(errors="replace") == sentinel else "another stack's store answers on this port"
